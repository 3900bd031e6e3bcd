"""Heads, online and target networks: structure, wiring and initialisation."""

import pytest
import torch
from torch import nn

from byol_core.networks import BYOL, OnlineNetwork, TargetNetwork, mlp_head
from tests.helpers.modules import small_backbone


def test_mlp_head_is_linear_batch_norm_relu_linear() -> None:
    head = mlp_head(5, 7, 3)
    assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [p.shape for p in head.parameters()] == [(7, 5), (7,), (7,), (7,), (3, 7), (3,)]


def test_heads_default_to_the_papers_widths() -> None:
    model = BYOL(small_backbone(), 4)
    assert model.online.projector[0].weight.shape == (4096, 4) and model.online.projector[3].weight.shape == (256, 4096)
    assert model.online.predictor[0].weight.shape == (4096, 256) and model.online.predictor[3].weight.shape == (256, 4096)


def test_forward_gives_each_views_prediction_and_the_targets_projection_which_has_no_predictor(small_byol: BYOL) -> None:
    small_byol.eval()
    online, target = small_byol.online, small_byol.target
    views = torch.rand(2, 3, 3, 8, 8)
    p1, p2, z1, z2 = small_byol(*views)
    for view, prediction, target_projection in zip(views, (p1, p2), (z1, z2)):
        projection = online.projector(online.backbone(view))
        assert torch.equal(prediction, online.predictor(projection))
        assert torch.equal(target_projection, projection)  # equal weights at the start
    assert not hasattr(target, "predictor")


def test_batch_statistics_are_those_of_one_view(small_byol: BYOL) -> None:
    """Two views of very different brightness: were they concatenated, the running mean would be updated once."""
    view1, view2 = torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 8, 8)
    for network in (small_byol.online, small_byol.target):
        assert network.backbone[1].num_batches_tracked == 0
    small_byol(view1, view2)
    for network in (small_byol.online, small_byol.target):
        assert network.backbone[1].num_batches_tracked == 2


def test_target_starts_equal_frozen_and_apart(small_byol: BYOL) -> None:
    online, target = small_byol.online.state_dict(), small_byol.target.state_dict()
    assert target and all(torch.equal(online[name], value) for name, value in target.items())
    assert all(online[name].data_ptr() != value.data_ptr() for name, value in target.items())
    assert not any(p.requires_grad for p in small_byol.target.parameters())
    assert all(p.requires_grad for p in small_byol.online.parameters())


def test_initialize_copies_weights_and_buffers_and_freezes() -> None:
    torch.manual_seed(1)
    online = OnlineNetwork(small_backbone(), mlp_head(4, 8, 6), mlp_head(6, 8, 6))
    online(torch.rand(4, 3, 8, 8))  # moves the running statistics
    target = TargetNetwork(small_backbone(), mlp_head(4, 8, 6))
    target.backbone.requires_grad_(True)
    target.initialize(online)
    own = target.state_dict()
    assert all(torch.equal(own[name], online.state_dict()[name]) for name in own)
    assert own["backbone.1.num_batches_tracked"] == 1
    assert not any(p.requires_grad for p in target.parameters())


def test_initialize_refuses_networks_that_differ_and_changes_nothing() -> None:
    online = OnlineNetwork(small_backbone(), mlp_head(4, 8, 6), mlp_head(6, 8, 6))
    target = TargetNetwork(small_backbone(), mlp_head(4, 9, 6))
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match="projector.0.weight"):
        target.initialize(online)
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_module_with_any_number_of_channels_is_a_backbone(channels: int) -> None:
    backbone = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1))  # (B, 4, 1, 1), flattened for it
    p1, p2, z1, z2 = BYOL(backbone, 4, hidden_dim=8, out_dim=6)(*torch.rand(2, 3, channels, 8, 8))
    assert p1.shape == p2.shape == z1.shape == z2.shape == (3, 6)
