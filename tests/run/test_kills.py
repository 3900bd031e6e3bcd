"""Exact resume: a run that was killed, anywhere and any number of times, ends as one that never was."""

from collections.abc import Callable
from pathlib import Path

import pytest

from byol_core.system.files import newest_checkpoint
from tests.helpers.children import SMALL, At, run_child
from tests.helpers.kills import STEP, arguments, assert_same_run, run
from tests.helpers.runs import checkpoint, metrics, summary

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


@pytest.mark.slow
@pytest.mark.parametrize("views", ["device", "cpu"])
def test_a_run_killed_at_any_step_ends_as_if_it_never_was(data: Path, views: str) -> None:
    words = arguments(data, "--views", views, "--workers", 0)
    assert run(words, "whole") == 0
    for update, after in ((1, False), (3, False), (3, True), (5, False), (6, False), (6, True)):  # saved after 3 and 6
        out = f"killed in update {update}, {'after' if after else 'before'} its end"
        assert run(words, out, At(STEP, update, "tests.helpers.kills:kill", after)) == 137
        assert summary(out)["status"] == "running"
        assert run(words, out) == 0
        assert_same_run("whole", out)


@pytest.mark.parametrize("optimizer, scheduler, accum_steps, views", [
    ("lars", "cosine", 1, "device"), *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("lars", "plateau", 2, "cpu"), ("sgd", "constant", 2, "device"), ("sgd", "cosine", 1, "cpu"),
        ("adam", "plateau", 1, "device"), ("adamw", "cosine", 2, "cpu")])])
def test_a_run_stopped_and_killed_again_and_again_ends_as_if_it_never_was(data: Path, optimizer: str, scheduler: str,
                                                                          accum_steps: int, views: str) -> None:
    words = arguments(data, "--optimizer", optimizer, "--scheduler", scheduler, "--views", views, "--workers", 0,
                      "--accum-steps", accum_steps)
    assert run(words, "whole") == 0
    forwards = "byol_core.networks:BYOL.forward"
    assert run(words, "parts", At(STEP, 2, "SIGTERM")) == 143  # saved within an epoch
    assert run(words, "parts", At(forwards, 2 * accum_steps, "tests.helpers.kills:kill")) == 137  # within update 4
    assert run(words, "parts", At(forwards, accum_steps, "tests.helpers.kills:kill", after=True)) == 137
    assert checkpoint("parts")["progress"]["updates"] == 3
    assert run(words, "parts", At(STEP, 2, "SIGINT")) == 130
    assert checkpoint("parts")["progress"]["updates"] == 5
    assert run(words, "parts") == 0
    assert_same_run("whole", "parts")


@pytest.mark.slow
def test_measurements_on_the_way_are_neither_lost_nor_made_twice(image_folder: Callable[..., Path]) -> None:
    data = image_folder(per_class=10)
    words = ["--data", str(data), "--epochs", "3", "--eval-every", "1", "--workers", "0", *SMALL]
    assert run(words, "whole") == 0
    assert run(words, "parts", At("byol_core.run.run:Run.save", 2, "tests.helpers.kills:kill")) == 137  # not yet saved
    assert run(words, "parts") == 0
    assert_same_run("whole", "parts")
    assert [record["update"] for record in metrics("parts") if "knn" in record] == [5, 10, 15]


IN_A_SAVE = {  # the second save of a run, in the order of its parts
    "once written": At("byol_core.system.files:torch.save", 2, "SIGKILL", after=True),
    "once the old one is kept": At("byol_core.system.files:_keep_as", 1, "SIGKILL", after=True),
    "once replaced": At("byol_core.system.files:_sync_folder", 6, "SIGKILL"),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", IN_A_SAVE)
def test_a_process_killed_in_a_save_goes_on_from_a_whole_file(data: Path, moment: str) -> None:
    words = arguments(data, "--views", "device", "--workers", 0)
    assert run(words, "whole") == 0
    assert run_child([*words, "--out", "parts"], [IN_A_SAVE[moment]]).code == -9
    state, damaged = newest_checkpoint(Path("parts"))
    assert state is not None and damaged == []
    assert state["progress"]["updates"] == (6 if moment == "once replaced" else 3)  # type: ignore[index]
    assert bool(list(Path("parts").glob(".*.tmp"))) == (moment != "once replaced")
    assert run_child([*words, "--out", "parts", "--resume"]).code == 0
    assert_same_run("whole", "parts")


@pytest.mark.slow
@pytest.mark.parametrize("update, before, after", [(4, 0, 2), (5, 2, 1)])
def test_a_killed_process_goes_on_with_any_number_of_workers(data: Path, update: int, before: int, after: int) -> None:
    words = arguments(data, "--views", "cpu", "--optimizer", "lars")
    assert run([*words, "--workers", "0"], "whole") == 0
    assert run_child([*words, "--out", "parts", "--workers", before], [At(STEP, update, "SIGKILL")]).code == -9
    assert run_child([*words, "--out", "parts", "--workers", after, "--resume"]).code == 0
    assert_same_run("whole", "parts")
