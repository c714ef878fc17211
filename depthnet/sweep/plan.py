"""Which trials a study consists of, and which of them train as one population.

All of it is a function of the settings and of finished trials: every worker finds the same jobs.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import product

import numpy as np

from depthnet._checks import optional_import
from depthnet.data import Dataset
from depthnet.sweep.ledger import search_distribution
from depthnet.sweep.optima import final_loss
from depthnet.sweep.study import (
    Job,
    Member,
    Network,
    SweepSettings,
    Trial,
    memory_bytes,
)

FLOAT = 4  # bytes


def parameters(network: Network, data: Dataset) -> int:
    """The number of weights of a network."""
    n = network.width
    return n * (data.in_features + network.depth * n + data.out_features)


def member_bytes(network: Network, settings: SweepSettings, data: Dataset) -> int:
    """What a member of a population takes in training: weights, gradients and two moments; of every
    layer its input and its gradient; what the loss and the optimizer's copies hold for a while."""
    rows, n = settings.batch, network.width
    activations = rows * (2 * network.depth * n + 4 * n + 4 * data.out_features)
    inputs = rows * (data.active_features or data.in_features) * 2
    return FLOAT * (4 * parameters(network, data) + activations + inputs)


def step_flops(network: Network, settings: SweepSettings, data: Dataset) -> float:
    """Of one training step of one network: a multiply-add is two; products of weights, forward,
    and twice backward (the gradient of the input once, for the first layer not at all)."""
    n, rows = network.width, settings.batch
    blocks_and_output = 6 * n * (network.depth * n + data.out_features)
    inputs = 4 * n * (data.active_features or data.in_features)
    return float(rows * (blocks_and_output + inputs))


def work(network: Network) -> float:
    """The time of a training step, in proportion: input, output and loss take as long as eight layers."""
    return (network.depth + 8.0) * network.width**2


def work_of_study(settings: SweepSettings) -> float:
    """The work of all trials of a study, each of which counts as its network's."""
    networks = settings.networks
    return sum(map(work, networks)) * settings.planned / len(networks)


def jobs(
    settings: SweepSettings, data: Dataset, finished: Mapping[str, Mapping[int, Trial]]
) -> list[Job]:
    """The jobs that are known so far, finished ones among them, those that take longest first.

    A grid's are all known at once; a search's next round is when the last one is finished.
    """
    found = []
    for network in settings.networks:
        for number, members in enumerate(_rounds(settings, data, network, finished)):
            found += _split(settings, data, network, number, members)
    # Many workers end together when the long jobs are not left to the end.
    return sorted(found, key=lambda job: -work(job.network))


def unfinished(job: Job, finished: Mapping[str, Mapping[int, Trial]]) -> bool:
    return len(finished.get(job.name, ())) < len(job.members)


def _rounds(settings, data, network, finished) -> Iterator[tuple[Member, ...]]:
    """The members of each round of a network."""
    if settings.sampler == "grid":
        yield _members(
            settings,
            product(settings.log2_block_multiplier, settings.weight_decay, settings.log2_lr),
        )
        return
    known: list[Trial] = []
    for number in range(math.ceil(settings.trials / settings.round)):
        suggested = _suggestions(settings, network, number, _judged(settings, known))
        members = _members(settings, suggested)
        yield members
        for job in _split(settings, data, network, number, members):
            if unfinished(job, finished):
                return
            known += [finished[job.name][index] for index in range(len(job.members))]


def _members(settings, candidates) -> tuple[Member, ...]:
    """Every candidate (log2_block_multiplier, weight_decay, log2_lr) with every seed."""
    listed = list(candidates)
    return tuple(
        Member(log2_lr, multiplier, decay, seed)
        for seed in range(settings.seeds)
        for multiplier, decay, log2_lr in listed
    )


def _split(settings, data, network, number, members) -> list[Job]:
    """Populations that fit into memory, as even as can be."""
    fitting = max(1, memory_bytes(settings.memory) // member_bytes(network, settings, data))
    parts = np.array_split(np.arange(len(members)), math.ceil(len(members) / fitting))
    return [
        Job(f"{network.name}-r{number}-p{part}", network, tuple(members[i] for i in indices))
        for part, indices in enumerate(parts)
    ]


Judged = tuple[tuple[tuple[float, ...], float], ...]  # candidates, each with its loss


@lru_cache(maxsize=4096)  # workers ask again whenever a job is finished
def _suggestions(
    settings: SweepSettings, network: Network, number: int, judged: Judged
) -> tuple[tuple[float, float, float], ...]:
    """The candidates of a round, as the TPE sampler suggests them after those that are judged.

    The sampler starts anew for every round, seeded by its number, so that who stops and goes on gets the
    same ones.  Values that are no ranges are crossed with the suggestions.
    """
    optuna = optional_import("optuna", "sweep", "a sweep")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: search_distribution(key, settings) for key in settings.searched}
    seed = zlib.crc32(f"{network.name} {number}".encode())
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True), direction="minimize"
    )
    state = optuna.trial.TrialState
    for params, loss in judged:
        study.add_trial(
            optuna.trial.create_trial(
                state=state.COMPLETE if math.isfinite(loss) else state.PRUNED,
                value=loss if math.isfinite(loss) else None,
                params=dict(zip(distributions, params, strict=True)),
                distributions=distributions,
            )
        )
    found = []
    for _ in range(min(settings.round, settings.trials - number * settings.round)):
        suggested = study.ask(distributions).params
        values = [
            (suggested[key],) if key in suggested else getattr(settings, key)
            for key in ("log2_block_multiplier", "weight_decay", "log2_lr")
        ]
        found += product(*values)
    return tuple(found)


def _judged(settings: SweepSettings, known: list[Trial]) -> Judged:
    """Each candidate once, judged by its mean over seeds; infinite if any seed diverged."""
    candidates: dict[tuple[float, ...], list[float]] = {}
    for trial in known:
        params = tuple(getattr(trial.member, key) for key in settings.searched)
        candidates.setdefault(params, []).append(final_loss(trial.losses))
    return tuple((params, float(np.mean(losses))) for params, losses in candidates.items())
