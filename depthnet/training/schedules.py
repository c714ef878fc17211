"""Learning rates in the course of training, by torch's own schedulers."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
)

SCHEDULES = ("constant", "linear", "cosine")


def schedule(
    optimizer: Optimizer, kind: str, steps: int, warmup: int = 0, final: float = 0.0
) -> LRScheduler:
    """A scheduler that rises for `warmup` steps, then follows a shape to the end of training.

    Step t of the warmup has the part (t + 1) / (warmup + 1) of the learning rate.

    Args:
        kind: `constant`; or `linear` or `cosine`, which fall to the part `final` after the last step.
        steps: of training, the warmup's among them; more than `warmup`.
    """
    falling = steps - warmup
    if kind == "constant":
        main = ConstantLR(optimizer, 1.0, 0)
    elif kind == "linear":
        main = LinearLR(optimizer, 1.0, final, falling)
    else:
        # torch asks for the least rate itself, which is the same for all groups.
        rate = max(group["lr"] for group in optimizer.param_groups)
        main = CosineAnnealingLR(optimizer, falling, eta_min=final * rate)
    if warmup == 0:
        return main
    rising = LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rising, main], [warmup])
