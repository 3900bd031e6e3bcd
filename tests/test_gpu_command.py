"""`python -m tests.bench.gpu` on a CPU at small scale, and how it ends what fails or hangs."""

import contextlib
import importlib
import json
import math
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
from tests.helpers.forking import call

SLEEPS = "import time; print('asleep', flush=True); time.sleep(1000)"
# A process in a session of its own, deaf to polite signals, that outlives the one that started it.
LEAVES_A_CHILD = ("import subprocess, sys; code = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
                  "time.sleep(1000)'; subprocess.Popen([sys.executable, '-c', code], start_new_session=True); "
                  "print('all is lost'); sys.exit(3)")
WRITES_NUMBERS = ("import os, sys; print('one'); print(os.environ['OMP_NUM_THREADS'], os.environ['BYOL_STAGE'], end=''); "
                  "open(sys.argv[-1], 'w').write('{\"a\": 1, \"section\": \"## A\"}\\n{\"b\": 2}\\n{\"torn\": ')")
# In the folder of the repository, as other stages are.
WRITES_A_SHARE = ("import sys, tests.bench; open(sys.argv[-1], 'w').write('{\"share_of_copy_bandwidth\": 0.95, "
                  "\"section\": \"## EMA, a table\"}\\n')")
# Carries out the words of a stage but for "-m". It compiles without a compiler, and draws and counts fewer times.
REHEARSED = ("import functools, runpy, sys; from torch import nn; sys.argv.pop(0); "
             "nn.Module.compile = functools.partialmethod(nn.Module.compile, backend='aot_eager'); "
             "from byol_core.evaluate import probes; probes.DRAWS = 2; "
             "from byol_core.report import pictures; pictures.TSNE_STEPS = 250; "
             "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)")


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


