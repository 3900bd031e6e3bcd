"""The BYOL loss, and measures of feature health that need no labels."""

import torch
from torch import Tensor


def byol_loss(prediction: Tensor, projection: Tensor) -> Tensor:
    """mean over rows of 2 - 2 cos(prediction, projection); a float32 scalar in [0, 4].

    No gradient reaches projection. The arithmetic is float32 whatever autocast says, float64 for float64 inputs.
    A row whose norm is below 1e-6 (1e-3 for float16) is divided by that instead, so a zero row costs 2.
    prediction: (B, D) floating, output of the online predictor. projection: (B, D) floating, of the target projector.
    Returns: (), float32 (float64 if either input is); 0 for equal directions, 2 for orthogonal, 4 for opposite ones.
    Raises: ValueError for shapes that differ, are not 2-D or have no rows, and for inputs that are not floating.
    Source: Grill et al. 2020 (arXiv 2006.07733), equation 2; DeepMind's byol/utils/helpers.py, regression_loss, whose
    l2_normalize has the same 1e-6. BYOL's loss is the sum over both directions, in [0, 8].

    >>> views = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> byol_loss(views, 3 * views).item(), byol_loss(views, -views).item()
    (0.0, 4.0)
    """
    if prediction.shape != projection.shape:
        raise ValueError(f"byol_loss: prediction {tuple(prediction.shape)} and projection {tuple(projection.shape)} "
                         "must have the same shape (B, D)")
    _require_rows("byol_loss", "prediction", prediction, 1)
    _require_rows("byol_loss", "projection", projection, 1)
    with torch.autocast(prediction.device.type, enabled=False):
        cosine = (_unit_rows(prediction) * _unit_rows(projection.detach())).sum(1)  # (B,)
        return (2.0 - 2.0 * cosine.clamp(-1.0, 1.0)).mean()


@torch.no_grad()
def spread(features: Tensor) -> Tensor:
    """How far a batch of features is from collapse; about 1 when healthy, 0 when all rows agree.

    The standard deviation over the batch of each dimension of the l2-normalised rows, averaged over dimensions and
    multiplied by sqrt(D).
    features: (B, D) floating, B at least 2. Returns: () float32 in [0, 1].
    Raises: ValueError when features is not such a matrix.
    Source: Chen and He 2021 (SimSiam, arXiv 2011.10566), section 4.1.

    >>> spread(torch.ones(4, 8)).item()
    0.0
    """
    _require_rows("spread", "features", features, 2)
    with torch.autocast(features.device.type, enabled=False):
        rows = _unit_rows(features)
        return rows.std(0, correction=0).mean() * rows.shape[1] ** 0.5


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of the centred features: how many dimensions are in use.

    features: (B, D) floating, B at least 2. Returns: () float32 in [1, min(B - 1, D)], or 0 when all rows agree.
    Raises: ValueError when features is not such a matrix.
    Source: Roy and Vetterli 2007; Garrido et al. 2023 (RankMe, arXiv 2210.02885), equation 2, which does not centre.

    >>> corners = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> round(effective_rank(corners).item(), 4)
    2.0
    """
    _require_rows("effective_rank", "features", features, 2)
    with torch.autocast(features.device.type, enabled=False):
        rows = _at_least_float32(features)
        rows = rows / rows.abs().amax().clamp_min(torch.finfo(rows.dtype).tiny)
        values = torch.linalg.svdvals(rows - rows.mean(0))
        # Rows that agree leave rounding noise of full rank behind; it is not a dimension in use.
        noise = torch.linalg.vector_norm(rows) * torch.finfo(rows.dtype).eps * max(rows.shape) ** 0.5
        values = torch.where(values > noise, values, 0.0)
        total = values.sum()
        rank = torch.special.entr(values / total).sum().exp()
        return torch.where(total > 0, rank, 0.0)


@torch.no_grad()
def alignment(a: Tensor, b: Tensor) -> Tensor:
    """mean over rows of the squared distance between the l2-normalised pairs; 0 when the views agree, at most 4.

    a, b: (B, D) floating, row i of each is a view of image i. Returns: () float32 in [0, 4].
    Raises: ValueError for shapes that differ, are not 2-D or have no rows.
    Source: Wang and Isola 2020 (arXiv 2005.10242), equation 2 with alpha = 2.

    >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])).item()
    2.0
    """
    if a.shape != b.shape:
        raise ValueError(f"alignment: a {tuple(a.shape)} and b {tuple(b.shape)} must have the same shape (B, D)")
    _require_rows("alignment", "a", a, 1)
    _require_rows("alignment", "b", b, 1)
    with torch.autocast(a.device.type, enabled=False):
        return (_unit_rows(a) - _unit_rows(b)).square().sum(1).mean()


@torch.no_grad()
def uniformity(features: Tensor) -> Tensor:
    """log of the mean over distinct pairs of exp(-2 d^2), d the distance of the l2-normalised rows; lower is better.

    features: (B, D) floating, B at least 2; takes B x B memory. Returns: () float32; 0 when all rows agree, about
    -4 + 8 / D on an even sphere of many dimensions.
    Raises: ValueError when features is not such a matrix.
    Source: Wang and Isola 2020 (arXiv 2005.10242), equation 3 with t = 2.

    >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item()
    -8.0
    """
    _require_rows("uniformity", "features", features, 2)
    with torch.autocast(features.device.type, enabled=False):
        rows = _unit_rows(features)
        lengths = rows.square().sum(1)  # 1, or 0 for a zero row
        distances = lengths[:, None] + lengths[None, :] - 2.0 * rows @ rows.T  # (B, B), squared
        exponents = (-2.0 * distances).fill_diagonal_(-torch.inf)
        pairs = torch.tensor(float(rows.shape[0] * (rows.shape[0] - 1)), dtype=rows.dtype)
        return exponents.flatten().logsumexp(0) - pairs.log()


@torch.no_grad()
def mean_cosine(features: Tensor) -> Tensor:
    """mean cosine over distinct pairs of rows, in O(B D); 1 when all rows agree, about 0 when healthy.

    Zero rows count as orthogonal to all others: read it beside spread.
    features: (B, D) floating, B at least 2. Returns: () float32 in [-1, 1].
    Raises: ValueError when features is not such a matrix.

    >>> mean_cosine(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])).item()
    -1.0
    """
    _require_rows("mean_cosine", "features", features, 2)
    with torch.autocast(features.device.type, enabled=False):
        rows = _unit_rows(features)
        count = rows.shape[0]
        return (rows.sum(0).square().sum() - rows.square().sum()) / (count * (count - 1))


def _require_rows(function: str, name: str, features: Tensor, least: int) -> None:
    if features.ndim != 2 or features.shape[0] < least or features.shape[1] == 0:
        raise ValueError(f"{function}: {name} must be (B, D) with B at least {least} and D at least 1, "
                         f"got {tuple(features.shape)}")
    if not features.is_floating_point():
        raise ValueError(f"{function}: {name} must be floating, got {features.dtype}")


def _at_least_float32(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()


def _unit_rows(features: Tensor) -> Tensor:
    """Rows divided by max(norm, floor), with no overflow for huge rows and a bounded gradient for tiny ones."""
    floor = 1e-3 if features.dtype == torch.float16 else 1e-6  # the gradient, up to 2 / floor, must fit the dtype
    rows = _at_least_float32(features)
    scale = rows.detach().abs().amax(1, keepdim=True).clamp_min(floor)
    rows = rows / scale  # largest entry 1, unless the row is tiny: then its norm may stay below 1
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norm < 1.0, 1.0, norm)  # not clamp_min: at 1, the norm of a one-hot row, it has no gradient
