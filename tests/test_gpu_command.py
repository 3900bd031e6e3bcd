"""`python -m tests.bench.gpu` on a CPU at small scale, and how it ends what fails or hangs."""

import contextlib
import importlib
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from byol_core.cuda_graph import WARM_UP
from tests.bench import end_to_end, gpu, stages
from tests.bench.stages import Log, Stage
from tests.helpers.digits import outside_the_band
from tests.helpers.forking import call

SLEEPS = "import time; print('asleep', flush=True); time.sleep(1000)"
# A process in a session of its own, deaf to polite signals, that outlives the one that started it.
LEAVES_A_CHILD = ("import subprocess, sys; code = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
                  "time.sleep(1000)'; subprocess.Popen([sys.executable, '-c', code], start_new_session=True); sys.exit(3)")
WRITES_NUMBERS = ("import sys; open(sys.argv[-1], 'w').write('{\"a\": 1, \"section\": \"## A\"}\\n{\"b\": 2}\\n{\"torn\": '); "
                  "print('one'); print('two', end='')")
WRITES_A_SHARE = ("import sys; open(sys.argv[-1], 'w').write('{\"share_of_copy_bandwidth\": 0.95, "
                  "\"section\": \"## EMA, a table\"}\\n')")


def stage(name: str, code: str, limit: float | None = 600.0, **options: Any) -> Stage:
    return Stage("tried", name, lambda seconds: ["-c", code], limit, **options)


@pytest.fixture(autouse=True)
def late_once_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage is at its limit once it says that it sleeps, or has printed what is logged of one."""
    limit = stages.Running.over.fget
    assert limit is not None

    def over(running: stages.Running) -> bool:
        log, name = running.log, running.stage.name
        return limit(running) or log.last.get(name) == "asleep" or log.written.get(name, 0) > stages.LOGGED_BYTES

    monkeypatch.setattr(stages.Running, "over", property(over))


@pytest.fixture
def carried_out(tmp_path: Path) -> Callable[..., dict[str, dict[str, Any]]]:
    """Runs stages; their results by name, in order."""
    def run(*todo: Stage, seconds: float = 3600.0, at_once: int = 1) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        stages.run(todo, lambda stage, result: found.update({stage.name: result}), Log(tmp_path / "log.txt"), seconds,
                   tmp_path, at_once, {})
        return found
    return run


def alive(name: str) -> list[int]:
    """The processes of a stage of ours that are left."""
    return list(stages.marked(f"{os.getpid()}-{name}"))


@pytest.fixture
def images(image_folder: Callable[..., Path]) -> list[str]:
    """The options that name images: two classes of 32 pixels to train and to test on, and photographs of two sizes."""
    for part in ("train", "test"):
        image_folder(f"cifar/{part}", 2, 24, (32, 32))
    image_folder("photos/wide", 0, 18, (90, 70))
    photos = image_folder("photos/high", 0, 18, (70, 90)).parent
    return ["--images", str(photos.parent / "cifar"), "--photos", str(photos)]


@pytest.mark.slow
def test_the_whole_command_with_a_stage_that_fails_and_one_that_hangs(
        images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All stages but one of the command's own stand for what real ones do."""
    first = [stage("fails", "import sys; print('all is lost'); sys.exit(3)"), stage("hangs", SLEEPS),
             stage("not here", "", missing="no compiler"), stage("ema", WRITES_A_SHARE)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stages, "TO_TELL_S", 60.0)
        found = gpu.stages
        patched.setattr(gpu, "stages", lambda options: [each for each in found(options) if each.name == "tests"])
        code = gpu.main([*images, "--out", str(tmp_path / "out"), "--device", "cpu", "--seconds", "6000"], first=first)
    begun, *lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    results = {line["stage"]: line for line in lines}
    printed, log = capsys.readouterr().out, (tmp_path / "out" / "log.txt").read_text()
    assert begun["stages"] == list(results) == ["fails", "hangs", "not here", "ema", "tests"]
    assert code == 1 and "\nfailed: fails\n" in printed and "\nended at its limit: hangs\n" in printed
    assert results["fails"]["status"] == "failed" and results["fails"]["exit_code"] == 3
    assert results["fails"]["last_line"] == "all is lost"
    assert results["hangs"]["status"] == "ended at its limit" and "File \"<string>\", line 1" in log  # where it hung
    assert results["not here"]["status"] == "left out" and "\nleft out: not here\n" in printed
    assert results["ema"]["bars"][0] | {"what": ""} == {"what": "", "value": 0.95, "least": 0.9, "most": None, "reached": True}
    assert "\n## EMA, a table" in printed and "0.95" in printed
    assert results["tests"]["status"] == "passed" and "[tests] + -m tests.bench.right tests" in log, log
    assert results["tests"]["numbers"]["skipped" if not torch.cuda.is_available() else "passed"] > 10


