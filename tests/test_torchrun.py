"""The main job in several processes: one set of files, the same weights everywhere, and every way in which one may fail."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.torchrun import REPOSITORY, SMALL, Finished, torchrun, watched

pytestmark = pytest.mark.slow
AFTER_FAULT_S = 30.0  # a fault comes within a second of the first update, so what a run lasts is its start and its end
START_S = 45.0  # of the interpreter, torch and the meeting, in several processes on two busy cores


def summary(folder: Path, name: str = "out") -> dict[str, object]:
    return json.loads((folder / name / "summary.json").read_text())


def weights(folder: Path, name: str = "out") -> dict[str, torch.Tensor]:
    return torch.load(folder / name / "last.pt", weights_only=True)["model"]


def trained(folder: Path, images: Path, *more: object, **options) -> Finished:
    return torchrun(folder, "--data", images, "--out", "out", "--epochs", 2, "--no-eval", *SMALL, *more, **options)


@pytest.mark.parametrize("processes", [2, 4])
def test_ends_with_one_set_of_files(processes: int, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    batch = ("--batch-size", 12)  # in as many parts
    done = torchrun(tmp_path, "--data", image_folder(), "--out", "out", "--epochs", 1, *SMALL, *batch, processes=processes)
    assert done.code == 0 and not done.orphans, done.err
    result = summary(tmp_path)
    assert result["status"] == "finished" and result["world_size"] == processes and result["updates"] == 1
    assert result["knn"] is not None and done.out.count("data: 16 images") == 1 and done.out.count("\ntrained: knn") == 1
    lines = [json.loads(line)["update"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault,message", [
    ("raises", "error: rank {rank} of 2: the dog ate it"),
    ("is killed", "error: rank {rank} of 2 is gone: killed, out of memory, or cut off"),
    ("hangs", "error: rank {rank} of 2 is stuck: nothing has moved there for "),
])
def test_a_process_that_fails_is_named_once_and_ends_the_run(fault: str, message: str, rank: int, tmp_path: Path,
                                                             image_folder: Callable[..., Path]) -> None:
    done = trained(tmp_path, image_folder(), fault=fault, rank=rank, stuck=20.0 if rank else 4.0)
    assert done.code == 1 and done.seconds < START_S + AFTER_FAULT_S and not done.orphans
    assert len(done.messages) == 1 and done.messages[0].startswith(message.format(rank=rank)), done.err
    if rank == 1:
        assert summary(tmp_path)["status"] == "failed" and summary(tmp_path)["reason"] in done.messages[0]


def test_a_frozen_process_is_named_and_killed_by_torchrun(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Which asks it to stop first, and waits 30 seconds for an answer."""
    done = trained(tmp_path, image_folder(), fault="freezes", stuck=4.0)
    assert done.code == 1 and done.seconds < START_S + 2 * AFTER_FAULT_S and not done.orphans
    assert done.messages == ["error: rank 1 of 2 is silent: frozen, or cut off"], done.err
    assert summary(tmp_path)["status"] == "failed" and summary(tmp_path)["reason"] in done.messages[0]


BUSY = "from byol_core.outcome import Outcome\nOutcome.{} = lambda outcome: time.sleep(600)"  # and so in no exchange
LATER = "import threading; threading.Timer(2, os.kill, ({}, signal.{})).start()"


@pytest.mark.parametrize("does, how", [("measure_on_the_way", "silent: frozen, or cut off"),
                                       ("finish", "gone: killed, out of memory, or cut off")])
def test_a_process_killed_while_the_first_one_is_busy_is_named(does: str, how: str, image_folder: Callable[..., Path],
                                                               tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--data", image_folder(), "--out", "out", "--epochs", 1, *SMALL, "--eval-every", 1, update=1,
                    fault=LATER.format("os.getpid()", "SIGKILL"), setup=BUSY.format(does))
    assert done.code == 1 and done.seconds < START_S + AFTER_FAULT_S and not done.orphans
    assert done.messages == [f"error: rank 1 of 2 is {how}"], done.err
    assert summary(tmp_path)["status"] == "failed" and summary(tmp_path)["reason"] in done.messages[0]


def test_a_signal_to_all_while_the_first_one_is_busy_is_a_stop(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--data", image_folder(), "--out", "out", "--epochs", 1, *SMALL, update=2,
                    fault=LATER.format("os.getppid()", "SIGTERM"), setup=BUSY.format("finish"))
    assert done.code == 1 and not done.messages and not done.orphans, done.err
    assert done.out.count(": stopped at epoch 1") == 1 and summary(tmp_path)["status"] == "stopped"


