"""A trained backbone is found in a run folder, its export or its checkpoints, or what is amiss is named."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from byol_core.pretrained import load_pretrained
from byol_core.run.options import TrainConfig
from byol_core.run.plan import make_plan
from byol_core.run.setup import new_model
from byol_core.system.files import read_checkpoint
from byol_core.views.pixels import Facts
from tests.helpers.runs import changed_copy


@pytest.mark.parametrize("source", ["", "backbone.pt", "last.pt", "previous.pt"])
def test_a_backbone_is_found_in_the_run_its_export_and_its_checkpoints(trained: Path, source: str) -> None:
    found = load_pretrained(trained / source)
    state = read_checkpoint(trained / (source if source == "previous.pt" else "last.pt"))["model"]
    assert isinstance(state, dict)
    for name, tensor in found.backbone.state_dict().items():
        assert torch.equal(tensor, state[f"online.backbone.{name}"])
    assert (found.arch, found.feature_dim, found.seed, found.recipe.size) == ("conv6", 128, 3, 16)
    assert not found.backbone.training


def test_the_export_says_all_that_the_checkpoint_knows(trained: Path) -> None:
    export, checkpoint = load_pretrained(trained / "backbone.pt"), load_pretrained(trained / "last.pt")
    for field in ("mean", "std", "size", "interpolation"):
        assert getattr(export.recipe, field) == getattr(checkpoint.recipe, field)
    assert (export.recipe.crop_scale is None) == (checkpoint.recipe.crop_scale is None)
    about = json.loads((trained / "backbone.json").read_text())
    digest = subprocess.run(["sha256sum", trained / "backbone.pt"], capture_output=True, text=True).stdout.split()[0]
    assert about["sha256"] == digest and about["feature_dim"] == 128 and about["seed"] == 3


def test_the_target_network_comes_from_the_checkpoint_only(trained: Path, tmp_path: Path) -> None:
    state = read_checkpoint(trained / "last.pt")["model"]
    assert isinstance(state, dict)
    for source in (trained, trained / "last.pt"):
        weight = load_pretrained(source, "target").backbone.state_dict()["conv1.weight"]
        assert torch.equal(weight, state["target.backbone.conv1.weight"])
        assert not torch.equal(weight, state["online.backbone.conv1.weight"])
    with pytest.raises(ValueError, match="holds the online network only - give the run folder or its last.pt"):
        load_pretrained(trained / "backbone.pt", "target")
    for name in ("backbone.pt", "backbone.json"):
        shutil.copy(trained / name, tmp_path)
    with pytest.raises(ValueError, match="has no last.pt, which alone holds the target"):
        load_pretrained(tmp_path, "target")


def test_the_untrained_network_is_the_one_the_run_began_with(trained: Path) -> None:
    config = TrainConfig(arch="conv6", image_size=16, batch_size=12, hidden_dim=16, projection_dim=8, seed=3)
    started = new_model(config, make_plan(config, Facts(36, 16))).online.backbone.state_dict()
    before = torch.get_rng_state()
    for name, tensor in load_pretrained(trained).untrained().state_dict().items():
        assert torch.equal(tensor, started[name])
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_loaded_is_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        load_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="has no backbone.pt or last.pt"):
        load_pretrained(tmp_path)
    shutil.copy(trained / "backbone.pt", tmp_path)
    with pytest.raises(ValueError, match="has no backbone.json beside it"):
        load_pretrained(tmp_path / "backbone.pt")
    (tmp_path / "backbone.json").write_text('{"arch": "conv6"}')
    with pytest.raises(ValueError, match="backbone.json does not describe a backbone .KeyError: 'network'"):
        load_pretrained(tmp_path)
    other = changed_copy(trained, tmp_path / "other", lambda tensor: tensor + 1)
    shutil.copy(trained / "backbone.pt", other)
    with pytest.raises(ValueError, match="is not the file that backbone.json describes"):
        load_pretrained(other)