def rehearsal(images: list[str], work: Path) -> dict[str, Stage]:
    """The stages on a CPU, by name."""
    options = Namespace(images=Path(images[1]), photos=Path(images[3]), device="cpu", seconds=6000.0, minutes=None, work=work)
    return {stage.name: stage for stage in gpu.stages(options)}


def equal(found: float, wanted: float) -> None:
    assert found == wanted


def within(found: float, least: float, most: float, section: str = "", title: str = "") -> None:
    assert least <= found <= most and section.startswith(title)


def same_run(numbers: dict[str, Any]) -> None:
    assert numbers["resumed_differs_by"] == numbers["repeated_differs_by"] == 0.0


def same_accuracies_on_a_cpu(numbers: dict[str, Any]) -> None:
    assert numbers["knn_20_on_a_cpu"] == pytest.approx(numbers["knn_20"], abs=0.02) and numbers["knn_20"] > 0.8
    assert "linear_5" in outside_the_band(numbers, ("linear_5",))  # after one epoch


def near_the_bare_step(numbers: dict[str, Any]) -> None:
    assert 0 < numbers["share_of_bare_step"] < 10 and 0 <= numbers["waits"] < 1
    assert numbers["section"].startswith("## End to end: conv6")


def accuracies_are_known(numbers: dict[str, Any]) -> None:
    accuracies = numbers["seed 0"]["accuracies"]
    assert all(0 < accuracies[key] <= 1 for key in ("kNN 20, last", "kNN 200, last", "linear, last", "1 label", "5 labels"))


# What must hold of the numbers of each stage that is rehearsed.
NUMBERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "digits-bf16": same_accuracies_on_a_cpu,
    "digits-off": same_accuracies_on_a_cpu,
    "resume": same_run,
    "resume-crops": same_run,
    "torchrun": lambda numbers: equal(numbers["weights_differ_by"], 0.0),
    "compile-small": lambda numbers: within(numbers["gradients_off_float32_compiled"], 0.0, 0.02),
    "ema": lambda numbers: within(numbers["share_of_copy_bandwidth"], 0.01, 10.0, numbers["section"], "## EMA, "),
    "lars": lambda numbers: within(numbers["milliseconds"]["**LARS**"], 0.0, 1e6, numbers["section"], "## LARS, "),
    "cifar": near_the_bare_step,
    "photos": near_the_bare_step,
    "cifar-compiled": lambda numbers: within(numbers["times_default_compile"], 0.01, 100.0),
    "learns": accuracies_are_known,
    "lightly": accuracies_are_known}
TOGETHER = [("compile-small", "cifar-compiled"), ("learns", "lightly")]  # the second finds what the first has left
ALONE = [(name,) for name in NUMBERS if not any(name in names for names in TOGETHER)]


def test_every_stage_is_rehearsed(images: list[str], tmp_path: Path) -> None:
    assert list(NUMBERS) == [name for name in rehearsal(images, tmp_path) if name != "tests"]  # which the whole command runs


