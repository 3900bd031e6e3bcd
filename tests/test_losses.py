"""byol_loss and the measures of feature health: known values and edges."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from byol_core.losses import alignment, byol_loss, effective_rank, mean_cosine, spread, uniformity

pytestmark = pytest.mark.usefixtures("seeded")
MEASURES = [spread, effective_rank, uniformity, mean_cosine]


def test_byol_loss_is_zero_for_equal_and_four_for_opposite_directions() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
    assert byol_loss(rows, 7 * rows).item() == pytest.approx(0.0, abs=1e-6)
    assert byol_loss(rows, -rows).item() == pytest.approx(4.0)
    assert byol_loss(rows, torch.tensor([[4.0, -3.0], [1.0, 0.0]])).item() == pytest.approx(2.0)


def test_byol_loss_is_not_below_zero_by_rounding() -> None:
    rows = torch.randn(1000, 64)
    assert min(byol_loss(row[None], 3 * row[None]).item() for row in rows) >= 0.0
    assert max(byol_loss(row[None], -3 * row[None]).item() for row in rows) <= 4.0


def test_byol_loss_equals_the_published_squared_distance_in_float64() -> None:
    p, z = torch.randn(64, 32), torch.randn(64, 32)
    p64, z64 = p.double(), z.double()
    distance = (p64 / p64.norm(dim=1, keepdim=True) - z64 / z64.norm(dim=1, keepdim=True)).square().sum(1).mean()
    assert byol_loss(p, z).item() == pytest.approx(distance.item(), rel=1e-6)


def test_byol_loss_passes_a_gradient_check_in_float64() -> None:
    p, z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda prediction: byol_loss(prediction, z), (p,))
    assert byol_loss(p, z).dtype == torch.float64


@pytest.mark.parametrize("row", [[3.0, 0.0, 0.0], [-2.0, 1e-5, 1e-5], [0.0, 1e-4, 5e3], [1e-3, 0.0, 0.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_byol_loss_gradient_of_rows_that_one_entry_dominates(row: list[float], dtype: torch.dtype) -> None:
    p, z = torch.tensor([row], dtype=dtype, requires_grad=True), torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype)
    byol_loss(p, z).backward()
    exact = p.detach().double().requires_grad_()
    (2 - 2 * F.cosine_similarity(exact, z.double())).sum().backward()
    assert p.grad is not None and exact.grad is not None
    torch.testing.assert_close(p.grad.double(), exact.grad, rtol=1e-5, atol=1e-6 * float(exact.grad.abs().max()))


def test_byol_loss_passes_no_gradient_to_the_projection() -> None:
    p, z = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    byol_loss(p, z).backward()
    assert z.grad is None and p.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_byol_loss_of_16_bit_inputs_is_computed_in_float32(dtype: torch.dtype) -> None:
    p, z = torch.randn(64, 32).to(dtype), torch.randn(64, 32).to(dtype)
    loss = byol_loss(p, z)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(byol_loss(p.double(), z.double()).item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_byol_loss_is_float32_whatever_autocast_says(dtype: torch.dtype) -> None:
    p, z = torch.randn(64, 32, requires_grad=True), torch.randn(64, 32)
    plain = byol_loss(p, z)
    with torch.autocast("cpu", dtype=dtype):
        loss = byol_loss(p, z)
    loss.backward()
    assert loss.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32
    assert loss.item() == plain.item()


def rows_at_the_edges(dtype: torch.dtype) -> Tensor:
    """Rows of two numbers each, from zero and the smallest to the largest of the type, with either sign, in random order."""
    lengths = [0.0, 1e-45, 1e-38, 1e-30, 1e-12, 1e-7, 1e-6, 1e-5, 1.0, 1e5, 1e19, 1e30, 3e38]
    rows = torch.tensor(list(itertools.product(lengths, repeat=2)), dtype=torch.float64)
    limit = torch.finfo(dtype).max
    signs = 2.0 * torch.randint(2, rows.shape) - 1.0
    return (signs * rows).clamp(-limit, limit).to(dtype)[torch.randperm(len(rows))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_byol_loss_and_its_gradient_are_finite_for_every_length(dtype: torch.dtype) -> None:
    for prediction, projection in zip(rows_at_the_edges(dtype), rows_at_the_edges(dtype)):
        p = prediction[None].requires_grad_()
        loss = byol_loss(p, projection[None])
        loss.backward()
        assert 0.0 <= loss.item() <= 4.0
        assert p.grad is not None and p.grad.isfinite().all()


def test_measures_stay_in_their_range_for_every_length() -> None:
    for a, b in zip(rows_at_the_edges(torch.float32).split(5), rows_at_the_edges(torch.float32).split(5)):
        assert 0.0 <= spread(a).item() <= 1.0 + 1e-5
        assert 0.0 <= effective_rank(a).item() <= 2.0 + 1e-5
        assert 0.0 <= alignment(a, b).item() <= 4.0 + 1e-5
        assert -8.0 - 1e-5 <= uniformity(a).item() <= 1e-5
        assert -1.0 - 1e-5 <= mean_cosine(a).item() <= 1.0 + 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_byol_loss_of_a_zero_row_is_two_with_a_finite_gradient(dtype: torch.dtype) -> None:
    p = torch.zeros(1, 2, dtype=dtype, requires_grad=True)
    loss = byol_loss(p, torch.tensor([[0.0, 5.0]], dtype=dtype))
    loss.backward()
    assert loss.item() == 2.0
    assert p.grad is not None and p.grad.isfinite().all() and p.grad[0, 1] < 0  # it moves towards the projection


@pytest.mark.parametrize("length", [1e-5, 1e-2, 1e2, 1e18, 1e30, 1e37])
def test_byol_loss_does_not_depend_on_length(length: float) -> None:
    p, z = torch.randn(8, 4), torch.randn(8, 4)
    assert byol_loss(p * length, z).item() == pytest.approx(byol_loss(p, z).item(), rel=1e-5)


def test_byol_loss_stays_nan_for_nan_inputs() -> None:
    """A broken batch must not look healthy."""
    p = torch.tensor([[math.nan, 1.0], [1.0, 0.0]])
    assert byol_loss(p, torch.ones(2, 2)).isnan()


@pytest.mark.parametrize(("p", "z", "message"), [
    ((4, 3), (5, 3), r"prediction \(4, 3\) and projection \(5, 3\) must have the same shape"),
    ((4, 3), (1, 3), "same shape"), ((4, 3), (4, 1), "same shape"), ((4,), (4,), "must be"),
    ((2, 4, 3), (2, 4, 3), "must be"),
    ((0, 3), (0, 3), "B at least 1"), ((3, 0), (3, 0), "D at least 1"), ((), (), "must be"),
])
def test_byol_loss_refuses_wrong_shapes(p: tuple[int, ...], z: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        byol_loss(torch.ones(p), torch.ones(z))


def test_byol_loss_refuses_integers() -> None:
    with pytest.raises(ValueError, match="projection must be floating, got torch.int64"):
        byol_loss(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.int64))


def test_spread_equals_values_worked_out_by_hand() -> None:
    # normalised rows (1, 0), (-1, 0), (0, 1), (0, -1): standard deviation sqrt(1/2) in both dimensions
    rows = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.0, -0.1]])
    assert spread(rows).item() == pytest.approx(1.0)
    # (1, 0), (0, 1): standard deviation 1/2 in both, times sqrt(2)
    assert spread(torch.eye(2)).item() == pytest.approx(math.sqrt(0.5))


def test_effective_rank_counts_the_directions_in_use() -> None:
    generator = torch.Generator().manual_seed(0)
    for rank in (1, 2, 5, 8):
        basis = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
        rows = torch.cat([basis[:rank], -basis[:rank]])  # rank equal singular values, mean zero
        assert effective_rank(rows + 3.0).item() == pytest.approx(rank, rel=1e-4)


def test_effective_rank_equals_the_formula_in_float64() -> None:
    rows = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 1, 20)
    values = torch.linalg.svdvals(rows.double() - rows.double().mean(0))
    shares = values / values.sum()
    assert effective_rank(rows).item() == pytest.approx(math.exp(-(shares * shares.log()).sum().item()), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4, 1e30])
def test_effective_rank_of_collapsed_features_is_zero(scale: float) -> None:
    row = torch.randn(1, 128, generator=torch.Generator().manual_seed(0)) * scale
    assert effective_rank(row.expand(256, 128)).item() == 0.0


def test_alignment_equals_values_worked_out_by_hand() -> None:
    a, b = torch.tensor([[3.0, 4.0], [0.0, 2.0]], requires_grad=True), torch.tensor([[4.0, 3.0], [0.0, -1.0]])
    assert alignment(a, b).item() == pytest.approx((2 - 48 / 25 + 4) / 2)
    assert alignment(a, 5 * a).item() == 0.0 and not alignment(a, b).requires_grad


def test_uniformity_equals_the_published_code() -> None:
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    published = torch.pdist(F.normalize(rows.double(), dim=1)).pow(2).mul(-2).exp().mean().log()
    assert uniformity(rows).item() == pytest.approx(published.item(), rel=1e-5)


def test_mean_cosine_equals_the_mean_over_pairs() -> None:
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    unit = F.normalize(rows.double(), dim=1)
    cosines = unit @ unit.T
    expected = (cosines.sum() - cosines.trace()) / (20 * 19)
    assert mean_cosine(rows).item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("measure", "equal", "zero"), [
    (spread, 0.0, 0.0), (effective_rank, 0.0, 0.0), (uniformity, 0.0, 0.0), (mean_cosine, 1.0, 0.0),
])
def test_measures_of_rows_that_are_equal_and_of_rows_that_are_zero(
        measure: Callable[[Tensor], Tensor], equal: float, zero: float) -> None:
    assert measure(torch.randn(1, 128).expand(64, 128)).item() == pytest.approx(equal, abs=1e-5)
    assert measure(torch.zeros(64, 128)).item() == zero


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_measures_are_detached_float32_scalars_whatever_autocast_says(
        measure: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    rows = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    plain = measure(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = measure(rows)
    assert value.shape == () and value.dtype == torch.float32 and not value.requires_grad
    assert value.item() == plain.item() == pytest.approx(measure(rows.double()).item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("shape", [(1, 8), (0, 8), (8,), (2, 3, 4), (4, 0)])
def test_measures_refuse_what_is_not_a_batch_of_rows(
        measure: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"{measure.__name__}: features must be"):
        measure(torch.ones(shape))


def test_alignment_refuses_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"a \(4, 3\) and b \(1, 3\)"):
        alignment(torch.ones(4, 3), torch.ones(1, 3))
