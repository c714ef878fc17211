"""Tuning on a small network finds the best learning rate, and says when it will not hold."""

import json
import re
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import depthnet
from depthnet.data import load
from depthnet.tuning import TuningWarning

pytestmark = pytest.mark.filterwarnings("ignore::depthnet.tuning.TuningWarning")

DIGITS = load("digits")
resnet = partial(depthnet.ResNet, 64, out_features=10, base_width=32, base_depth=4)
small = partial(depthnet.tune, width=16, depth=4, log2_lr=(-10, -4), steps=20, check_depths=())


class TwoLayerBlocks(nn.Module):
    """A residual network of plain torch, of which nothing scales learning rates."""

    def __init__(self, width, depth):
        super().__init__()
        self.input = nn.Linear(64, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.output = nn.Linear(width, 10)

    def forward(self, x):
        x = self.input(x)
        for layer in self.layers:
            x = x + layer(x) / len(self.layers) ** 0.5
        return self.output(x)


def test_the_tuned_rate_is_the_best_one_also_for_a_wider_and_deeper_network():
    found = small(resnet, DIGITS, steps=60, check_depths=(16,))
    best = found.optimum
    assert found.settings == {"lr": 2**best.value, "weight_decay": 0.0, "betas": (0.9, 0.99)}
    assert -10 < best.low <= best.value <= best.high < -4
    assert list(found.curves) == [4, 16]
    assert found.curves[4].losses.shape == (2, 7)
    assert found.curves[4].shift.value == 0
    assert found.parametrization.name == "depth_mup"
    assert found.block_depth == 1

    def final_loss(lr):
        model = resnet(width=64, depth=32, generator=torch.Generator().manual_seed(0))
        optimizer = depthnet.optim.AdamW(model, **{**found.settings, "lr": lr})
        losses = []
        for step in range(60):
            x, y = DIGITS.batch(0, step, 64)
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return np.mean(losses[-12:])

    lr = found.settings["lr"]
    assert final_loss(lr) < min(final_loss(lr / 8), final_loss(lr * 8))


def test_a_population_is_trained_as_its_members_one_by_one():
    # In float64, so that what rounds is the record of losses: 2^-24 in each of the two runs.
    data = DIGITS.x.double(), DIGITS.y
    exact = partial(resnet, dtype=torch.float64)
    options = {"log2_lr": (-9, -6), "weight_decay": (0.0, 1.0), "check_depths": (6,)}
    both = [
        small(model_fn, data, **options)
        for model_fn in (exact, lambda width, depth: exact(width=width, depth=depth))
    ]
    for depth in (4, 6):
        together, alone = (found.curves[depth].losses for found in both)
        np.testing.assert_allclose(together, alone, rtol=2**-23)
    together, alone = (list(found.weight_decay.values()) for found in both)
    np.testing.assert_allclose(together, alone, rtol=2**-23)
    assert together[0] != together[1]


@pytest.mark.parametrize("model_fn", [resnet, TwoLayerBlocks])
def test_results_are_reproducible_and_leave_the_global_generator_alone(model_fn):
    first = small(model_fn, "digits", steps=6, log2_lr=(-8, -6)).to_dict()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert small(model_fn, "digits", steps=6, log2_lr=(-8, -6)).to_dict() == first
    assert torch.equal(torch.get_rng_state(), before)


def test_of_several_weight_decays_the_best_is_taken():
    # At lr 2^-7 a decay of 100 takes 0.8 of the weights at every step.
    found = small(resnet, DIGITS, weight_decay=(100.0, 0.0))
    assert found.settings["weight_decay"] == 0
    assert found.weight_decay[0.0] < found.weight_decay[100.0]
    assert found.curves[4].mean.min() == found.weight_decay[0.0]


def test_blocks_of_two_layers_and_unscaled_rates_are_warned_of():
    with pytest.warns(TuningWarning) as caught:
        found = small(TwoLayerBlocks, DIGITS, steps=10)
    assert [str(each.message) for each in caught] == found.warnings
    assert all(each.filename == __file__ for each in caught)
    assert any("2 weight matrices" in text for text in found.warnings)
    assert any("do not scale with width and depth" in text for text in found.warnings)
    assert (found.block_depth, found.parametrization) == (2, None)


def test_blocks_are_named_or_found():
    class Named(TwoLayerBlocks):
        def __init__(self, width, depth):
            super().__init__(width, 2 * depth)  # as many as no list that would be looked for

    with pytest.warns(TuningWarning):
        assert small(Named, DIGITS, steps=5).block_depth is None
    with pytest.warns(TuningWarning, match="2 weight matrices"):
        assert small(Named, DIGITS, steps=5, blocks="layers.*").block_depth == 2


def test_a_deeper_block_of_a_scaled_model_is_warned_of_with_what_its_limit_loses():
    class Deeper(depthnet.ResNet):
        block_depth = 2

    with pytest.warns(TuningWarning, match="loses nonlinear learning within blocks"):
        small(partial(Deeper, 64, out_features=10), DIGITS, steps=5)


def test_a_parametrization_without_a_limit_is_warned_of_by_theory_and_by_measurement():
    with pytest.warns(TuningWarning):
        found = small(
            partial(resnet, parametrization="standard"),
            DIGITS,
            width=32,
            depth=8,
            steps=60,
            check_depths=None,
        )
    assert list(found.curves) == [8, 32]
    assert any("unstable at initialization" in text for text in found.warnings)
    assert any("no width rule" in text for text in found.warnings)
    # Blocks of fixed size add up to a stream that grows with depth, and so do its changes.
    assert found.curves[32].shift.high < 0
    assert any(re.search(r"moves by -.* from depth 8 to 32", text) for text in found.warnings)


@pytest.mark.parametrize(
    ("log2_lr", "side", "wider"),
    [((-14, -12), "greatest", "(-14, -8)"), ((-3, -1), "least", "(-7, -1)")],
)
def test_an_optimum_at_the_edge_of_the_grid_is_warned_of(log2_lr, side, wider):
    with pytest.warns(TuningWarning, match=f"is the {side} .* try log2_lr={re.escape(wider)}"):
        small(resnet, DIGITS, log2_lr=log2_lr)


def test_an_optimum_within_the_grid_that_stays_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert small(resnet, DIGITS, steps=40).warnings == []


def test_divergence():
    # Weights of 2^50 in 4 blocks: activations of 2^200 are beyond float32.
    with pytest.raises(ValueError, match=r"^log2_lr: at depth 4 every .* try log2_lr=\(42, 50\)"):
        small(resnet, DIGITS, log2_lr=(50, 52))
    # Only the greatest rate diverges, and its loss is infinite.
    with pytest.warns(TuningWarning, match="is the least"):
        found = small(resnet, DIGITS, log2_lr=(0, 50), seeds=1, steps=5)
    assert any("no learning rate of the grid brings the loss below" in w for w in found.warnings)
    assert np.isinf(found.curves[4].losses[0, -1])
    assert np.isfinite(found.curves[4].losses[0, 0])
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("model_fn", [resnet, TwoLayerBlocks])
def test_progress_counts_the_steps_of_every_network(model_fn):
    seen = []
    small(
        model_fn,
        DIGITS,
        log2_lr=(-8, 58),
        seeds=1,
        steps=5,
        check_depths=(2,),
        progress=lambda done, total: seen.append((done, total)),
    )
    total = 67 * 5 * 2
    assert seen[-1] == (total, total)
    assert sorted(seen) == seen


def test_it_reads_well():
    found = small(resnet, DIGITS, steps=5, log2_lr=(-8, -5), check_depths=())
    text = str(found)
    assert text.startswith(f"lr = {found.settings['lr']:.3g}, log2 {found.optimum}")
    assert "depth_mup (alpha=0.5, gamma=0.5)" in text
    assert all(f"warning: {warning}" in text for warning in found.warnings)
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["settings"]["lr"] == found.settings["lr"]
    assert record["curves"]["4"]["losses"] == found.curves[4].losses.tolist()
    assert record["parametrization"]["alpha"] == 0.5


def test_the_picture_has_a_curve_a_depth(tmp_path):
    pytest.importorskip("matplotlib")
    found = small(resnet, DIGITS, log2_lr=(-8, 50), seeds=1, steps=5, check_depths=(8,))
    figure = found.plot()
    (axis,) = figure.axes
    _, labels = axis.get_legend_handles_labels()
    assert labels == ["4", "8"]
    figure.savefig(tmp_path / "tuning.png")
    lowest, greatest = axis.get_ylim()
    assert all(lowest < curve.mean.min() < greatest for curve in found.curves.values())


def test_a_picture_of_networks_that_learn_nothing():
    pytest.importorskip("matplotlib")
    found = small(resnet, DIGITS, log2_lr=(0, 4), seeds=1, steps=5)
    (axis,) = found.plot().axes
    lowest, greatest = axis.get_ylim()
    assert lowest < found.curves[4].mean.min() < greatest


def takes_depth_only(depth):
    return resnet(width=16, depth=depth)


def forgets_its_population(width, depth, population=None, generator=None):
    return resnet(width=width, depth=depth)


X, Y = DIGITS.x, DIGITS.y


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("width", {"width": 0}),
        ("depth", {"depth": 2.5}),
        ("log2_lr", {"log2_lr": (-4, -10)}),
        ("log2_lr", {"log2_lr": (-4, -3.5)}),
        ("log2_lr", {"log2_lr": -8}),
        ("log2_lr", {"log2_lr": (-8, float("nan"))}),
        ("per_octave", {"per_octave": 0}),
        ("weight_decay", {"weight_decay": ()}),
        ("weight_decay", {"weight_decay": 0.1}),
        ("weight_decay", {"weight_decay": (0.1, -0.1)}),
        ("weight_decay", {"weight_decay": (0.1, 0.1)}),
        ("seeds", {"seeds": 0}),
        ("steps", {"steps": 4}),
        ("batch", {"batch": "64"}),
        ("check_depths", {"check_depths": 16}),
        ("check_depths", {"check_depths": (4,)}),
        ("check_depths", {"check_depths": (8, 8)}),
        ("check_depths", {"check_depths": (0,)}),
        ("blocks", {"blocks": "no.such.*"}),
        ("model_fn", {"model_fn": resnet(width=16, depth=4)}),
        ("model_fn", {"model_fn": 3}),
        ("model_fn", {"model_fn": takes_depth_only}),
        ("model_fn", {"model_fn": forgets_its_population}),
        ("model_fn", {"model_fn": lambda width, depth: None}),
        ("model_fn", {"model_fn": lambda width, depth: nn.Linear(64, 3)}),
        ("data", {"data": "digit"}),
        ("data", {"data": X}),
        ("data", {"data": (X, Y[:-1])}),
        ("data", {"data": (X.long(), Y)}),
        ("data", {"data": (X, Y - 1)}),
        ("data", {"data": (X[:0], Y[:0])}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(argument, changes):
    arguments = {"model_fn": resnet, "data": DIGITS, **changes}
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}\b"):
        small(arguments.pop("model_fn"), arguments.pop("data"), **arguments)


def test_the_example_in_the_docs_runs():
    document = Path(__file__).parents[1] / "docs" / "tuning.md"
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
    assert blocks
    for code in blocks:
        exec(code, {})