@pytest.mark.slow
@pytest.mark.parametrize("names", TOGETHER + ALONE, ids=" ".join)
def test_a_stage_at_small_scale(names: tuple[str, ...], images: list[str], tmp_path: Path) -> None:
    """In a process that is forked, as loading torch for each takes longer than what it does."""
    found = [rehearsal(images, tmp_path / "work")[name] for name in names]
    if found[0].missing:
        pytest.skip(found[0].missing)
    for stage in [each for each in found if not each.missing]:
        numbers = tmp_path / f"{stage.name}.jsonl"
        words = [*map(str, stage.command(600.0)), "--json", str(numbers)]
        environment = {**stage.environment, "OMP_NUM_THREADS": "1", "BYOL_COMMIT": "none",
                       "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
        call("tests.helpers.forking:python", [words, environment], tmp_path / f"{stage.name}.log")
        lines = [json.loads(line) for line in numbers.read_text().splitlines()]
        assert lines, "nothing was measured"
        NUMBERS[stage.name](dict(pair for line in lines for pair in line.items()))


def test_a_stage_that_hangs_is_ended_and_the_next_one_runs(carried_out, tmp_path: Path) -> None:
    found = carried_out(stage("hangs", SLEEPS), stage("next", "print('here')"))
    assert {name: result["status"] for name, result in found.items()} == {"hangs": "ended at its limit", "next": "passed"}
    assert not alive("hangs") and found["hangs"]["last_line"] == "asleep"  # and not the last line of its stacks
    assert "[next] here\n" in (tmp_path / "log.txt").read_text()


def test_a_stage_gets_the_variables_of_its_own(carried_out) -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['BYOL_STAGE'])"
    assert carried_out(stage("alone", code, environment={"OMP_NUM_THREADS": "7"}))["alone"]["last_line"].startswith("7 ")


