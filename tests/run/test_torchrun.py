"""The main job in several processes: one set of files, the same weights everywhere, stops, restarts and two machines."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from byol_core.images.image_set import scan
from byol_core.system import distributed
from byol_core.system.files import save_checkpoint
from byol_core.views.batches import Order
from tests.helpers.runs import assert_same_state, checkpoint, metrics, run, summary
from tests.helpers.torchrun import SMALL, Finished, torchrun, trained

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("processes", [2, 4])
def test_ends_with_one_set_of_files(processes: int, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--data", image_folder(), "--out", "out", "--epochs", 1, *SMALL, "--batch-size", 12,
                    processes=processes, forked=processes > 2)
    assert done.code == 0 and not done.orphans, done.err
    result = summary(tmp_path / "out")
    assert result["status"] == "finished" and result["world_size"] == processes and result["updates"] == 1
    assert result["knn"] is not None and done.out.count("data: 16 images") == 1 and done.out.count("\ntrained: knn") == 1
    assert [record["update"] for record in metrics(tmp_path / "out")] == [1]
    assert f"processes: {processes}, each with {12 // processes} images at a time" in done.out


def test_sigterm_to_one_process_stops_all_after_the_same_update(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    images = image_folder(per_class=24)
    done = trained(tmp_path, images, fault="gets SIGTERM")
    assert "SIGTERM to rank 1: stopped at epoch 0, update 5" in done.out and not done.messages and not done.orphans
    assert summary(tmp_path / "out")["status"] == "stopped" and checkpoint(tmp_path / "out")["world_size"] == 2
    assert "<pre>torchrun --nproc-per-node=2 train.py --data" in (tmp_path / "out" / "report.html").read_text()
    again = trained(tmp_path, images, "--resume")
    assert "processes: 2, each with 4 images at a time" in again.out
    whole = torchrun(tmp_path, "--data", images, "--out", "whole", "--epochs", 2, "--no-eval", *SMALL)
    assert again.code == whole.code == 0
    assert_same_state(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "out"))


def test_a_process_that_stalls_is_waited_for(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Longer than a process that is gone would be given to say why."""
    assert trained(tmp_path, image_folder(), "--out", "whole").code == 0
    done = trained(tmp_path, image_folder(), fault=f"time.sleep({distributed.GRACE_S + 2})")
    assert done.code == 0 and not done.messages, done.err
    assert_same_state(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "out"))


@pytest.mark.parametrize("fault", ["pass", "gets SIGTERM"])
def test_a_bad_file_that_one_process_meets_is_known_to_all(fault: str, image_folder: Callable[..., Path],
                                                           tmp_path: Path) -> None:
    """At the end of the epoch, or where the run is stopped before it."""
    images = image_folder(per_class=24)
    index = int(Order(48, 8, rank=1, world_size=2).epoch(0)[0, 0])  # in the first update, of the process that writes nothing
    name = scan(images).name(index)
    (images / name).write_bytes(b"torn")
    done = trained(tmp_path, images, "--views", "cpu", "--epochs", 1, fault=fault)
    assert done.code == (0 if fault == "pass" else 1), done.err
    assert name in (tmp_path / "out" / "bad_files.txt").read_text() and summary(tmp_path / "out")["bad_files"] == 1
    assert list(checkpoint(tmp_path / "out")["bad_files"]) == [index]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_torchrun_saves_once(name: str, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    """As from a terminal, whose Ctrl-C may reach the processes themselves, and then once more through torchrun."""
    fault = f"os.kill(os.getpid(), signal.{name}); os.kill(starter, signal.{name})"
    done = trained(tmp_path, image_folder(per_class=24), "--epochs", 4000, fault=fault)
    assert done.code == 1 and done.out.count(": stopped at epoch") == 1 and f"\n{name}" in done.out
    assert (tmp_path / "out" / "last.pt").exists() and not done.messages and not done.orphans
    assert summary(tmp_path / "out")["status"] == "stopped"


# With a name of its own for each call of torchrun, with one name for all of them, and with none.
CALLS = {"own name": ("--standalone",), "no name": ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
         "one name": ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "byol")}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_restart_by_torchrun_resumes_bit_for_bit(call: tuple[str, ...], image_folder: Callable[..., Path],
                                                   tmp_path: Path) -> None:
    """With three processes, whose sums depend on the places that DistributedDataParallel gives to gradients."""
    common = ("--data", image_folder(per_class=24), "--epochs", 2, "--no-eval", *SMALL, "--batch-size", 12)  # 4 updates each
    whole = torchrun(tmp_path, "--out", "whole", *common, processes=3)
    done = torchrun(tmp_path, "--out", "out", *common, processes=3, fault="is killed", update=5,
                    options=(*call, "--max-restarts", "3"))
    assert whole.code == done.code == 0, done.err
    assert "resuming at epoch 1, update 4" in done.out
    assert len(done.messages) == 1 and done.messages[0].startswith("error: another process is gone (noticed by "), done.err
    assert_same_state(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "out"))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_restart_by_torchrun_does_not_take_an_earlier_run_for_its_own(
        call: tuple[str, ...], image_folder: Callable[..., Path], tmp_path: Path) -> None:
    images = image_folder(per_class=12)
    assert trained(tmp_path, images, "--epochs", 1, options=call).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    done = trained(tmp_path, images, options=(*call, "--max-restarts", "1"))
    assert done.code == 1 and "resuming" not in done.out
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert len(done.messages) == 2 and all("out already holds a run (epoch 1/1) - add --resume" in line
                                           for line in done.messages), done.err


