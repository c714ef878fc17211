"""The coordinate check passes what is right, and names what is broken.

An exponent that is wrong by 1/2 moves a slope by about as much, twice the 1/4 at which the check decides.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from depthnet.data import load
from depthnet.diagnostics.coord_check import (
    CoordCheck,
    coord_check,
    holds,
    next_token_loss,
    predictions,
    resnet_builder,
    transformer_builder,
)
from depthnet.diagnostics.fits import Interval
from depthnet.scaling import Parametrization, torch_param_groups

STEPS = 2
BASE = {"base_width": 64, "base_depth": 8}
SHAPES = {"widths": (64, 128, 256), "depths": (16, 32, 64, 128), "steps": STEPS, **BASE}
ONLY = {"width": {**SHAPES, "depths": (8,)}, "depth": {**SHAPES, "widths": (64,)}}
SMALL = {**SHAPES, "widths": (16, 32), "depths": (4, 8), "seeds": 2}


@pytest.fixture(scope="module")
def data():
    return load("digits")


@pytest.fixture(scope="module")
def batches(data):
    return [data.batch(0, step, 32) for step in range(STEPS)]


def wrong(check: CoordCheck, axis: str) -> set[str]:
    """Quantities that are off along an axis."""
    return {row["quantity"] for row in check.rows if row["axis"] == axis and row["holds"] is False}


@pytest.mark.parametrize(
    ("parametrization", "options", "shapes"),
    [
        ("depth_mup", {}, SHAPES),
        ("depth_mup", {"optimizer": "adam", "activation": "relu"}, ONLY["depth"]),
        ("depth_mup", {"optimizer": "sgd"}, SHAPES),
        # At the base depth, along the width, every preset with a width rule is the same network.
        ("ode", {}, ONLY["depth"]),
        ("half_zero", {"blocks_alone": True}, ONLY["depth"]),
    ],
)
def test_right_parametrizations_pass(parametrization, options, shapes, data, batches):
    check = coord_check(
        resnet_builder(data, parametrization, **options, **BASE),
        batches,
        parametrization=parametrization,
        blocks_alone=options.get("blocks_alone", False),
        **shapes,
    )
    assert check.passed, check.words
    assert all("farthest is" in words for words in check.words)


def tampered(build, change, base=BASE):
    """A builder whose models and optimizers `change(model, hidden group, r_n, r_L)` spoils."""

    def spoiled(width, depth, seeds):
        model, optimizer = build(width, depth, seeds)
        hidden = next(group for group in optimizer.param_groups if group["name"] == "hidden")
        change(model, hidden, width / base["base_width"], depth / base["base_depth"])
        return model, optimizer

    spoiled.populations = getattr(build, "populations", False)
    return spoiled


def scale(key, by):
    def change(model, hidden, r_n, r_L):
        hidden[key] = hidden[key] * by(r_n, r_L)

    return change


def weaker_branches(model, hidden, r_n, r_L):
    model.blocks.scale *= r_L**-0.5


@pytest.mark.parametrize(
    ("change", "axis", "named"),
    [
        (weaker_branches, "depth", {"branch", "gradient"}),
        (scale("lr_scale", lambda r_n, r_L: r_L**0.5), "depth", {"weight_change"}),
        (scale("lr_scale", lambda r_n, r_L: r_n), "width", {"weight_change", "stream_change"}),
        (scale("eps_scale", lambda r_n, r_L: r_n), "width", {"weight_change"}),
        (scale("eps_scale", lambda r_n, r_L: r_L**0.5), "depth", {"weight_change"}),
    ],
    ids=["branch", "lr in depth", "lr in width", "eps in width", "eps in depth"],
)
def test_a_broken_rule_is_found_and_named(change, axis, named, data, batches):
    check = coord_check(tampered(resnet_builder(data, **BASE), change), batches, **ONLY[axis])
    assert not check.passed
    assert named <= wrong(check, axis)
    ((verdict, words),) = check.verdicts.values()
    assert verdict is False
    worst = check.farthest(axis)
    assert worst["quantity"] in words
    assert f"{worst['slope']:+.2f}" in words


def test_half_zero_does_not_pass_for_depth_mup(data, batches):
    build = resnet_builder(data, "half_zero", **BASE)
    check = coord_check(build, batches, **ONLY["depth"])
    assert check.axes == ["depth"]
    assert not check.passed
    assert "weight_change" in wrong(check, "depth")
    assert "off" in check.words[0]


class Block(nn.Module):
    def __init__(self, width, rule):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.multiplier = rule.multiplier
        nn.init.normal_(self.linear.weight, 0, rule.init_std)

    def forward(self, x):
        y = torch.relu(self.linear(x))
        return x + self.multiplier * (y - y.mean(-1, keepdim=True))


class Plain(nn.Module):
    """A residual MLP in plain torch, scaled by depthnet's rules."""

    def __init__(self, width, depth, features, classes):
        super().__init__()
        shape = {"width": width, "depth": depth, "output_std": 1 / BASE["base_width"], **BASE}
        fan_in = {"input": features, "hidden": width, "output": width}
        rule = Parametrization.of("depth_mup").rule
        self.rules = {role: rule(role, fan_in=fan_in[role], **shape) for role in fan_in}
        self.input = nn.Linear(features, width, bias=False)
        self.layers = nn.ModuleList(Block(width, self.rules["hidden"]) for _ in range(depth))
        self.output = nn.Linear(width, classes, bias=False)
        for role in ("input", "output"):
            nn.init.normal_(getattr(self, role).weight, 0, self.rules[role].init_std)

    def forward(self, x):
        x = self.input(x)
        for layer in self.layers:
            x = layer(x)
        return self.output(x)

    def param_groups(self, optimizer):
        modules = {"input": self.input, "hidden": self.layers, "output": self.output}
        return [
            {
                "name": role,
                "params": list(module.parameters()),
                "lr_scale": self.rules[role].lr_scale(optimizer),
                "eps_scale": self.rules[role].eps_scale(),
                "weight_decay_scale": self.rules[role].weight_decay_scale(optimizer),
            }
            for role, module in modules.items()
        ]


