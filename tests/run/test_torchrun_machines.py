"""The main job on two machines, each with a torchrun of its own: network namespaces that a cable joins."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from byol_core.images.image_set import scan
from byol_core.views.batches import Order
from tests.helpers.runs import assert_same_state, checkpoint, summary
from tests.helpers.torchrun import GONE, IMPATIENT, NO_ANSWER, Finished, trained

pytestmark = pytest.mark.slow

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


def on_two_nodes(folder: Path, images: Path, *more: object, per_node: int = 1, options: tuple[str, ...] = (),
                 timeout: int = 600, rank: int = 1, **fault) -> list[Finished]:
    """The main job, started by a torchrun on each node, each in a folder of its own. rank: of the process that has a fault."""
    def node(number: int) -> Finished:
        place = folder / f"node{number}"
        place.mkdir(exist_ok=True)
        meeting = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-id", "test",
                   "--rdzv-conf", f"is_host={int(number == 1)}", "--local-addr", f"10.77.0.{number}")
        return trained(place, images, *more, processes=per_node, rank=rank, namespace=NODES[number - 1],
                       options=(*meeting, *options), **fault,
                       env={"GLOO_SOCKET_IFNAME": f"cable{number}", "BYOL_TIMEOUT_S": str(timeout)})

    with ThreadPoolExecutor() as pool:
        return list(pool.map(node, (1, 2)))


def out_of(folder: Path) -> Path:
    """The run folder, which the first node alone has."""
    assert not (folder / "node2" / "out").exists()
    return folder / "node1" / "out"


@pytest.mark.parametrize("per_node", [1, 2])
def test_two_nodes_train_together(per_node: int, two_nodes: None, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    first, second = on_two_nodes(tmp_path, image_folder(per_class=12), per_node=per_node)
    assert first.code == second.code == 0, first.err + second.err
    assert summary(out_of(tmp_path))["world_size"] == 2 * per_node
    assert "report: out/report.html" in first.out and second.out == ""


def test_a_node_whose_power_fails_ends_the_run(two_nodes: None, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Nobody is told: the cable goes dead before the processes do."""
    fault = "os.system('ip link set cable2 down'); [os.kill(pid, signal.SIGKILL) for pid in (starter, os.getpid())]"
    first, second = on_two_nodes(tmp_path, image_folder(per_class=12), fault=fault, timeout=15)
    assert second.code == -signal.SIGKILL
    assert first.code == 1 and len(first.messages) == 1, first.err
    assert first.messages[0].startswith(f"{NO_ANSWER}0 of 2): ")
    assert summary(out_of(tmp_path))["reason"] == first.messages[0].removeprefix("error: ")


@pytest.mark.parametrize("fault, message", [("raises", "error: rank 1 of 2: the dog ate it"),
                                            ("is killed", f"{GONE}0 of 2): "), ("hangs", f"{NO_ANSWER}0 of 2): ")])
def test_a_process_of_another_node_that_fails_is_told_once(fault: str, message: str, two_nodes: None,
                                                           image_folder: Callable[..., Path], tmp_path: Path) -> None:
    first, second = on_two_nodes(tmp_path, image_folder(per_class=12), fault=fault, timeout=15 if fault == "hangs" else 600,
                                 setup=IMPATIENT if fault == "is killed" else "")
    assert first.code == second.code == 1 and not first.orphans + second.orphans
    messages = first.messages + second.messages
    assert len(messages) == 1 and messages[0].startswith(message), first.err + second.err
    assert summary(out_of(tmp_path))["status"] == "failed"
    assert messages[0].startswith(f"error: {summary(out_of(tmp_path))['reason']}")


@pytest.mark.parametrize("fault, message", [("raises", "error: rank 0 of 2: the dog ate it"),
                                            ("is killed", f"{GONE}1 of 2): ")])
def test_a_process_of_the_node_that_has_the_store_is_told_once(fault: str, message: str, two_nodes: None,
                                                               image_folder: Callable[..., Path], tmp_path: Path) -> None:
    first, second = on_two_nodes(tmp_path, image_folder(per_class=12), fault=fault, rank=0,
                                 setup=IMPATIENT if fault == "is killed" else "")
    assert first.code == second.code == 1 and not first.orphans + second.orphans
    messages = first.messages + second.messages
    assert len(messages) == 1 and messages[0].startswith(message), first.err + second.err
    # Who writes it cannot say that it was killed.
    assert summary(out_of(tmp_path))["status"] == ("running" if fault == "is killed" else "failed")


