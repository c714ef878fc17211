"""Trials as a sweep gives them, from bowls whose minima are known."""

import numpy as np

from depthnet.sweep.optima import SKEW
from depthnet.sweep.study import Member, Network, SweepSettings, Trial

GRID = tuple(float(x) for x in range(-13, -3))


def grid(settings: SweepSettings) -> list[tuple[float, float, float]]:
    """Every (log2_lr, log2_block_multiplier, weight_decay) of a study without ranges."""
    return [
        (lr, multiplier, decay)
        for lr in settings.log2_lr
        for multiplier in settings.log2_block_multiplier
        for decay in settings.weight_decay
    ]


def rise(u, skew: float = SKEW):
    """The log of the loss of a bowl, u octaves from its minimum, with c2 = 1; see optima.Bowl."""
    return (np.exp(skew * u) - 1 - skew * u) / skew**2 if skew else u * u / 2


def trial(network: Network, member: Member, losses: np.ndarray) -> Trial:
    losses = losses.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        losses[bad[0] :] = np.nan
    diverged_at = int(bad[0]) if len(bad) else None
    return Trial(network, member, losses, 0.5 * network.depth, 1e9 * network.depth, diverged_at)


def bowls(
    settings: SweepSettings,
    optimum,
    *,
    least=lambda network: 2.0,
    bend: float = 0.14,
    skew: float = SKEW,
    apart: float = 0.0,
    noise: float = 0.0,
    generator: int = 0,
    candidates=grid,
    diverges=lambda network, member: False,
    finished=lambda network, member: True,
) -> list[Trial]:
    """Log losses log least(network) + bend rise(log2_lr - optimum(network) - shift of the seed) + noise.

    bend: the default is that of text at depth 8. apart: standard deviation of the seeds' shifts. noise:
    of a step's log loss, common to all learning rates of a seed; a quarter of it is each trial's own.
    """
    rng, found = np.random.default_rng(generator), []
    for network in settings.networks:
        shifts = rng.normal(0, apart, settings.seeds) if apart else np.zeros(settings.seeds)
        common = rng.normal(0, noise, (settings.seeds, settings.steps))
        for candidate in candidates(settings):
            for seed in range(settings.seeds):
                member = Member(*candidate, seed)
                off = member.log2_lr - optimum(network) - shifts[seed]
                own = rng.normal(0, noise / 4, settings.steps)
                with np.errstate(over="ignore"):  # then it has diverged
                    log = bend * rise(off, skew) + common[seed] + own
                    losses = (least(network) * np.exp(log)).astype(np.float32)
                if diverges(network, member):
                    losses[settings.steps // 3 :] = np.nan
                if finished(network, member):
                    found.append(trial(network, member, losses))
    return found