@pytest.mark.parametrize("scaled", [True, False])
def test_a_plain_torch_module_through_hooks(scaled, data, batches):
    def build(width, depth, seed):
        torch.manual_seed(seed)
        model = Plain(width, depth, data.in_features, data.out_features)
        groups = torch_param_groups(model, 2**-10) if scaled else model.parameters()
        return model, torch.optim.AdamW(groups, lr=2**-10, weight_decay=0.0)

    check = coord_check(
        build,
        batches,
        widths=(64, 128, 256),
        depths=(8, 16, 32),
        seeds=4,
        steps=1,
        blocks="layers.*",
        **BASE,
    )
    assert check.passed == scaled, check.words
    assert not any(row["quantity"] == "preactivation_change" for row in check.rows)
    if not scaled:
        assert "weight_change" in wrong(check, "width") & wrong(check, "depth")


def test_one_network_a_seed_measures_what_a_population_does(data, batches):
    build = resnet_builder(data, **BASE)
    together = coord_check(build, batches, **SMALL)
    apart = coord_check(lambda *arguments: build(*arguments), batches, **SMALL)
    for shape, sizes in together.sizes.items():
        for name, values in sizes.items():
            assert values.shape[1] == 2
            # Both are float32: differences of nearly equal activations lose some of their 24 bits.
            assert torch.allclose(
                *map(torch.from_numpy, (values, apart.sizes[shape][name])), rtol=1e-3
            ), (shape, name)


def test_without_a_prediction_a_check_cannot_pass_and_says_why(data, batches):
    check = coord_check(
        resnet_builder(data, "standard", **BASE),
        batches,
        parametrization="standard",
        **SMALL,
    )
    assert not check.passed
    assert "no width rule" in check.verdicts["width"][1]
    assert "unstable at initialization" in check.verdicts["depth"][1]
    assert check.rows
    assert {row["predicted"] for row in check.rows} == {None}


def test_divergence_fails_and_an_output_layer_of_zeros_does_not(data, batches):
    diverging = resnet_builder(data, optimizer="sgd", lr=1e30, **BASE)
    assert "weight_change" in wrong(coord_check(diverging, batches, **SMALL), "depth")

    def silent(model, hidden, r_n, r_L):
        nn.init.zeros_(model.output.weight)

    check = coord_check(tampered(resnet_builder(data, **BASE), silent), batches, **SMALL)
    first = {row["step"] for row in check.rows if row["quantity"] == "gradient"}
    assert first == {1}  # blocks have no gradient before outputs depend on them
    assert all(math.isfinite(row["slope"]) for row in check.rows)


def test_blocks_that_do_not_train_fail(data, batches):
    def forgotten(width, depth, seed):
        model, optimizer = resnet_builder(data, **BASE)(width, depth, seed)
        optimizer.param_groups = [g for g in optimizer.param_groups if g["name"] != "hidden"]
        return model, optimizer

    check = coord_check(forgotten, batches, **SMALL)
    assert "weight_change" in wrong(check, "width") & wrong(check, "depth")
    assert "weight_change" in check.words[0]
    check.figure()


def test_rule_of_decision():
    interval = Interval(0.1, 0.05, 0.15)
    assert holds(interval, 0.0) is True
    assert holds(interval, 0.4) is False
    assert holds(interval, 0.33) is None
    assert holds(interval, None) is None
    assert holds(Interval(0.0, -math.inf, math.inf), 0.0) is None
    assert holds(Interval(math.nan, -math.inf, math.inf), 0.0) is False


def test_predictions():
    mup = predictions(Parametrization.of("depth_mup"))
    assert mup["width"]["gradient"] == -1
    assert mup["depth"].keys() == mup["width"].keys()
    assert (mup["depth"]["branch"], mup["depth"]["weight_change"]) == (-0.5, -0.5)
    # Of changes that are sums of two powers, none is predicted.
    assert predictions(Parametrization.of("half_zero"))["depth"]["output_change"] is None
    assert predictions(Parametrization.of("half_zero"), True)["depth"]["output_change"] == 0.5
    assert predictions(Parametrization(0.7, 0.3))["depth"]["output_change"] is not None


