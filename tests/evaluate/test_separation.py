"""The label-free score: against Wilks' lambda by hand and by NumPy, and that it knows learned features from others."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from byol_core.evaluate.separation import PAIRS, SAMPLE, SeparationScorer, retrieval, separation
from byol_core.images.image_set import scan
from byol_core.runtime import Runtime
from byol_core.views.batches import DeviceBatches, Order
from byol_core.views.pixels import load_images
from byol_core.views.recipes import paper_recipes


def wilks(features: np.ndarray, ridge: float) -> float:
    """Minus the logarithm of det W / det(W + B), in float64, image by image."""
    rows = features.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
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
    features = features.astype(np.float32)
    found = separation(torch.from_numpy(features), ridge)
    assert found.dtype == torch.float64 and found.item() == pytest.approx(wilks(features, ridge), rel=1e-9, abs=1e-12)


def test_separation_is_0_where_all_images_are_alike() -> None:
    assert separation(torch.rand(1, 4, 8).expand(30, -1, -1)).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("features", [torch.rand(4, 3), torch.rand(1, 4, 3), torch.rand(4, 1, 3),
                                      torch.ones(4, 4, 3, dtype=torch.int64)])
@pytest.mark.parametrize("score", [separation, retrieval])
def test_what_has_no_images_and_views_is_refused(score: Callable[[torch.Tensor], torch.Tensor],
                                                 features: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=f"{score.__name__}: features must be floating"):
        score(features)


def test_retrieval_by_hand() -> None:
    """Three images whose centre is 0, two of which have changed places in the second view: one of three is found."""
    first = torch.tensor([[-3.0, 1.0], [-1.0, -1.0], [4.0, 0.0]])
    second = first[[1, 0, 2]]
    assert retrieval(torch.stack([first, second], dim=1)).item() == pytest.approx(1 / 3)
    assert retrieval(torch.stack([first, first], dim=1)).item() == 1
    three_and_a_half = torch.stack([first, second, first, first, second], dim=1)  # the last view has no partner
    assert retrieval(three_and_a_half).item() == pytest.approx((1 / 3 + 1) / 2)


def test_retrieval_is_scikit_learns_nearest_neighbour() -> None:
    generator = np.random.default_rng(0)
    features = 5 + generator.normal(size=(40, 1, 6)) + generator.normal(size=(40, 4, 6))
    rows = features - features.reshape(-1, 6).mean(0)
    expected = []
    for view in (0, 2):
        neighbours = KNeighborsClassifier(1, metric="cosine", algorithm="brute").fit(rows[:, view + 1], np.arange(40))
        expected.append(neighbours.score(rows[:, view], np.arange(40)))
    found = retrieval(torch.from_numpy(features)).item()
    assert found == pytest.approx(np.mean(expected)) and 0.1 < found < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("images, batch, measured", [(41, 4, 40), (300, 256, SAMPLE)])
def test_what_is_measured_are_eight_different_views_of_each_image_of_a_fixed_sample(images: int, batch: int, measured: int,
                                                                                    image_folder: Callable[..., Path]) -> None:
    data = load_images(scan(image_folder(classes=0, per_class=images)), "device", torch.device("cpu"), lambda line: None)[0]

    def views_of(order: Order) -> DeviceBatches:
        return DeviceBatches(data, paper_recipes(16), order)

    scorer = SeparationScorer(views_of, Order(images, batch, seed=3), Runtime("cpu"))
    order = scorer.order
    assert len(order) * order.batch_size == measured and order.epoch(0).unique().numel() == measured
    assert torch.equal(order.epoch(0), order.epoch(1))

    class AtOnce(Order):
        """In one batch, as views depend on the image alone."""

        def epoch(self, epoch: int) -> torch.Tensor:
            return order.epoch(0).flatten()[None]

    at_once = views_of(AtOnce(images, measured, seed=order.seed))
    views = [view.flatten(1) for pair in range(PAIRS) for both in at_once.epoch(pair) for view in both]
    assert len({round(float(view.sum()), 3) for view in views}) == 2 * PAIRS
    assert scorer.quick(torch.nn.Flatten()) == pytest.approx(float(separation(torch.stack(views, dim=1))), rel=1e-6)
