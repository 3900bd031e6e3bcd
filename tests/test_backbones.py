"""torchvision models as feature extractors, the small-image stem, what is refused, and the memory that they take."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models

from byol_core.backbones import build_backbone, check_backbone
from tests.helpers.forking import REPOSITORY, call

# The input width of each model's classifier, from torchvision's own definitions.
DIMENSIONS = {"resnet18": 512, "resnet50": 2048, "mobilenet_v3_small": 1024, "efficientnet_v2_s": 1280, "convnext_tiny": 768,
              "densenet121": 1024, "densenet201": 1920, "vgg19_bn": 4096, "regnet_y_400mf": 440, "regnet_y_8gf": 2016,
              "shufflenet_v2_x0_5": 1024, "mnasnet1_3": 1280}
FAMILIES = {re.split(r"_|\d", name)[0]: name for name in sorted(models.list_models(module=models))}  # one of each


@pytest.mark.parametrize("name", sorted({*FAMILIES.values(), *DIMENSIONS}))
def test_every_family_of_torchvisions_is_served_or_refused_by_name(name: str) -> None:
    size = 96 if name.startswith("inception") else 224 if name == "maxvit_t" else 64
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # RegNets compute their widths with tensors
        try:
            backbone, dimension = build_backbone(name, image_size=size)
        except ValueError as error:
            assert name.startswith("squeezenet") and f"arch '{name}' does not end in a linear layer" in str(error)
            return
        features = backbone.eval()(torch.empty(2, 3, size, size))
    assert features.shape == (2, dimension) and dimension == DIMENSIONS.get(name, dimension)


def test_weights_keep_torchvisions_names() -> None:
    backbone, _ = build_backbone("resnet18")
    missing, unexpected = models.resnet18().load_state_dict(backbone.state_dict(), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and unexpected == []


def test_small_stem_keeps_height_and_width() -> None:
    backbone, _ = build_backbone("resnet18", small_images=True)
    stem = nn.Sequential(backbone.conv1, backbone.bn1, backbone.relu, backbone.maxpool)
    assert stem(torch.rand(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    assert backbone.conv1.weight.shape == (64, 3, 3, 3)


def test_conv4_is_four_convolutions_with_pooling_in_between() -> None:
    torch.manual_seed(0)
    backbone, dimension = build_backbone("conv4")
    weights = [parameter for name, parameter in backbone.named_parameters() if name.startswith("conv")]
    assert dimension == 512 and [tuple(weight.shape) for weight in weights] == [
        (64, 3, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3), (512, 256, 3, 3)]
    expected = images = torch.rand(4, 3, 32, 32)
    for weight in weights:
        expected = nn.functional.conv2d(expected, weight, padding=1)
        pooled = weight is not weights[-1]
        if pooled:
            expected = nn.functional.max_pool2d(expected, 2)
        expected = (expected - expected.mean((0, 2, 3), keepdim=True)) / (
            expected.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        expected = (expected + (0.7 if pooled else 0.0)).relu()
    torch.testing.assert_close(backbone(images), expected.mean((2, 3)), rtol=1e-3, atol=1e-4)
    assert backbone.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 512)


@pytest.mark.parametrize("arguments, message", [
    (("resnet19",), "unknown arch 'resnet19' - did you mean resnet18?"),
    (("fcn_resnet50",), "unknown arch 'fcn_resnet50'"),  # a segmentation model
    (("squeezenet1_1",), "arch 'squeezenet1_1' does not end in a linear layer"),
    (("conv4", True), "--small-stem is for ResNets, and conv4 is made for small images - leave it out"),
    (("mnasnet0_5", True), "--small-stem is for ResNets, not for mnasnet0_5"),
])
def test_what_cannot_be_served_is_refused_by_name(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError) as error:
        build_backbone(*arguments)
    assert message in str(error.value)


def test_conv6_is_six_convolutions_and_takes_8_pixels() -> None:
    backbone, dimension = build_backbone("conv6")
    assert sum(isinstance(layer, nn.Conv2d) for layer in backbone.modules()) == 6
    check_backbone(backbone, dimension, 8)


def test_check_backbone_leaves_mode_and_statistics_alone() -> None:
    backbone, dimension = build_backbone("conv6")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    check_backbone(backbone, dimension, 8)
    assert backbone.training
    assert all(torch.equal(value, backbone.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("backbone, dimension, size, message", [
    (nn.Flatten(), 5, 8, "returns (192,) numbers an image, not (5,)"),
    (nn.Conv2d(3, 4, 9), 4, 8, "cannot take 8-pixel images"),
    (nn.Conv2d(1, 4, 3), 4, 8, "cannot take 8-pixel images"),
])
def test_a_backbone_that_does_not_fit_is_refused(backbone: nn.Module, dimension: int, size: int, message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_backbone(backbone, dimension, size)
    assert message in str(error.value)


def test_too_little_memory_for_an_image_is_not_taken_for_a_wrong_size() -> None:
    class Large(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 120000000000 bytes")

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        check_backbone(Large(), 8, 100_000)


@pytest.mark.slow
def test_memory_of_the_process_that_started_it_does_not_count() -> None:
    ballast = torch.ones(2**28)  # 1 GiB
    command = [sys.executable, "-c",
               "import torch; from byol_core.runtime import peak_memory; print(peak_memory(torch.device('cpu')))"]
    used = int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout)
    assert 2**26 < used < 4 * len(ballast)


@pytest.mark.slow
def test_check_predicts_the_peak_memory_of_a_run(tmp_path: Path) -> None:
    for number in range(24):
        Image.new("RGB", (48, 48), (number * 10, 90, 30)).save(tmp_path / f"{number:02d}.png")
    out = tmp_path / "out"
    words = [str(REPOSITORY / "train.py"), "--data", str(tmp_path), "--out", str(out), "--epochs", "3", "--batch-size", "12",
             "--no-eval", "--device", "cpu", "--workers", "0"]
    call("tests.helpers.forking:python", [[*words, "--check"], {}], tmp_path / "checked")
    call("tests.helpers.forking:python", [words, {}], tmp_path / "trained")
    checked = (tmp_path / "checked").read_text()
    predicted = int(re.search(r"; (\d+) MB of memory;", checked)[1])  # type: ignore[index]
    used = json.loads((tmp_path / "out" / "summary.json").read_text())["peak_memory_mb"]
    assert used == pytest.approx(predicted, rel=0.25)
