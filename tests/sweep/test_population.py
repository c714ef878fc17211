"""Populations: what a member is, what is swept, who leaves."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import depthnet
from depthnet import data
from depthnet.sweep import plan
from depthnet.sweep.population import trainer
from depthnet.sweep.study import Job, Member, SweepSettings

TEXT = data.load("text")


def settings(**changes):
    small = {"width": 16, "depth": 4, "steps": 10, "batch": 8, "log2_lr": (-9, -8, -7, -6)}
    return SweepSettings(**{**small, **changes})


def train(chosen, source=TEXT):
    """The losses (steps, members) of each job, by the network."""
    found = {}
    for job in plan.jobs(chosen, source, {}):
        population = trainer(chosen, job, source)
        while not population.done:
            population.train_step()
        found[job.network] = population.losses
    return found


def test_half_zero_is_depth_mup_displaced_by_an_octave_at_four_times_the_base_depth():
    both = {"parametrization": ("depth_mup", "half_zero"), "depth": (4, 16), "sweep": "hidden"}
    losses = train(settings(**both))
    by = {(network.parametrization, network.depth): found for network, found in losses.items()}
    assert np.array_equal(by["depth_mup", 4], by["half_zero", 4])
    for seed in (0, 1):  # 4 learning rates each: half_zero's first three are depth_mup's last three
        start = 4 * seed
        shifted = by["depth_mup", 16][:, start + 1 : start + 4]
        assert np.array_equal(by["half_zero", 16][:, start : start + 3], shifted)
    assert by["depth_mup", 16].std(1).max() > 0


def test_a_member_is_a_network_trained_alone():
    chosen = settings(log2_block_multiplier=(-2, 0.5), weight_decay=(0.5,))
    (job,) = plan.jobs(chosen, TEXT, {})
    (losses,) = train(chosen).values()
    place = job.members.index(Member(-7, 0.5, 0.5, 1))
    model = depthnet.ResNet(
        *(TEXT.in_features, 16, 4, TEXT.out_features),
        active_features=8,
        base_width=16,
        base_depth=4,
        block_multiplier=2**0.5,
        generator=torch.Generator().manual_seed(1),
    )
    groups = model.param_groups("adamw")
    for group in groups:
        group["lr"] = 2**-7
    optimizer = depthnet.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.5)
    alone = []
    for step in range(10):
        x, y = TEXT.batch(1, step, 8)
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        alone.append(loss.item())
    np.testing.assert_allclose(losses[:, place], alone, rtol=1e-5)


def weights(population):
    model = population.model
    return [layer.weight.detach().clone() for layer in (model.input, model.blocks, model.output)]


@pytest.mark.parametrize("sweep", ["all", "hidden", "frozen"])
def test_a_sweep_moves_the_learning_rates_that_it_names(sweep):
    """Adam's first step is the learning rate times the gradient's sign, wherever that is not 0."""
    chosen = settings(sweep=sweep, log2_lr=(-9, -7), outer_log2_lr=-8.5, output_std=1.0)
    population = trainer(chosen, plan.jobs(chosen, TEXT, {})[0], TEXT)
    before = weights(population)
    population.train_step()
    outside = {"all": (-9, -7), "hidden": (-8.5, -8.5), "frozen": (-math.inf, -math.inf)}[sweep]
    for new, old, rates in zip(
        weights(population), before, (outside, (-9, -7), outside), strict=True
    ):
        moved = (new - old)[:2].abs().flatten(1).amax(1)
        assert moved.tolist() == pytest.approx([2.0**rate for rate in rates], rel=1e-3)


def test_frozen_layers_keep_every_bit_also_when_members_leave():
    chosen = settings(sweep="frozen", output_std=1.0, log2_lr=(-9, -8, 40, 60), steps=12)
    (job,) = plan.jobs(chosen, TEXT, {})
    population = trainer(chosen, job, TEXT)
    before = weights(population)
    while not population.done:
        population.train_step()
    assert 0 < len(population.alive) < len(job.members)
    after = weights(population)
    for layer, same in ((0, True), (1, False), (2, True)):
        assert torch.equal(after[layer], before[layer][population.alive]) is same
    assert not after[2].eq(0).all()


def test_other_data_slopes_and_exponents():
    digits = data.load("digits")
    chosen = settings(data="digits", activation=("relu", "1,-0.5"), parametrization="0.75,0.25")
    losses = train(chosen, digits)
    assert len(losses) == 2
    assert all(np.isfinite(found).all() for found in losses.values())


def test_diverged_members_leave_and_the_others_do_not_notice():
    chosen = settings(sweep="all", log2_lr=(-9, -8, 40, 60), steps=12)
    (job,) = plan.jobs(chosen, TEXT, {})
    population = trainer(chosen, job, TEXT)
    while not population.done:
        population.train_step()
    sane = [i for i, member in enumerate(job.members) if member.log2_lr < 0]
    assert population.alive.tolist() == sane
    assert population.model.blocks.weight.shape[0] == len(sane)
    lost = np.delete(population.losses, sane, axis=1)
    assert not np.isfinite(lost).all(0).any()
    assert np.isnan(lost[-1]).all()
    alone = settings(sweep="all", log2_lr=(-9, -8), steps=12)
    (losses,) = train(alone).values()
    assert np.array_equal(population.losses[:, sane], losses)


def test_training_ends_when_everything_diverged():
    chosen = settings(sweep="all", log2_lr=(58, 60))
    population = trainer(chosen, plan.jobs(chosen, TEXT, {})[0], TEXT)
    while not population.done:
        population.train_step()
    assert population.step < chosen.steps
    with pytest.raises(RuntimeError, match="training is over"):
        population.train_step()
    again = trainer(chosen, plan.jobs(chosen, TEXT, {})[0], TEXT)
    again.load_state_dict(population.state_dict())
    assert again.done


@pytest.mark.parametrize("source", ["text", "digits"])
@pytest.mark.parametrize("sweep", ["all", "hidden", "frozen"])
def test_a_member_has_the_same_bits_in_populations_of_1_7_and_33(source, sweep):
    source = data.load(source)
    rng = np.random.default_rng(0)
    chosen = settings(steps=8, sweep=sweep, output_std=1.0, schedule="cosine", warmup=2)
    (network,) = chosen.networks
    members = [
        Member(
            float(rng.uniform(-10, -5)), float(rng.uniform(-3, 1)), float(rng.uniform(0, 1)), seed
        )
        for seed in range(33)
    ]
    one = members[20]

    def losses(chosen_members):
        population = trainer(chosen, Job("", network, tuple(chosen_members)), source)
        while not population.done:
            population.train_step()
        return population.losses[:, chosen_members.index(one)]

    alone = losses([one])
    assert np.isfinite(alone).all()
    assert np.array_equal(losses(members), alone)
    assert np.array_equal(losses(members[17:24]), alone)


def test_keeping_members_is_for_populations():
    with pytest.raises(ValueError, match="a single network has no members"):
        depthnet.ResNet(4, 8, 2, 3).keep(torch.tensor([0]))


def finished(population):
    while not population.done:
        population.train_step()
    return population


def reloaded(population, chosen, job, path):
    """A new population that goes on from what the other one leaves in a file."""
    torch.save(population.state_dict(), path)
    found = trainer(chosen, job, TEXT)
    found.load_state_dict(torch.load(path, weights_only=True))
    return found


def test_resuming_after_members_have_left_goes_on_bit_for_bit(tmp_path):
    chosen = settings(log2_lr=(-9, -8, 40, 60), steps=12, schedule="cosine", warmup=3)
    (job,) = plan.jobs(chosen, TEXT, {})
    whole = finished(trainer(chosen, job, TEXT))
    first = trainer(chosen, job, TEXT)
    while len(first.alive) == len(job.members):
        first.train_step()
    second = reloaded(first, chosen, job, tmp_path / "state.pt")
    assert 0 < second.step < 12
    assert np.array_equal(finished(second).losses, whole.losses, equal_nan=True)


@pytest.mark.parametrize(
    ("schedule", "warmup"), [("linear", 4), ("linear", 0), ("cosine", 4), ("constant", 4)]
)
def test_stopping_after_any_step_of_a_schedule_changes_no_bit(schedule, warmup, tmp_path):
    chosen = settings(schedule=schedule, warmup=warmup, sweep="hidden")
    (job,) = plan.jobs(chosen, TEXT, {})
    whole = finished(trainer(chosen, job, TEXT))
    for stop in (1, 3, 4, 5, 9):  # inside the warmup, at its end, after it
        first = trainer(chosen, job, TEXT)
        for _ in range(stop):
            first.train_step()
        again = finished(reloaded(first, chosen, job, tmp_path / "state.pt"))
        assert np.array_equal(again.losses, whole.losses), stop
        for one, other in zip(weights(again), weights(whole), strict=True):
            assert torch.equal(one, other), stop
    stopped = trainer(chosen, job, TEXT)  # after each
    while not stopped.done:
        stopped.train_step()
        stopped = reloaded(stopped, chosen, job, tmp_path / "state.pt")
    assert np.array_equal(stopped.losses, whole.losses)
    for one, other in zip(weights(stopped), weights(whole), strict=True):
        assert torch.equal(one, other)