def test_stages_side_by_side_share_the_processors(images: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for processors, threads, at_once in ((16, "1", 10), (2, "2", 1), (1, "1", 1)):
        monkeypatch.setattr(gpu, "usable_cpus", lambda: processors)
        assert gpu.at_once() == at_once
        assert {stage.environment.get("OMP_NUM_THREADS") for stage in full_list(images) if stage.beside} == {threads}
        assert not any(stage.environment for stage in full_list(images) if not stage.beside)  # these are timed


def test_what_a_stage_leaves_running_is_ended(carried_out) -> None:
    found = carried_out(stage("leaves", LEAVES_A_CHILD))
    assert found["leaves"]["status"] == "failed" and found["leaves"]["exit_code"] == 3 and not alive("leaves")


@pytest.mark.slow
@pytest.mark.parametrize("prints", ["'x' * 1000", "'x' * 1000 + '\\n'"])
def test_a_stage_that_prints_without_end_is_ended_and_fills_no_disk(carried_out, tmp_path: Path, prints: str) -> None:
    found = carried_out(stage("floods", f"import sys\nwhile True: sys.stdout.write({prints})"))
    assert found["floods"]["status"] == "ended at its limit" and not alive("floods")
    assert (tmp_path / "log.txt").stat().st_size < 2 * stages.LOGGED_BYTES


def test_a_stage_that_throws_its_environment_away_is_ended(carried_out) -> None:
    code = f"import os, sys; os.execve(sys.executable, [sys.executable, '-c', {SLEEPS!r}], {{}})"
    result = carried_out(stage("hides", code))["hides"]
    assert result["status"] == "ended at its limit" and result["exit_code"] in (-6, -9)


def test_numbers_and_log_are_kept_of_a_file_that_is_torn_and_a_line_that_has_no_end(carried_out, tmp_path: Path) -> None:
    result = carried_out(stage("writes", WRITES_NUMBERS))["writes"]
    assert result["numbers"] == {"a": 1, "b": 2} and result["sections"] == ["## A"] and result["last_line"] == "two"
    assert (tmp_path / "log.txt").read_text().splitlines()[-2:] == ["[writes] one", "[writes] two"]


def test_what_no_time_is_left_for_is_left_out(carried_out) -> None:
    found = carried_out(stage("takes all", "import time; time.sleep(1000)", limit=None, least=0.0),
                        stage("too late", SLEEPS, least=10.0), stage("not here", SLEEPS, missing="no such thing"),
                        seconds=stages.TO_END_S + 2.0)
    assert found["takes all"]["status"] == "ended at its limit"
    assert found["too late"] == {"status": "left out", "last_line": "0 s are left"}
    assert found["not here"] == {"status": "left out", "last_line": "no such thing"}


def test_only_stages_that_time_nothing_run_side_by_side(carried_out, tmp_path: Path) -> None:
    """The first two wait for each other; the third finds both gone."""
    meets = ("import pathlib, time; place = pathlib.Path({place!r}); (place / {mine!r}).touch()\n"
             "while not (place / {other!r}).exists(): time.sleep(0.01)\n")
    place = str(tmp_path)
    found = carried_out(stage("one", meets.format(place=place, mine="1", other="2"), beside=True),
                        stage("two", meets.format(place=place, mine="2", other="1"), beside=True),
                        stage("alone", "pass"), at_once=2)
    assert {result["status"] for result in found.values()} == {"passed"} and list(found)[-1] == "alone"
    beside, alone = stage("a", "pass", beside=True), stage("b", "pass")
    assert stages.may_start(beside, [beside], 2) and not stages.may_start(beside, [beside, beside], 2)
    assert not stages.may_start(alone, [beside], 2) and not stages.may_start(beside, [alone], 2)


def test_an_interrupted_run_ends_its_stages_and_keeps_what_they_have(tmp_path: Path) -> None:
    found: dict[str, str] = {}

    class Interrupting(Log):
        def write(self, name: str, part: bytes) -> None:
            super().write(name, part)
            if part.startswith(b"asleep"):  # and is no command line
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run([stage("sleeps", SLEEPS)], lambda stage, result: found.update({stage.name: result["status"]}),
                   Interrupting(tmp_path / "log.txt"), 3600.0, tmp_path, 1, {})
    assert found == {"sleeps": "interrupted"} and not alive("sleeps")


def full_list(images: list[str]) -> list[Stage]:
    """The stages on a GPU."""
    options = Namespace(images=Path(images[1]), photos=Path(images[3]), device="cuda", seconds=480.0, minutes=2.0,
                        work=Path("work"))
    return gpu.stages(options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the commands would run")
def test_every_command_for_a_gpu_is_understood_and_lacks_but_the_gpu(
        images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = full_list(images)
    assert {stage.group for stage in found} == {"right", "fast", "learns"} and len(found) > 15
    for each in found:
        if each.missing:
            continue
        _, module, *words = map(str, each.command(60.0))
        monkeypatch.setattr(sys, "argv", [module, *words, *(["--out", str(tmp_path)] if "accuracy" in module else []),
                                          "--json", str(tmp_path / "numbers.jsonl")])
        with pytest.raises((SystemExit, ValueError)) as ended:
            importlib.import_module(module).main()
        said = f"{ended.value} {capsys.readouterr().err}"
        assert "no CUDA device found" in said or "0 CUDA devices found" in said, (each.name, said)


def test_end_to_end_has_a_row_for_each_option_on_top_of_the_others() -> None:
    chosen = end_to_end.variants(Namespace(compile=True, cuda_graph=True))
    assert chosen == {end_to_end.OURS: {}, "byol_core's train, --compile": {"compile": True},
                      "byol_core's train, --compile --cuda-graph": {"compile": True, "cuda_graph": True}}
    assert list(end_to_end.variants(Namespace(compile=False, cuda_graph=True)).values()) == [{}, {"cuda_graph": True}]


def test_end_to_end_is_under_way_when_a_graph_is_recorded_but_never_without_an_update() -> None:
    assert [end_to_end.settling(updates) for updates in (2, 4, 8, 24, 50)] == [1, 1, 2, WARM_UP + 1, WARM_UP + 1]


def test_stages_are_chosen_by_name_and_group(images: list[str]) -> None:
    found = full_list(images)
    assert [stage.name for stage in gpu.chosen(found, ["learns", "ema"])] == ["ema", "learns", "lightly"]
    assert gpu.chosen(found, None) == found
    with pytest.raises(ValueError, match="--only emma: the stages are compile-large, tests, digits-bf16"):
        gpu.chosen(found, ["emma"])


@pytest.mark.parametrize("wrong, said", [
    (["--photos", "nowhere"], "no folder nowhere"), (["--seconds", "1"], "--seconds must be above 5"),
    (["--minutes", "0"], "--minutes must be above 0"), (["--only", "emma"], "--only emma")])
def test_wrong_options_end_before_anything_runs(
        images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], said: str) -> None:
    with contextlib.ExitStack() as stack:
        if "--only" not in wrong:
            stack.enter_context(pytest.raises(SystemExit, match="2"))
        assert gpu.main([*images, "--out", str(tmp_path / "out"), "--device", "cpu", *wrong]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_bar_is_reached_or_not() -> None:
    bar = gpu.Bar("photos", ("a", "b"), "what", least=0.9, most=1.0)
    judged = [bar.judge({"a": {"b": value}}) for value in (0.89, 0.9, 1.0, 1.01)]
    assert [verdict and verdict["reached"] for verdict in judged] == [False, True, True, False]
    assert bar.judge({}) is None and bar.judge({"a": {}}) is None
