"""Recomputed activations: the same training in less memory."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from byol_core.backbones import build_backbone, recompute_blocks
from byol_core.networks import BYOL
from byol_core.training import train

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name,blocks", [("resnet18", 8), ("resnet50", 16), ("vit_b_16", 12), ("convnext_tiny", 18)])
def test_blocks_are_those_of_torchvision(name: str, blocks: int) -> None:
    with torch.device("meta"):
        network = torchvision.models.get_model(name)
    names = list(network.state_dict())
    assert recompute_blocks(network) == blocks and list(network.state_dict()) == names


def test_a_network_without_blocks_stays_as_it_is() -> None:
    assert recompute_blocks(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())) == 0


def test_training_is_the_same_to_the_last_bit_statistics_included() -> None:
    """Both views pass through the same blocks before the backward pass, so statistics must not be counted twice."""
    torch.manual_seed(0)
    model = BYOL(*build_backbone("resnet18", small_images=True), hidden_dim=16, out_dim=8)
    other = copy.deepcopy(model)
    assert recompute_blocks(other.online.backbone) == 8
    views = [(torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)) for _ in range(2)]
    for network in (model, other):
        train(network, views, 1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_memory_of_the_process_that_started_it_does_not_count() -> None:
    ballast = torch.ones(2**28)  # 1 GiB
    script = "import torch; from byol_core.runtime import peak_memory; print(peak_memory(torch.device('cpu')))"
    used = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT).stdout)
    assert 2**26 < used < 4 * len(ballast)


@pytest.mark.slow
def test_it_takes_less_memory() -> None:
    script = """
import sys, torch
from byol_core.backbones import build_backbone
from byol_core.runtime import peak_memory
from byol_core.backbones import recompute_blocks
from byol_core.networks import BYOL
from byol_core.training import train
model = BYOL(*build_backbone("resnet50"), hidden_dim=64, out_dim=32)
if sys.argv[1] == "less":
    recompute_blocks(model.online.backbone)
before = peak_memory(torch.device("cpu"))
train(model, [(torch.randn(32, 3, 96, 96),) * 2], 1)
print(peak_memory(torch.device("cpu")) - before)
"""
    used = {way: int(subprocess.run([sys.executable, "-c", script, way], check=True, capture_output=True, text=True).stdout)
            for way in ("less", "all")}
    assert used["less"] < 0.7 * used["all"], used


@pytest.mark.slow
def test_check_predicts_the_peak_memory_of_a_run(tmp_path: Path) -> None:
    for number in range(24):
        Image.new("RGB", (48, 48), (number * 10, 90, 30)).save(tmp_path / f"{number:02d}.png")
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "train.py"), "--data", str(tmp_path), "--out", str(out), "--epochs", "3",
               "--batch-size", "12", "--no-eval", "--device", "cpu", "--workers", "0"]
    checked = subprocess.run([*command, "--check"], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    predicted = int(re.search(r"; (\d+) MB of memory;", checked)[1])  # type: ignore[index]
    used = json.loads((tmp_path / "out" / "summary.json").read_text())["peak_memory_mb"]
    assert used == pytest.approx(predicted, rel=0.25)