def test_the_whole_command_with_a_stage_that_fails_and_one_that_hangs(
        images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The stages stand for what real ones do."""
    first = [stage("fails", LEAVES_A_CHILD), stage("hangs", SLEEPS), stage("not here", "", missing="no compiler"),
             stage("ema", WRITES_A_SHARE)]
    monkeypatch.setattr(stages, "TO_TELL_S", 60.0)
    monkeypatch.setattr(gpu, "stages", lambda options: [])
    monkeypatch.chdir(tmp_path)
    code = gpu.main([*images, "--out", "out", "--device", "cpu", "--seconds", "6000"], first=first)
    begun, *lines = [json.loads(line) for line in Path("out", "results.jsonl").read_text().splitlines()]
    results = {line["stage"]: line for line in lines}
    printed, log = capsys.readouterr().out, Path("out", "log.txt").read_text()
    assert begun["stages"] == list(results) == ["fails", "hangs", "not here", "ema"]
    assert code == 1 and "\nfailed: fails\n" in printed and "\nended at its limit: hangs\n" in printed
    assert results["fails"]["status"] == "failed" and results["fails"]["exit_code"] == 3 and not alive("fails")
    assert results["fails"]["last_line"] == "all is lost"
    assert results["hangs"]["status"] == "ended at its limit" and "File \"<string>\", line 1" in log  # where it hung
    assert results["hangs"]["last_line"] == "asleep" and not alive("hangs")  # and not the last line of its stacks
    assert results["not here"]["status"] == "left out" and "\nleft out: not here\n" in printed
    assert results["ema"]["bars"][0] | {"what": ""} == {"what": "", "value": 0.95, "least": 0.9, "most": None, "reached": True}
    assert results["ema"]["status"] == "passed" and "\n## EMA, a table" in printed and "0.95" in printed
    assert "[fails] all is lost\n" in log


def stages_on(device: str, images: list[str], work: Path = Path("work"), minutes: float | None = None) -> list[Stage]:
    return gpu.stages(Namespace(images=Path(images[1]), photos=Path(images[3]), device=device, seconds=480.0, minutes=minutes,
                                work=work))


def near_the_bare_step(numbers: dict[str, Any]) -> bool:
    return (0 < numbers["share_of_bare_step"] < math.inf and 0 <= numbers["waits"] < 1
            and numbers["section"].startswith("## End to end: conv6"))


def accuracies_are_known(numbers: dict[str, Any]) -> bool:
    accuracies = numbers["seed 0"]["accuracies"]
    return all(0 < accuracies[key] <= 1 for key in ("kNN 20, last", "kNN 200, last", "linear, last", "1 label", "5 labels"))


# What must hold of the numbers of each stage that is rehearsed.
NUMBERS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "tests": lambda numbers: numbers["passed" if torch.cuda.is_available() else "skipped"] > 10,
    "digits-off": lambda numbers: (numbers["precision"] == "off" and numbers["knn_20"] > 0.8
                                   and abs(numbers["knn_20_on_a_cpu"] - numbers["knn_20"]) <= 0.02),
    "resume-crops": lambda numbers: numbers["resumed_differs_by"] == numbers["repeated_differs_by"] == 0.0,
    "torchrun": lambda numbers: numbers["weights_differ_by"] == 0.0,
    "compile-small": lambda numbers: 0.0 <= numbers["gradients_off_float32_compiled"] <= 0.02,
    "ema": lambda numbers: 0 < numbers["share_of_copy_bandwidth"] < math.inf and numbers["section"].startswith("## EMA, "),
    "lars": lambda numbers: 0.0 < numbers["milliseconds"]["**LARS**"] and numbers["section"].startswith("## LARS, "),
    "photos": near_the_bare_step,
    "cifar-compiled": lambda numbers: near_the_bare_step(numbers) and 0 < numbers["times_default_compile"] < math.inf,
    "learns": accuracies_are_known,
    "lightly": accuracies_are_known}
TOGETHER = ("learns", "lightly")  # the second finds what the first has left
# Stages of which every line is run for others: by the same check in another precision, or on images that are held in memory,
# as in tests/test_gpu_checks.py; `cifar` has its peers from `photos`, and the rest from `cifar-compiled`.
ALIKE = ["digits-bf16", "resume", "cifar"]


def test_every_stage_is_rehearsed(images: list[str]) -> None:
    assert sorted([*NUMBERS, *ALIKE]) == sorted(stage.name for stage in stages_on("cpu", images))


@pytest.mark.slow
@pytest.mark.parametrize("names", [TOGETHER, *((name,) for name in NUMBERS if name not in TOGETHER)], ids=" ".join)
def test_a_stage_at_small_scale(names: tuple[str, ...], images: list[str], tmp_path: Path) -> None:
    """In a process that is forked, as loading torch for each takes longer than what it does.

    What compiles does so up to the graphs of forward and backward: Inductor's C++ would take a minute and is not run on a GPU.
    """
    for each in (stage for stage in stages_on("cpu", images, tmp_path / "work") if stage.name in names):
        if "lightly" in each.missing:
            pytest.skip(each.missing)
        numbers = tmp_path / f"{each.name}.jsonl"
        words = ["-c", REHEARSED, *map(str, each.command(600.0)[1:]), "--json", str(numbers)]
        environment = {**each.environment, "OMP_NUM_THREADS": "1", "BYOL_COMMIT": "none"}
        call("tests.helpers.forking:python", [words, environment], tmp_path / f"{each.name}.log")
        lines = [json.loads(line) for line in numbers.read_text().splitlines()]
        assert lines, "nothing was measured"
        found = dict(pair for line in lines for pair in line.items())
        assert NUMBERS[each.name](found), found


def test_stages_side_by_side_share_the_processors(images: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for processors, threads, at_once in ((16, "1", 10), (2, "2", 1), (1, "1", 1)):
        monkeypatch.setattr(gpu, "usable_cpus", lambda: processors)
        assert gpu.at_once() == at_once
        assert {stage.environment.get("OMP_NUM_THREADS") for stage in stages_on("cuda", images) if stage.beside} == {threads}
        assert not any(stage.environment for stage in stages_on("cuda", images) if not stage.beside)  # these are timed


def test_a_stage_that_prints_without_end_is_ended_and_fills_no_disk(carried_out, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "LONGEST", 2**12)
    monkeypatch.setattr(stages, "LOGGED_BYTES", 2**14)
    found = carried_out(stage("floods", "import sys\nwhile True: sys.stdout.write('x' * 1000)"))
    assert found["floods"]["status"] == "ended at its limit" and not alive("floods")
    assert (tmp_path / "log.txt").stat().st_size < 2 * stages.LOGGED_BYTES


def test_a_stage_that_throws_its_environment_away_is_ended(carried_out) -> None:
    code = f"import os, sys; os.execve(sys.executable, [sys.executable, '-c', {SLEEPS!r}], {{}})"
    result = carried_out(stage("hides", code))["hides"]
    assert result["status"] == "ended at its limit" and result["exit_code"] in (-6, -9)


def test_numbers_and_log_are_kept_of_a_file_that_is_torn_and_a_line_that_has_no_end(carried_out, tmp_path: Path) -> None:
    """And a stage gets the variables of its own."""
    result = carried_out(stage("writes", WRITES_NUMBERS, environment={"OMP_NUM_THREADS": "7"}))["writes"]
    assert result["numbers"] == {"a": 1, "b": 2} and result["sections"] == ["## A"]
    assert result["last_line"] == f"7 {os.getpid()}-writes"
    assert (tmp_path / "log.txt").read_text().splitlines()[-2:] == ["[writes] one", f"[writes] {result['last_line']}"]


def test_what_no_time_is_left_for_is_left_out(carried_out) -> None:
    found = carried_out(stage("takes all", "import time; time.sleep(1000)", limit=None, least=0.0),
                        stage("too late", SLEEPS, least=10.0), seconds=stages.TO_END_S + 0.5)
    assert found["takes all"]["status"] == "ended at its limit"
    assert found["too late"] == {"status": "left out", "last_line": "0 s are left"}


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


def test_an_interrupted_run_ends_its_stages_and_keeps_what_they_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, str] = {}

    def interrupt(running: stages.Running) -> bool:
        if running.log.last["sleeps"] == "asleep":  # and no command line
            raise KeyboardInterrupt
        return False

    monkeypatch.setattr(stages.Running, "over", property(interrupt))
    with pytest.raises(KeyboardInterrupt):
        stages.run([stage("sleeps", SLEEPS)], lambda stage, result: found.update({stage.name: result["status"]}),
                   Log(tmp_path / "log.txt"), 3600.0, tmp_path, 1, {})
    assert found == {"sleeps": "interrupted"} and not alive("sleeps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the commands would run")
def test_every_command_for_a_gpu_is_understood_and_lacks_but_the_gpu(
        images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = stages_on("cuda", images, minutes=2.0)
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
    found = stages_on("cuda", images)
    assert [stage.name for stage in gpu.chosen(found, ["learns", "ema"])] == ["ema", "learns", "lightly"]
    assert gpu.chosen(found, None) == found


@pytest.mark.parametrize("wrong, said", [
    (["--photos", "nowhere"], "no folder nowhere"), (["--seconds", "1"], "--seconds must be above 5"),
    (["--minutes", "0"], "--minutes must be above 0"), (["--only", "emma"], "--only emma: the stages are tests, digits-bf16")])
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