@pytest.mark.parametrize("whom", ["os.getpid()", "starter"], ids=["process", "torchrun"])
def test_sigterm_on_another_node_stops_all_and_saves_once(whom: str, two_nodes: None, image_folder: Callable[..., Path],
                                                          tmp_path: Path) -> None:
    first, second = on_two_nodes(tmp_path, image_folder(per_class=24), "--epochs", 4000,
                                 fault=f"os.kill({whom}, signal.SIGTERM)")
    assert first.code == second.code == 1 and not first.messages + second.messages, first.err + second.err
    assert first.out.count("SIGTERM to rank 1: stopped at epoch") == 1 and not first.orphans + second.orphans
    assert summary(out_of(tmp_path))["status"] == "stopped" and checkpoint(out_of(tmp_path))["world_size"] == 2


def test_processes_whose_torchrun_on_another_node_is_gone_save_and_stop(two_nodes: None, image_folder: Callable[..., Path],
                                                                        tmp_path: Path) -> None:
    first, second = on_two_nodes(tmp_path, image_folder(per_class=24), "--epochs", 4000,
                                 fault="os.kill(starter, signal.SIGKILL)")
    assert first.code == 1 and second.code == -signal.SIGKILL and not first.orphans + second.orphans
    assert not first.messages + second.messages, first.err + second.err
    assert summary(out_of(tmp_path))["status"] == "stopped" and (out_of(tmp_path) / "last.pt").exists()


def test_a_restart_on_two_nodes_resumes_bit_for_bit(two_nodes: None, image_folder: Callable[..., Path], tmp_path: Path,
                                                    undisturbed: Callable[[int], dict]) -> None:
    """As two processes of one machine."""
    done = on_two_nodes(tmp_path, image_folder(per_class=24), fault="is killed", setup=IMPATIENT, update=5,
                        options=("--max-restarts", "3"))
    assert [finished.code for finished in done] == [0, 0], [vars(finished) for finished in done]
    assert "resuming at epoch 1, update 4" in done[0].out
    messages = done[0].messages + done[1].messages
    assert len(messages) == 1 and messages[0].startswith(GONE), messages
    assert_same_state(undisturbed(2), checkpoint(out_of(tmp_path)))


def test_a_restart_on_two_nodes_does_not_take_an_earlier_run_for_its_own(two_nodes: None, image_folder: Callable[..., Path],
                                                                         tmp_path: Path) -> None:
    images = image_folder(per_class=12)
    assert [finished.code for finished in on_two_nodes(tmp_path, images, "--epochs", 1)] == [0, 0]
    before = {path: path.read_bytes() for path in out_of(tmp_path).iterdir()}
    done = on_two_nodes(tmp_path, images, options=("--max-restarts", "1"))
    assert [finished.code for finished in done] == [1, 1] and "resuming" not in done[0].out
    assert {path: path.read_bytes() for path in out_of(tmp_path).iterdir()} == before
    messages = done[0].messages + done[1].messages
    assert messages and all("out already holds a run (epoch 1/1) - add --resume" in line for line in messages), messages


def test_a_process_of_another_node_that_stalls_is_waited_for(two_nodes: None, image_folder: Callable[..., Path],
                                                             tmp_path: Path, undisturbed: Callable[[int], dict]) -> None:
    done = on_two_nodes(tmp_path, image_folder(per_class=24), fault="time.sleep(3)")
    assert [finished.code for finished in done] == [0, 0], [vars(finished) for finished in done]
    assert not done[0].messages + done[1].messages
    assert_same_state(undisturbed(2), checkpoint(out_of(tmp_path)))


def test_a_bad_file_that_another_node_meets_is_known_to_the_first(two_nodes: None, image_folder: Callable[..., Path],
                                                                  tmp_path: Path) -> None:
    images = image_folder(per_class=24)
    index = int(Order(48, 12, rank=1, world_size=2).epoch(0)[0, 0])
    name = scan(images).name(index)
    (images / name).write_bytes(b"torn")
    first, second = on_two_nodes(tmp_path, images, "--views", "cpu", "--epochs", 1)
    assert first.code == second.code == 0, first.err + second.err
    assert name in (out_of(tmp_path) / "bad_files.txt").read_text() and summary(out_of(tmp_path))["bad_files"] == 1


def test_nodes_with_different_images_are_refused(two_nodes: None, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    (image_folder("node1/images", per_class=12) / "class0" / "000.png").unlink()
    image_folder("node2/images", per_class=12)
    first, second = on_two_nodes(tmp_path, Path("images"))
    assert first.code == second.code == 1 and not first.orphans + second.orphans
    messages = first.messages + second.messages
    assert len(messages) == 1 and "images differ: 23 in rank 0, 24 in rank 1" in messages[0], first.err + second.err
