"""Whose files a run folder may hold: those of others are never touched."""

import errno
import fcntl
import shutil
from pathlib import Path

import pytest

from byol_core.run.folder import choose_out, open_run_folder
from byol_core.run.options import TrainConfig
from tests.helpers.children import At
from tests.helpers.kills import STEP, arguments, run

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


@pytest.mark.parametrize("may_be_used", [False, True])
def test_a_refused_folder_keeps_every_file_of_its_owner(tmp_path: Path, may_be_used: bool) -> None:
    for name in (".important.tmp", ".train.log.12.tmp", "notes.txt"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="is not empty .it holds notes.txt"), open_run_folder(tmp_path, may_be_used):
        pass
    assert {entry.name for entry in tmp_path.iterdir()} == {".important.tmp", ".train.log.12.tmp", "notes.txt"}


def test_only_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    for name in (".last.pt.12.tmp", ".mine.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / ".folder.12.tmp").mkdir()
    with open_run_folder(tmp_path, may_be_used=False):
        assert {entry.name for entry in tmp_path.iterdir()} == {".lock", ".mine.tmp", ".folder.12.tmp"}


def lose_the_folder() -> None:
    shutil.rmtree("out")


def test_a_run_folder_that_is_deleted_on_the_way_ends_the_run_in_a_line(data: Path, capsys) -> None:
    assert run(arguments(data, "--workers", 0), "out", At(STEP, 2, "tests.run.test_folder:lose_the_folder")) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "error: out was removed or replaced while the run went on, so nothing is saved" and len(said) == 2
    assert not Path("out").exists()


def replace_the_folder() -> None:
    shutil.rmtree("out")
    Path("out").mkdir()
    Path("out/.lock").write_text("another run's")


def test_a_run_writes_nothing_into_a_folder_that_has_taken_the_place_of_its_own(data: Path, capsys) -> None:
    assert run(arguments(data, "--workers", 0), "out", At(STEP, 2, "tests.run.test_folder:replace_the_folder")) == 1
    assert "error: out was removed or replaced while the run went on" in capsys.readouterr().err
    assert {entry.name for entry in Path("out").iterdir()}.isdisjoint({"last.pt", "summary.json", "report.html"})


@pytest.mark.slow
def test_a_run_goes_on_without_what_is_only_to_look_at(data: Path, monkeypatch, capsys) -> None:
    def fail(*_: object) -> None:
        raise OSError("no room for pictures")

    for place in ("describe.write_json", "results.write_json", "results.save_views", "results.save_neighbours",
                  "results.write_report"):
        monkeypatch.setattr(f"byol_core.run.{place}", fail)
    assert run([word for word in arguments(data, "--workers", 0) if word != "--no-eval"], "out") == 0
    assert capsys.readouterr().out.count("warning: no room for pictures - the run goes on\n") == 5
    assert Path("out/backbone.pt").exists()


@pytest.mark.parametrize("may_be_used", [False, True])
def test_a_finished_network_without_checkpoints_is_not_overwritten(tmp_path: Path, may_be_used: bool) -> None:
    (tmp_path / "backbone.pt").write_bytes(b"weights")
    with pytest.raises(ValueError, match="already holds a finished run"), open_run_folder(tmp_path, may_be_used):
        pass
    assert (tmp_path / "backbone.pt").read_bytes() == b"weights"


def test_a_lock_that_is_removed_while_it_is_waited_for_is_opened_again(tmp_path: Path, monkeypatch) -> None:
    """By a process that found the folder used, and takes back the lock that it has made."""
    flock, removed = fcntl.flock, []

    def remove_first(handle: int, operation: int) -> None:
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with open_run_folder(tmp_path, may_be_used=False), pytest.raises(ValueError, match="another run"):
        with open_run_folder(tmp_path, may_be_used=False):
            pass


def test_a_file_system_without_locks_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open_run_folder(tmp_path / "out", may_be_used=False) as folder:
        assert folder.is_dir()


def test_an_empty_folder_of_the_user_survives_a_run_that_comes_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with open_run_folder(tmp_path / "out", may_be_used=False), pytest.raises(ValueError):
        raise ValueError
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("data, name", [
    (["x/imgs"], "imgs"), (["x/imgs/", "y/more"], "imgs+more"), (["x/all.txt"], "all"), (["x/{0..9}.tar"], "x"),
    (["x/train-{0000..0099}.tar"], "train"), (["x/s.tar"], "s"), (["/"], "root"),
    ([f"folder{number}" for number in range(100)], None)])
def test_the_run_folder_is_called_by_the_data(data: list[str], name: str | None) -> None:
    found = choose_out(TrainConfig(data=tuple(data)))
    assert found.parent == Path("runs") and len(found.name) <= 100 and (name is None or found.name == name)
