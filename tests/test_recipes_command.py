"""`python -m tests.bench.recipes`: that a variant changes what it names, and a run of it at small scale."""

import contextlib
import json
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from byol_core.evaluate import probes
from byol_core.networks import BYOL
from byol_core.run.options import TrainConfig
from byol_core.run.plan import make_plan
from byol_core.views.pixels import Facts
from tests.bench import recipes
from tests.bench.recipes import Variant, begun, change_network, config_of, grown, parse_variant, plan_of, view_of

FACTS = Facts(1000, 32)


def variant(text: str) -> Variant:
    return parse_variant(f"name: {text}")


@pytest.mark.parametrize("text, said", [("x: speed=3", "no field speed"), (": lr=1", "has no name"), ("x: lr", "no value")])
def test_what_is_no_variant_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_variant(text)


def test_options_of_the_command_and_fields_of_the_plan_are_set(tmp_path: Path) -> None:
    changed = variant("lr=0.3 batch_size=32 small_stem=true arch=resnet18 predictor_lr=3 tau_schedule=constant")
    config = config_of(changed, tmp_path, tmp_path / "out", 4)
    assert (config.lr, config.batch_size, config.small_stem, config.seed, config.eval) == (0.3, 32, True, 4, False)
    plan = plan_of(changed, config, FACTS, 3200)
    assert (plan.predictor_lr, plan.tau_schedule, plan.total_updates, plan.small_stem) == (3.0, "constant", 100, True)
    assert config_of(variant("small_stem=false"), tmp_path, tmp_path, 0).small_stem is False


def test_views_are_changed_together_or_each() -> None:
    views = make_plan(TrainConfig(), FACTS).views
    changed = variant("crop_scale=0.3..0.9 blur=0.5/0.1 solarize=0 flip=0 colour=0.5")
    for number, view in enumerate(views):
        found = view_of(changed, number, view)
        assert found.crop_scale == (0.3, 0.9) and found.blur == (0.5, 0.1)[number]
        assert (found.solarize, found.flip, found.grey) == (0, 0, view.grey)
        assert (found.brightness, found.contrast, found.saturation, found.hue) == (0.2, 0.2, 0.1, 0.05)
    assert view_of(variant("hue=0.3"), 0, views[0]).hue == 0.3
    assert view_of(variant(""), 1, views[1]) == views[1]


def test_views_grow_evenly_to_the_recipes_own() -> None:
    view = replace(make_plan(TrainConfig(), FACTS).views[0], size=24, crop_scale=(0.2, 1.0))
    growing = variant("from_size=16 from_crop=0.6 from_colour=0")
    assert [grown(growing, view, share).size for share in (0.0, 0.3, 0.5, 0.99, 1.0)] == [16, 20, 20, 24, 24]
    assert grown(growing, view, 0.5).crop_scale == pytest.approx((0.4, 1.0))
    assert grown(growing, view, 0.25).hue == pytest.approx(view.hue / 4) and grown(growing, view, 1.0) == view
    assert grown(variant(""), view, 0.5) == view


def test_an_epoch_has_the_views_of_its_place_in_the_run(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    image_folder("set/train", classes=2, per_class=12)
    options = Namespace(images=tmp_path / "set", out=tmp_path / "out", minutes=None, updates=24)
    changed = variant("arch=conv6 image_size=16 batch_size=6 hidden_dim=16 projection_dim=8 from_size=8")
    with contextlib.ExitStack() as stack:
        run = begun(changed, 0, options, stack)
        sizes = [next(run.batches.epoch(epoch))[0].shape[-1] for epoch in (0, 3, 5)]  # of 6: 4 updates in each
        run.data.views.close()
    assert sizes == [8, 12, 16]


def test_networks_are_changed_before_training() -> None:
    from torchvision.models import resnet18

    network = resnet18()
    change_network(variant("bn_momentum=0.03 zero_init=true"), network)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.03}
    zero = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)
            and not module.weight.any()]
    assert zero == [f"layer{layer}.{block}.bn2" for layer in (1, 2, 3, 4) for block in (0, 1)]


def test_small_crops_are_predicted_as_the_view_they_are_of(small_byol: BYOL) -> None:
    """Crops of a whole view are the view; smaller ones are seen by the online network alone."""
    view1, view2 = torch.randn(2, 4, 3, 8, 8)
    small_byol.eval()
    plain = small_byol(view1, view2)
    change_network(variant("small_crops=2 small_size=8"), small_byol)
    crops = small_byol(view1, view2)
    assert all(torch.equal(many, one.repeat(3, 1)) for many, one in zip(crops, plain))
    small_byol.forward = type(small_byol).forward.__get__(small_byol)
    seen: list[torch.Size] = []
    small_byol.online.register_forward_hook(lambda module, views, out: seen.append(views[0].shape[-2:]))
    change_network(variant("small_crops=1 small_size=6"), small_byol)
    small_byol(view1, view2)
    assert sorted(map(tuple, seen)) == [(6, 6), (6, 6), (8, 8), (8, 8)]


@pytest.mark.slow
def test_a_table_with_what_was_gained(image_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probes, "DRAWS", 2)
    image_folder("set/train", classes=2, per_class=12)
    image_folder("set/test", classes=2, per_class=6)
    small = "arch=conv6 image_size=16 batch_size=4 hidden_dim=16 projection_dim=8"
    words = ["recipes", "--images", "set", "--updates", "3", "--seeds", "2", f"as it is: {small}",
             f"other: {small} lr=0.01 small_crops=1 small_size=8"]
    monkeypatch.setattr(sys, "argv", [*words, "--json", "out.json"])
    recipes.main()
    lines = [json.loads(line) for line in Path("runs/recipes/set/results.jsonl").read_text().splitlines()]
    assert [(line["name"], line["seed"]) for line in lines] == [("as it is", 0), ("as it is", 1), ("other", 0), ("other", 1)]
    assert all(line[""]["updates"] == 3 and 0 <= line[""]["kNN 20"] <= 100 for line in lines)
    table = json.loads(Path("out.json").read_text())["section"]
    cells = {row.split("|")[1].strip(): row for row in table.splitlines() if row.startswith("|")}
    assert {"as it is", "as it is, target", "other", "other, target", "raw pixels at 16", "untrained conv6 at 16, seed 0",
            "untrained conv6 at 16, seed 1"} < cells.keys()
    assert re.search(r"\d+\.\d ± \d+\.\d \([+-]\d+\.\d\)", cells["as it is"]) and "a fifth of train/" in table
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("last.pt")}
    assert len(before) == 4
    monkeypatch.setattr(sys, "argv", [*words, "--final"])
    recipes.main()  # what is there is not trained again
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs").rglob("last.pt")}
    assert "Measured on test/" in capsys.readouterr().out
