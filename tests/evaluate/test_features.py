"""Embeddings of a frozen backbone, and their split."""

import numpy as np
import pytest
import torch
from torch import nn

from byol_core.evaluate.features import Features, NonFiniteFeaturesError, embed, split


def test_embed_runs_in_eval_mode_without_gradients_and_restores_the_mode() -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.5))
    images = torch.rand(5, 3, 2, 2)
    before = backbone[1].running_mean.clone()
    features = embed(backbone, [images[:3], images[3:]])
    assert torch.allclose(features, images.flatten(1) / (1 + 1e-5) ** 0.5)
    assert features.dtype == torch.float32 and not features.requires_grad
    assert backbone.training and torch.equal(backbone[1].running_mean, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_embed_takes_loaders_with_labels_and_gives_float32_on_the_cpu(dtype: torch.dtype) -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3, 2)).to(dtype)
    images = torch.rand(4, 3, 1, 1, dtype=dtype)
    features = embed(backbone, [(images, torch.zeros(4))])
    assert features.dtype == torch.float32 and features.device.type == "cpu"
    assert torch.allclose(features, backbone(images).float(), atol=1e-6)


def test_embed_names_what_is_not_finite_and_refuses_nothing_at_all() -> None:
    images = torch.zeros(4, 3, 1, 1)
    images[2] = torch.nan
    with pytest.raises(NonFiniteFeaturesError, match=r"1 of 4 embeddings are not finite \(first: row 2\)"):
        embed(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), [images])
    with pytest.raises(ValueError, match="no images"):
        embed(nn.Linear(1, 1), [])


def test_split_holds_out_a_fifth_of_every_class() -> None:
    features = Features(torch.rand(100, 2), torch.arange(100) % 4)
    fit, test = split(features)
    assert len(fit) == 80 and len(test) == 20 and not set(fit) & set(test)
    assert torch.bincount(features.y[test]).tolist() == [5, 5, 5, 5]
    assert np.array_equal(split(features)[1], test)


def test_split_leaves_out_single_images_and_needs_two_classes() -> None:
    fit, test = split(Features(torch.rand(9, 2), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])))
    assert 8 not in fit and 8 not in test
    with pytest.raises(ValueError, match="at least 2 classes"):
        split(Features(torch.rand(5, 2), torch.tensor([0, 0, 0, 0, 1])))
