"""How sparse a model is at each point of training."""

from __future__ import annotations

from hfshrink.errors import SettingError

SCHEDULES = ("cubic", "linear", "one-shot", "iterative")


def sparsity_at(
    progress: float,
    sparsity: float,
    schedule: str = "cubic",
    *,
    initial_sparsity: float = 0.0,
    warmup: float = 0.0,
    cooldown: float = 0.0,
    rounds: int = 4,
) -> float:
    """The sparsity s at a point of training: sᵢ in the warm-up, exactly s_f from the cool-down on.

    With x the share of the way between warm-up and cool-down:

    * "cubic": s = s_f + (sᵢ − s_f)(1 − x)³ (Zhu and Gupta 2017, arXiv:1710.01878)
    * "linear": s = sᵢ + (s_f − sᵢ)x
    * "one-shot": s_f as soon as the warm-up has ended
    * "iterative": in `rounds` jumps, each followed by recovery; each takes the same share of what is left, so that
      1 − s falls geometrically (Frankle and Carbin 2019, arXiv:1803.03635)

    Args:
        progress: Share of training that is done, 0 to 1.
        sparsity: s_f, the share that is removed in the end.
        schedule: One of `SCHEDULES`.
        initial_sparsity: sᵢ.
        warmup: Share of training at the start that keeps sᵢ.
        cooldown: Share of training at the end that keeps s_f.
        rounds: Jumps of "iterative"; the first when the warm-up ends, the last when the cool-down begins.

    Raises:
        SettingError: Unknown schedule.

    Example:
        >>> [round(sparsity_at(progress, 0.8), 2) for progress in (0.0, 0.5, 1.0)]
        [0.0, 0.7, 0.8]
        >>> [round(sparsity_at(p, 0.75, "iterative", cooldown=0.2, rounds=2), 2) for p in (0.0, 0.7, 0.8)]
        [0.5, 0.5, 0.75]
    """
    if schedule not in SCHEDULES:
        raise SettingError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}.")
    if progress >= 1 - cooldown:
        return sparsity
    if progress < warmup:
        return initial_sparsity
    x = 1.0 if schedule == "one-shot" else (progress - warmup) / (1 - cooldown - warmup)
    if schedule == "cubic":
        return sparsity + (initial_sparsity - sparsity) * (1 - x) ** 3
    if schedule == "iterative":
        done = 1 + int(x * (rounds - 1) + 1e-9)
        return 1 - (1 - initial_sparsity) * ((1 - sparsity) / (1 - initial_sparsity)) ** (done / rounds)
    return sparsity if x >= 1 else initial_sparsity + (sparsity - initial_sparsity) * x
