"""Which trials a study has, and how they are put into populations."""

import math

import numpy as np
import pytest
import torch

from depthnet import data
from depthnet.sweep import plan
from depthnet.sweep.population import trainer
from depthnet.sweep.study import Network, Range, SweepSettings, Trial

DIGITS = data.load("digits")


def settings(**changes):
    small = {"data": "digits", "width": 16, "depth": (2, 4), "steps": 10, "batch": 8}
    return SweepSettings(**{**small, **changes})


def test_a_grid_is_one_job_a_network_with_every_combination_once():
    chosen = settings(log2_lr=(-9, -8), log2_block_multiplier=(-1, 0), weight_decay=(0, 0.5))
    jobs = plan.jobs(chosen, DIGITS, {})
    assert [job.network.depth for job in jobs] == [4, 2]  # what takes longest first
    for job in jobs:
        assert len(set(job.members)) == len(job.members) == 2 * 2 * 2 * 2
    assert sum(len(job.members) for job in jobs) == chosen.planned


def test_memory_bounds_a_population():
    network = Network("depth_mup", "abs", 16, 4)
    each = plan.member_bytes(network, settings(), DIGITS)
    chosen = settings(depth=4, memory=f"{each * 7.5 / 1000}KB")
    jobs = plan.jobs(chosen, DIGITS, {})
    assert [len(job.members) for job in jobs] == [7, 7, 6]
    (whole,) = plan.jobs(settings(depth=4), DIGITS, {})
    assert [member for job in jobs for member in job.members] == list(whole.members)
    assert len({job.name for job in jobs}) == 3
    alone = plan.jobs(settings(depth=4, memory="1KB"), DIGITS, {})
    assert [len(job.members) for job in alone] == [1] * 20  # never less than one


def test_a_population_takes_about_the_memory_that_it_is_planned_with(monkeypatch):
    """Tensors alive at the end of backward, against the estimate; within a factor of 1.5."""
    chosen = SweepSettings(width=32, depth=16, batch=32, steps=5)
    text = data.load("text")
    (job,) = plan.jobs(chosen, text, {})
    population = trainer(chosen, job, text)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        population.train_step()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in kept}
    tensors = list(population.model.parameters())
    tensors += [p.grad for p in tensors]
    tensors += [x for entry in population.optimizer.state.values() for x in entry.values()]
    for tensor in tensors:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    measured = sum(storage.nbytes() for storage in storages.values())
    planned = len(job.members) * plan.member_bytes(job.network, chosen, text)
    assert measured <= planned <= 1.5 * measured


def test_flops_are_those_of_the_products():
    network = Network("depth_mup", "abs", 16, 4)
    chosen = settings(batch=8)
    weights = 4 * 16 * 16 + 16 * 10
    assert plan.step_flops(network, chosen, DIGITS) == 8 * (6 * weights + 4 * 64 * 16)
    text = data.load("text")
    hot = plan.step_flops(network, chosen, text)
    assert hot == 8 * (6 * (4 * 16 * 16 + 16 * text.out_features) + 4 * 8 * 16)


def finish(chosen, jobs, loss):
    """Trials of jobs whose losses are a function of their members."""
    return {
        job.name: {
            index: Trial(
                job.network, member, np.full(chosen.steps, loss(member), np.float32), 1.0, 1.0,
                None if math.isfinite(loss(member)) else 0,
            )
            for index, member in enumerate(job.members)
        }
        for job in jobs
    }  # fmt: skip


def search(**changes):
    return settings(
        depth=4, sampler="tpe", log2_lr=Range(-12, -2), log2_block_multiplier=Range(-3, 3),
        trials=25, round=10, **changes,
    )  # fmt: skip


def test_rounds_of_a_search_follow_each_other():
    chosen, finished, sizes = search(), {}, []
    while True:
        jobs = plan.jobs(chosen, DIGITS, finished)
        new = [job for job in jobs if plan.unfinished(job, finished)]
        if not new:
            break
        assert len(new) == 1
        sizes.append(len(new[0].members))
        assert {member.seed for member in new[0].members} == {0, 1}
        partial = finish(chosen, new, lambda member: (member.log2_lr + 7) ** 2)
        partial[new[0].name].pop(0)  # a round is not over before its last trial
        assert plan.unfinished(new[0], finished | partial)
        assert [job.name for job in plan.jobs(chosen, DIGITS, finished | partial)] == [
            job.name for job in jobs
        ]
        finished |= finish(chosen, new, lambda member: (member.log2_lr + 7) ** 2)
    assert sizes == [20, 20, 10]
    assert sum(map(len, finished.values())) == chosen.planned


def test_a_search_is_the_same_whoever_asks_and_learns_from_what_it_found():
    chosen = search()
    loss = lambda member: (member.log2_lr + 7) ** 2  # noqa: E731
    finished = {}
    for _ in range(2):
        finished |= finish(chosen, plan.jobs(chosen, DIGITS, finished), loss)
    once, again = (plan.jobs(chosen, DIGITS, finished) for _ in range(2))
    assert once == again
    distances = [[abs(m.log2_lr + 7) for m in job.members] for job in once]
    assert np.mean(distances[-1]) < 0.7 * np.mean(distances[0])
    other = finish(chosen, plan.jobs(chosen, DIGITS, {}), lambda m: (m.log2_lr + 3) ** 2)
    assert plan.jobs(chosen, DIGITS, other)[-1] != once[1]


def test_a_search_goes_on_when_everything_diverged():
    chosen = search()
    finished = finish(chosen, plan.jobs(chosen, DIGITS, {}), lambda member: math.inf)
    jobs = plan.jobs(chosen, DIGITS, finished)
    assert len(jobs) == 2
    assert all(-12 <= member.log2_lr <= -2 for member in jobs[1].members)


def test_lists_are_crossed_with_a_search():
    chosen = search(weight_decay=(0, 0.5))
    (job,) = plan.jobs(chosen, DIGITS, {})
    assert len(job.members) == 10 * 2 * 2
    by_decay = [
        {(m.log2_lr, m.log2_block_multiplier) for m in job.members if m.weight_decay == decay}
        for decay in (0, 0.5)
    ]
    assert by_decay[0] == by_decay[1]
    assert len(by_decay[0]) == 10


@pytest.mark.parametrize("low", [0.0, 1e-4])
def test_weight_decays_are_searched_by_their_logarithm_where_they_have_one(low):
    chosen = settings(
        depth=4, sampler="tpe", weight_decay=Range(low, 1), log2_lr=-8, trials=40, round=40
    )
    (job,) = plan.jobs(chosen, DIGITS, {})
    decays = np.array([member.weight_decay for member in job.members])
    assert (low <= decays).all() and (decays <= 1).all()  # noqa: PT018
    below = np.mean(decays < 0.01)  # half of the octaves, a hundredth of the range
    assert below > 0.25 if low else below < 0.25
