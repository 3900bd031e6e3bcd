"""The label-free score: against Wilks' lambda by hand and by NumPy, and that it knows learned features from others."""

import numpy as np
import pytest
import torch

from byol_core.separation import separation


def wilks(features: np.ndarray, ridge: float) -> float:
    """Minus the logarithm of det W / det(W + B), in float64, image by image."""
    rows = features / np.linalg.norm(features, axis=2, keepdims=True)
    images, views, dimensions = rows.shape
    within, between = ridge * np.eye(dimensions), np.zeros((dimensions, dimensions))
    centre = rows.reshape(-1, dimensions).mean(0)
    for image in rows:
        between += np.outer(image.mean(0) - centre, image.mean(0) - centre) / (images - 1)
        within += np.cov(image, rowvar=False) / images
    return float(-np.log(np.linalg.det(within) / np.linalg.det(within + between)))


@pytest.mark.parametrize("shape", [(2, 2, 3), (20, 4, 6), (12, 3, 1), (5, 9, 8)])
@pytest.mark.parametrize("ridge", [1e-4, 0.1])
def test_separation_is_minus_the_log_of_wilks_lambda(shape: tuple[int, int, int], ridge: float) -> None:
    generator = np.random.default_rng(0)
    features = 1 + generator.normal(size=(shape[0], 1, shape[2])) + 0.3 * generator.normal(size=shape)
    found = separation(torch.from_numpy(features), ridge)
    assert found.dtype == torch.float64 and found.item() == pytest.approx(wilks(features, ridge), rel=1e-9, abs=1e-12)


def test_separation_by_hand() -> None:
    """Two images whose two views agree, at right angles: W is 0, and B has 1 along the line between them."""
    features = torch.tensor([[[2.0, 0.0], [5.0, 0.0]], [[0.0, 1.0], [0.0, 3.0]]])
    assert separation(features, ridge=0.5).item() == pytest.approx(np.log(0.5 * 1.5) - np.log(0.5 * 0.5), rel=1e-12)


def test_separation_is_0_where_all_images_are_alike_and_blind_to_length_and_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 1, 8, generator=generator) + 0.2 * torch.randn(30, 4, 8, generator=generator)
    assert separation(features[:1].expand(30, -1, -1)).item() == pytest.approx(0, abs=1e-9)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    lengths = 1 + torch.rand(30, 4, 1, generator=generator)
    for other in (features @ rotation, features * lengths):
        assert separation(other).item() == pytest.approx(separation(features).item(), rel=1e-5)


def test_separation_grows_with_closer_views_and_with_the_directions_in_which_images_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(64, 1, 16, generator=generator), torch.randn(64, 4, 16, generator=generator)
    of_noise = [separation(images + scale * noise).item() for scale in (0.1, 0.3, 1.0)]
    assert of_noise == sorted(of_noise, reverse=True)
    few = images.clone()
    few[..., 2:] = 0.0  # a dimensional collapse
    assert separation(few + 0.1 * noise).item() < 0.5 * of_noise[0]


@pytest.mark.parametrize("features", [torch.rand(4, 3), torch.rand(1, 4, 3), torch.rand(4, 1, 3),
                                      torch.ones(4, 4, 3, dtype=torch.int64)])
def test_separation_refuses_what_has_no_images_and_views(features: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="separation: features must be floating"):
        separation(features)
