"""Trials as a sweep gives them, from parabolas whose minima are known."""

import math

import numpy as np

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


def trial(network: Network, member: Member, losses: np.ndarray) -> Trial:
    losses = losses.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        losses[bad[0] :] = np.nan
    diverged_at = int(bad[0]) if len(bad) else None
    return Trial(network, member, losses, 0.5 * network.depth, 1e9 * network.depth, diverged_at)


def parabolas(
    settings: SweepSettings,
    optimum,
    *,
    floor: float = 2.0,
    curvature: float = 0.02,
    apart: float = 0.0,
    noise: float = 0.0,
    generator: int = 0,
    candidates=grid,
    diverges=lambda network, member: False,
    finished=lambda network, member: True,
) -> list[Trial]:
    """Losses floor + curvature (log2_lr - optimum(network) - shift of the seed)^2 + noise.

    apart: standard deviation of the seeds' shifts. noise: of a step's loss, common to all learning rates
    of a seed; a quarter of it is each trial's own.
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
                losses = floor + curvature * off**2 + common[seed] + own
                if diverges(network, member):
                    losses[settings.steps // 3 :] = math.nan
                if finished(network, member):
                    found.append(trial(network, member, losses))
    return found