def test_sigterm_to_one_process_stops_all_after_the_same_update(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    images = image_folder(per_class=24)
    done = trained(tmp_path, images, fault="gets SIGTERM")
    assert "SIGTERM to rank 1: stopped at epoch 0, update 5" in done.out and not done.messages and not done.orphans
    assert summary(tmp_path)["status"] == "stopped"
    assert "<pre>torchrun --nproc-per-node=2 train.py --data" in (tmp_path / "out" / "report.html").read_text()
    again = trained(tmp_path, images, "--resume")
    whole = torchrun(tmp_path, "--data", images, "--out", "whole", "--epochs", 2, "--no-eval", *SMALL)
    assert again.code == whole.code == 0
    assert all(torch.equal(tensor, weights(tmp_path, "whole")[name]) for name, tensor in weights(tmp_path).items())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_torchrun_saves_once(name: str, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    """As from a terminal, whose Ctrl-C may reach the processes themselves, and then once more through torchrun."""
    fault = f"os.kill(os.getpid(), signal.{name}); os.kill(os.getppid(), signal.{name})"
    done = trained(tmp_path, image_folder(per_class=24), "--epochs", 4000, fault=fault)
    assert done.code == 1 and done.out.count(": stopped at epoch") == 1 and f"\n{name}" in done.out
    assert (tmp_path / "out" / "last.pt").exists() and not done.messages and not done.orphans
    assert summary(tmp_path)["status"] == "stopped"


def test_processes_with_different_images_are_refused(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    image_folder("rank0")
    (image_folder("rank1") / "class0" / "000.png").unlink()
    driver = tmp_path / "both.py"
    driver.write_text(f"import os, sys\nsys.path.insert(0, {str(REPOSITORY)!r})\nimport train\n"
                      "sys.exit(train.main(['--data', 'rank' + os.environ['RANK'], *sys.argv[1:]]))")
    done = watched([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(driver),
                    "--out", "out", "--epochs", "1", *SMALL], tmp_path, 120.0)
    assert done.code == 1 and "exitcode  : 2" in done.err and not done.orphans
    assert len(done.messages) == 1 and "images differ: 16 in rank 0, 15 in rank 1" in done.messages[0]


def test_a_restart_by_torchrun_resumes_bit_for_bit(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    """With three processes, whose sums depend on the places that DistributedDataParallel gives to gradients."""
    common = ("--data", image_folder(per_class=24), "--epochs", 2, "--no-eval", *SMALL, "--batch-size", 12)  # 4 updates each
    whole = torchrun(tmp_path, "--out", "whole", *common, processes=3)
    done = torchrun(tmp_path, "--out", "out", *common, processes=3, fault="is killed", update=5,
                    options=("--standalone", "--max-restarts", "3"))
    assert whole.code == done.code == 0, done.err
    assert "resuming at epoch 1, update 4" in done.out
    assert all(torch.equal(tensor, weights(tmp_path, "whole")[name]) for name, tensor in weights(tmp_path).items())


def test_one_process_goes_on_with_a_run_of_two_and_says_so(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    images = image_folder(per_class=16)
    assert "SIGTERM to rank 1" in trained(tmp_path, images, fault="gets SIGTERM").out
    done = watched([sys.executable, str(REPOSITORY / "train.py"), "--data", str(images), "--out", "out", "--epochs", "2",
                    "--no-eval", *SMALL, "--resume"], tmp_path, 120.0)
    assert done.code == 0 and "note: 2 -> 1 processes: every update uses the same images" in done.out
    assert summary(tmp_path)["updates"] == 8 and summary(tmp_path)["world_size"] == 1


def test_a_batch_that_does_not_divide_is_refused_with_numbers(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    done = trained(tmp_path, image_folder(), "--batch-size", 7)
    assert done.code == 1 and len(done.messages) == 1
    assert re.search("rank [01] of 2: --batch-size 7 does not divide into 1 micro-batches on 2 processes", done.messages[0])


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "RANK", "nobody else comes"])
def test_a_stale_environment_ends_at_once_or_after_the_meeting_time(missing: str, image_folder: Callable[..., Path],
                                                                    tmp_path: Path) -> None:
    env = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    env.pop(missing, None)
    driver = tmp_path / "driver.py"
    driver.write_text(f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\nimport train\nfrom byol_core import processes\n"
                      "processes.MEETING_S = 1.0\nsys.exit(train.main(sys.argv[1:]))")
    done = watched([sys.executable, str(driver), "--data", str(image_folder()), "--out", "out", *SMALL], tmp_path, 60.0, env)
    assert done.code == 2 and len(done.err.splitlines()) == 1 and "unset WORLD_SIZE" in done.err


def test_check_ends_although_data_workers_live(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    done = trained(tmp_path, image_folder(), "--check", "--views", "cpu", "--workers", 1, timeout=100.0)
    assert done.code == 0 and done.out.count("nothing was trained") == 1 and not done.orphans


def test_processes_whose_torchrun_is_gone_save_and_stop(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    done = trained(tmp_path, image_folder(per_class=24), "--epochs", 4000, fault="os.kill(os.getppid(), signal.SIGKILL)",
                   patience=30.0)
    assert done.code == -signal.SIGKILL and not done.orphans
    assert summary(tmp_path)["status"] == "stopped" and (tmp_path / "out" / "last.pt").exists()


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


def on_two_nodes(folder: Path, images: Path, fault: str = "pass", **options: float) -> list[Finished]:
    """The main job, started by a torchrun on each node, each in a folder of its own."""
    def node(number: int) -> Finished:
        place = folder / f"node{number}"
        place.mkdir()
        return torchrun(place, "--data", images, "--out", "out", "--epochs", 2, "--no-eval", *SMALL, fault=fault, options=(
            "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-id", "test",
            "--rdzv-conf", f"is_host={int(number == 1)}", "--local-addr", f"10.77.0.{number}"), processes=1,
            before=("ip", "netns", "exec", NODES[number - 1]), env={"GLOO_SOCKET_IFNAME": f"cable{number}"}, **options)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(node, (1, 2)))


def test_two_nodes_train_together(two_nodes: None, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    first, second = on_two_nodes(tmp_path, image_folder())
    assert first.code == second.code == 0, first.err + second.err
    assert summary(tmp_path / "node1")["world_size"] == 2 and not (tmp_path / "node2" / "out").exists()
    assert "report: out/report.html" in first.out and second.out == ""


def test_a_node_that_is_cut_off_is_named(two_nodes: None, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    first, second = on_two_nodes(tmp_path, image_folder(), "os.system('ip link set cable2 down')", timeout=90.0, stuck=4.0)
    assert first.code == 1 and first.messages == ["error: rank 1 of 2 is silent: frozen, or cut off"], first.err
    assert summary(tmp_path / "node1")["reason"] == "rank 1 of 2 is silent: frozen, or cut off"