def test_one_process_goes_on_with_a_run_of_two_and_says_so(image_folder: Callable[..., Path], tmp_path: Path, capsys,
                                                           stopped_after: Callable[..., None]) -> None:
    out = tmp_path / "out"
    arguments = ["--data", image_folder(), "--out", out, "--epochs", 2, "--no-eval", *SMALL]
    stopped_after(3, *arguments)
    save_checkpoint(out, {**checkpoint(out), "world_size": 2})
    assert run(*arguments, "--resume") == 0
    assert "note: 2 -> 1 processes: every update uses the same images" in capsys.readouterr().out
    assert summary(out)["updates"] == 4 and summary(out)["world_size"] == 1


def test_check_ends_although_data_workers_live(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    done = trained(tmp_path, image_folder(), "--check", "--views", "cpu", "--workers", 1)
    assert done.code == 0 and done.out.count("nothing was trained") == 1 and not done.orphans


NODES = tuple(f"byol{number}-{os.getpid()}" for number in (1, 2))  # the suite may run twice at once


@pytest.fixture
def two_nodes() -> Iterator[None]:
    """Two network namespaces with addresses of their own, 10.77.0.1 and 10.77.0.2, joined by a cable."""
    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def remove() -> None:
        for node in NODES:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", node], capture_output=True)

    try:
        for node in NODES:
            ip("netns", "add", node)
        ip("link", "add", "cable1", "netns", NODES[0], "type", "veth", "peer", "name", "cable2", "netns", NODES[1])
        for number, node in enumerate(NODES, 1):
            ip("-n", node, "addr", "add", f"10.77.0.{number}/24", "dev", f"cable{number}")
            ip("-n", node, "link", "set", f"cable{number}", "up")
            ip("-n", node, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        remove()
        pytest.skip(f"network namespaces cannot be made here: {error}")
    yield
    remove()


def on_two_nodes(folder: Path, images: Path, fault: str = "pass", timeout: int = 600) -> list[Finished]:
    """The main job, started by a torchrun on each node, each in a folder of its own."""
    def node(number: int) -> Finished:
        place = folder / f"node{number}"
        place.mkdir()
        return torchrun(place, "--data", images, "--out", "out", "--epochs", 2, "--no-eval", *SMALL, fault=fault, options=(
            "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-id", "test",
            "--rdzv-conf", f"is_host={int(number == 1)}", "--local-addr", f"10.77.0.{number}"), processes=1,
            namespace=NODES[number - 1], env={"GLOO_SOCKET_IFNAME": f"cable{number}", "BYOL_TIMEOUT_S": str(timeout)})

    with ThreadPoolExecutor() as pool:
        return list(pool.map(node, (1, 2)))


def test_two_nodes_train_together(two_nodes: None, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    first, second = on_two_nodes(tmp_path, image_folder())
    assert first.code == second.code == 0, first.err + second.err
    assert summary(tmp_path / "node1" / "out")["world_size"] == 2 and not (tmp_path / "node2" / "out").exists()
    assert "report: out/report.html" in first.out and second.out == ""


def test_a_node_whose_power_fails_ends_the_run(two_nodes: None, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Nobody is told: the cable goes dead before the processes do."""
    fault = "os.system('ip link set cable2 down'); [os.kill(pid, signal.SIGKILL) for pid in (starter, os.getpid())]"
    first, second = on_two_nodes(tmp_path, image_folder(), fault, timeout=15)
    assert second.code == -signal.SIGKILL
    assert first.code == 1 and len(first.messages) == 1, first.err
    assert first.messages[0].startswith("error: another process has not answered for 15 s (noticed by rank 0 of 2): ")
    assert summary(tmp_path / "node1" / "out")["reason"] == first.messages[0].removeprefix("error: ")