def test_figure(data, batches):
    check = coord_check(
        resnet_builder(data, **BASE),
        batches,
        **SMALL,
    )
    figure = check.figure()
    assert len(figure.axes) == 14
    assert "depth_mup" in figure.get_suptitle()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (64,), "depths": (8,)}, "widths or depths must be two or more"),
        ({"widths": (64, 64)}, "widths must be different from each other"),
        ({"depths": ()}, "depths must be different from each other"),
        ({"depths": (0, 8)}, "depths must be at least 1, got 0"),
        ({"seeds": 1}, "seeds must be at least 2"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batches": []}, "batches must hold"),
        ({"parametrization": "depth_mop"}, "did you mean 'depth_mup'"),
        ({"build": lambda width, depth, seed: nn.Linear(1, 1)}, "build must return"),
    ],
)
def test_bad_arguments_are_named(arguments, message, data, batches):
    given = {"build": resnet_builder(data, **BASE), "batches": batches, **SHAPES, **arguments}
    with pytest.raises((ValueError, TypeError), match=message):
        coord_check(**given)


def test_bad_arguments_of_the_builder_are_named(data):
    with pytest.raises(ValueError, match="optimizer='adamv' is not one of"):
        resnet_builder(data, optimizer="adamv")
    with pytest.raises(ValueError, match="lr must be a finite number"):
        resnet_builder(data, lr=math.nan)


class Cycles:
    """Text of few words in random order: batches as depthnet.data.tokens has them."""

    vocabulary = 32

    def batch(self, seed, step, size, length):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        words = torch.randint(32, (8, 4), generator=torch.Generator().manual_seed(0))
        drawn = torch.randint(8, (size, length // 4 + 1), generator=generator)
        text = words[drawn].flatten(1)
        return text[:, :length], text[:, 1 : length + 1]


LANGUAGE = Cycles()
LANGUAGE_BASE = {"base_width": 64, "base_depth": 4}
LANGUAGE_ONLY = {
    axis: {"widths": (64,), "depths": (4,), "seeds": 5, "steps": 1, **LANGUAGE_BASE, **points}
    for axis, points in (("width", {"widths": (64, 128, 256)}), ("depth", {"depths": (8, 16, 32)}))
}


def check_transformer(build, axis, claimed, **options):
    return coord_check(
        build,
        [LANGUAGE.batch(0, 0, 16, 16)],
        parametrization=claimed,
        blocks="layers.*",
        loss=next_token_loss,
        **LANGUAGE_ONLY[axis],
        **options,
    )


def small_transformers(parametrization, **options):
    return transformer_builder(LANGUAGE, parametrization, head_size=16, **LANGUAGE_BASE, **options)


@pytest.mark.parametrize(
    ("parametrization", "options", "axis"),
    [
        # At the base depth, along the width, every preset with a width rule is the same network.
        ("mup", {}, "width"),
        ("completep", {"biases": True}, "depth"),
        ("depth_mup", {"norm": "rms", "mlp": "abs"}, "depth"),
        ((0.75, 0.25), {}, "depth"),
        ("half_zero", {"blocks_alone": True}, "depth"),
    ],
)
def test_transformers_pass(parametrization, options, axis):
    alone = {"blocks_alone": options.get("blocks_alone", False)}
    build = small_transformers(parametrization, **options)
    check = check_transformer(build, axis, parametrization, **alone)
    assert check.passed, check.words


def test_transformers_without_a_width_rule_fail_in_width():
    check = check_transformer(small_transformers("standard"), "width", "completep")
    assert not check.passed
    assert {"gradient", "weight_change", "stream_change"} <= wrong(check, "width")
    honest = replace(check, parametrization=Parametrization.of("standard"))
    assert not honest.passed
    assert "cannot pass: no width rule" in honest.words[0]


def test_transformers_without_a_depth_rule_fail_in_depth():
    check = check_transformer(small_transformers("mup"), "depth", "completep")
    assert not check.passed
    assert {"branch", "gradient", "stream_change"} <= wrong(check, "depth")
    stream = next(row for row in check.rows if row["quantity"] == "stream_change")
    assert stream["low"] > 0.5  # branches that point the same way after one step
    honest = replace(check, parametrization=Parametrization.of("mup"))
    assert not honest.passed
    assert "unstable at initialization" in honest.words[0]


@pytest.mark.parametrize(
    ("change", "axis", "named"),
    [
        (scale("lr_scale", lambda r_n, r_L: r_n), "width", {"weight_change", "stream_change"}),
        (scale("eps_scale", lambda r_n, r_L: r_L), "depth", {"weight_change"}),
    ],
    ids=["lr in width", "eps in depth"],
)
def test_a_broken_rule_of_a_transformer_is_found(change, axis, named):
    build = tampered(small_transformers("completep"), change, LANGUAGE_BASE)
    check = check_transformer(build, axis, "completep")
    assert not check.passed
    assert named <= wrong(check, axis)
