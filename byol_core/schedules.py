"""Quantities that follow the number of applied updates and nothing else."""

import math


def cosine_tau(step: float, max_steps: float, base: float) -> float:
    """tau = 1 - (1 - base) * (1 + cos(pi * step / max_steps)) / 2; base at 0, exactly 1 from max_steps on.

    step: updates applied so far, from 0; below 0 counts as 0, above max_steps as max_steps.
    max_steps: updates of the whole run, above 0. With 1 the only update, step 0, uses base.
    base: tau of the first update, in [0, 1].
    Returns: a value in [base, 1] that never decreases with step.
    Raises: ValueError when an argument is not finite, max_steps is not positive or base lies outside [0, 1].
    Source: Grill et al. 2020 (arXiv 2006.07733), section 3.2; DeepMind's byol/utils/schedules.py, target_ema.

    >>> [cosine_tau(step, 4, 0.5) for step in (0, 2, 4, 5)]
    [0.5, 0.75, 1.0, 1.0]
    """
    _require_finite("cosine_tau", step=step, max_steps=max_steps, base=base)
    if max_steps <= 0:
        raise ValueError(f"cosine_tau: max_steps must be positive, got {max_steps}; pass the updates of the whole run")
    if not 0.0 <= base <= 1.0:
        raise ValueError(f"cosine_tau: base must be in [0, 1], got {base}")
    base = float(base)
    if step <= 0:
        return base
    if step >= max_steps:
        return 1.0
    tau = 1.0 - (1.0 - base) * (1.0 + math.cos(math.pi * step / max_steps)) / 2.0
    return float(max(base, tau))  # 1 - (1 - 0.1) rounds to below 0.1


def warmup_cosine(step: float, max_steps: float, warmup_steps: float, base: float, final: float = 0.0) -> float:
    """Linear from 0 at step 0 to base at warmup_steps, then a half cosine down to final at max_steps.

    step: updates applied so far, from 0; below 0 counts as 0, above max_steps as max_steps.
    max_steps: updates of the whole run, above 0. warmup_steps: in [0, max_steps]; 0 starts at base.
    base, final: the peak and the last value, often learning rates.
    Raises: ValueError when an argument is not finite, max_steps is not positive or warmup_steps lies outside
    [0, max_steps].
    Source: DeepMind's byol/utils/schedules.py, learning_schedule; final is added here, 0 there.

    >>> [warmup_cosine(step, 6, 2, 0.4) for step in (0, 1, 2, 4, 6)]
    [0.0, 0.2, 0.4, 0.2, 0.0]
    """
    _require_finite("warmup_cosine", step=step, max_steps=max_steps, warmup_steps=warmup_steps, base=base, final=final)
    if max_steps <= 0:
        raise ValueError(f"warmup_cosine: max_steps must be positive, got {max_steps}")
    if not 0 <= warmup_steps <= max_steps:
        raise ValueError(f"warmup_cosine: warmup_steps must be in [0, max_steps = {max_steps}], got {warmup_steps}")
    step = max(step, 0)
    if step >= max_steps:
        return float(final)
    if step < warmup_steps:
        return base * step / warmup_steps
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return final + (base - final) * (1.0 + math.cos(math.pi * progress)) / 2.0


def scaled_lr(base: float, batch_size: int) -> float:
    """base * batch_size / 256: the linear scaling rule for a learning rate given per 256 images.

    Raises: ValueError when base is not finite or batch_size is not positive.
    Source: Grill et al. 2020, section 3.3.

    >>> scaled_lr(0.2, 4096)
    3.2
    """
    _require_finite("scaled_lr", base=base, batch_size=batch_size)
    if batch_size <= 0:
        raise ValueError(f"scaled_lr: batch_size must be positive, got {batch_size}")
    return base * batch_size / 256


def due(step: int, every: int, total: int) -> bool:
    """True when step is a multiple of every, and on the last step.

    step: updates applied so far, 1 to total. every: at least 1. total: updates of the whole run.
    Raises: ValueError when every is below 1.

    >>> [step for step in range(1, 8) if due(step, 3, 7)]
    [3, 6, 7]
    """
    if every < 1:
        raise ValueError(f"due: every must be at least 1, got {every}")
    return step % every == 0 or step == total


def _require_finite(function: str, **values: float) -> None:
    for name, value in values.items():
        try:
            finite = math.isfinite(value)
        except OverflowError:  # an integer beyond the range of floats
            finite = False
        if not finite:
            raise ValueError(f"{function}: {name} must be finite, got {value}")
