import math
import subprocess
import sys
from dataclasses import replace

import pytest

from depthnet.scaling import PRESETS, Parametrization
from depthnet.scaling.parametrization import ROLES

SHAPES = [
    (128, 8),
    (64, 8),
    (256, 2),
    (1024, 128),
    (96, 1000),
]  # (width, depth); the base is (128, 8)


def rule(parametrization, role, width, depth, **more):
    fan_in = {"input": 784}.get(role, width)
    return Parametrization.of(parametrization).rule(
        role, fan_in=fan_in, width=width, depth=depth, **more
    )


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize(("width", "depth"), SHAPES)
def test_the_table(name, width, depth):
    preset = PRESETS[name]
    alpha, gamma = preset.alpha, preset.gamma
    r_n = 1.0 if name == "standard" else width / 128
    r_L = depth / 8
    close = math.isclose

    r = rule(name, "input", width, depth)
    assert r.multiplier == 1
    assert close(r.init_std, 784**-0.5)
    assert close(r.lr_scale("adamw"), 1)
    assert close(r.lr_scale("adam"), 1)
    assert close(r.lr_scale("sgd"), r_n)
    assert close(r.eps_scale(), 1 / r_n)
    assert close(r.weight_decay_scale("adamw"), 1)

    r = rule(name, "hidden", width, depth)
    assert close(r.multiplier, 8**-0.5 * r_L**-alpha)
    assert close(r.init_std, width**-0.5)
    assert close(r.lr_scale("adamw"), 1 / (r_n * r_L**gamma))
    assert close(r.lr_scale("sgd"), r_L ** (alpha - gamma))
    assert close(r.eps_scale(), 1 / (r_n * r_L**alpha))
    assert close(r.weight_decay_scale("adamw"), r_n * r_L**gamma)

    r = rule(name, "output", width, depth, output_std=0.5)
    assert r.multiplier == 1
    std = 0.5 / (width / 128) if name != "standard" else 0.5 / (width / 128) ** 0.5
    assert close(r.init_std, std)
    assert close(r.lr_scale("adamw"), 1 / r_n)
    assert close(r.lr_scale("sgd"), 1 / r_n)
    assert close(r.eps_scale(), 1)
    assert close(r.weight_decay_scale("adamw"), r_n)

    for role in ("bias", "norm"):
        r = rule(name, role, width, depth)
        assert close(r.lr_scale("adamw"), r_L**-gamma)
        assert close(r.eps_scale(), 1 / (r_n * r_L**alpha))
        assert r.weight_decay_scale("adamw") == 0

    r = rule(name, "final_norm", width, depth)
    assert r.lr_scale("adamw") == 1
    assert close(r.eps_scale(), 1 / r_n)
    assert r.weight_decay_scale("adamw") == 0

    tied, embedding = (
        Parametrization.of(name).rule(role, fan_in=1, width=width, depth=depth, input_std=0.02)
        for role in ("tied", "input")
    )
    assert close(tied.multiplier, 1 / r_n)
    assert tied.init_std == embedding.init_std == 0.02
    assert tied == replace(embedding, multiplier=tied.multiplier)


@pytest.mark.parametrize(
    ("name", "alpha", "gamma"),
    [
        ("standard", 0, 0),
        ("mup", 0, 0),
        ("depth_mup", 0.5, 0.5),
        ("ode", 1, 0),
        ("half_zero", 0.5, 0),
        ("completep", 1, 0),
    ],
)
def test_presets_have_their_exponents_and_print_them(name, alpha, gamma):
    preset = PRESETS[name]
    assert (preset.alpha, preset.gamma) == (alpha, gamma)
    assert str(preset) == f"{name} (alpha={alpha:g}, gamma={gamma:g})"


def test_depth_mup_in_numbers():
    r = rule("depth_mup", "hidden", 512, 128)  # r_n = 4, r_L = 16
    assert r.multiplier == 128**-0.5
    assert r.lr_scale("adamw") == 1 / 16
    assert r.lr_scale("sgd") == 1
    assert r.eps_scale() == 1 / 16
    assert r.weight_decay_scale("adamw") == 16


@pytest.mark.parametrize(("name", "alpha"), [("completep", 1.0), ("depth_mup", 0.5)])
def test_completeps_table(name, alpha):
    """Table 1 of arXiv 2505.01618, row by row: width 4 x and depth 16 x the base's."""
    width, depth, m_n, m_l = 512, 128, 4, 16
    close = math.isclose

    embedding = rule(name, "input", width, depth)
    assert embedding.lr_scale("adamw") == 1
    assert embedding.init_std == rule(name, "input", 128, 8).init_std
    assert embedding.weight_decay_scale("adamw") == 1

    for role in ("norm", "bias"):
        block = rule(name, role, width, depth)
        assert close(block.lr_scale("adamw"), m_l ** (alpha - 1))
        assert close(block.eps_scale(), m_l**-alpha / m_n)
        assert not block.decays

    hidden, base = rule(name, "hidden", width, depth), rule(name, "hidden", 128, 8)
    assert close(hidden.init_std**2, base.init_std**2 / m_n)
    assert close(hidden.lr_scale("adamw"), m_l ** (alpha - 1) / m_n)
    assert close(hidden.multiplier, base.multiplier * m_l**-alpha)
    assert close(hidden.eps_scale(), m_l**-alpha / m_n)
    # Theirs is m_n alone: learning rate times decay then falls with depth, unless alpha is 1.
    assert close(hidden.weight_decay_scale("adamw"), m_n * m_l ** (1 - alpha))

    final = rule(name, "final_norm", width, depth)
    assert final.lr_scale("adamw") == 1

    # Theirs are W / m_n, with W of standard deviation s and learning rate eta.
    output, base = (rule(name, "output", *s, output_std=0.3) for s in ((width, depth), (128, 8)))
    assert close(output.init_std, base.init_std / m_n)
    assert close(output.lr_scale("adamw"), 1 / m_n)
    assert close(output.lr_scale("adamw") * output.weight_decay_scale("adamw"), 1)

    # q.k / head_size, up to a constant.
    scales = [PRESETS[name].attention_scale(size, 64) for size in (64, 128)]
    assert scales == [64**-0.5, 64**-0.5 / 2]


def test_attention_scale_without_a_width_rule_is_the_usual_one():
    assert PRESETS["standard"].attention_scale(64, 16) == 1 / 8
    assert PRESETS["mup"].attention_scale(64) == 1 / 8


def test_depth_mups_multiplier_is_exactly_one_over_root_depth():
    for depth in (1, 2, 3, 5, 7, 8, 100, 1000, 1023):
        assert rule("depth_mup", "hidden", 64, depth).multiplier == depth**-0.5


def test_all_presets_agree_at_the_base_shape():
    for role in ROLES:
        rules = [rule(name, role, 128, 8, output_std=0.1) for name in PRESETS]
        assert all(r == rules[0] for r in rules)


def test_block_multiplier_is_the_one_at_the_base_depth():
    for name in PRESETS:
        assert rule(name, "hidden", 128, 8, block_multiplier=3.0).multiplier == 3.0
    assert rule("ode", "hidden", 128, 32, block_multiplier=3.0).multiplier == 0.75


def test_coupled_weight_decay_follows_the_gradient():
    """lr * decay / gradient size is fixed: what the decay adds to a gradient of its own size."""
    for role in ("input", "hidden", "output"):
        r = rule("depth_mup", role, 512, 128)
        for optimizer in ("adam", "sgd"):
            relative = r.lr_scale("adamw") * r.weight_decay_scale(optimizer) / r.grad_scale
            assert math.isclose(relative, 1)


def test_depth_zero_has_finite_rules():
    assert math.isfinite(rule("depth_mup", "hidden", 128, 0).multiplier)


def test_any_exponents():
    assert Parametrization.of((0.75, 0.25)) == Parametrization.of("0.75,0.25")
    assert Parametrization.of("0.75,0.25").name == "0.75,0.25"
    preset = PRESETS["ode"]
    assert Parametrization.of(preset) is preset


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ("depth_mpu", ValueError, "parametrization='depth_mpu'.*did you mean 'depth_mup'"),
        ("1,2,3", ValueError, "parametrization='1,2,3' is not one of"),
        (("a", "b"), ValueError, "parametrization="),
        ((math.nan, 0.5), ValueError, "alpha must be a finite number, got nan"),
        (7, TypeError, "parametrization must be a preset's name"),
    ],
)
def test_bad_parametrizations(value, error, words):
    with pytest.raises(error, match=words):
        Parametrization.of(value)


def test_bad_shapes_and_multipliers():
    for change, words in (
        ({"width": 0}, "width must be at least 1"),
        ({"depth": -2}, "depth must be at least 0"),
        ({"output_std": -1.0}, "output_std must not be negative"),
        ({"input_std": -1.0}, "input_std must not be negative"),
        ({"block_multiplier": math.inf}, "block_multiplier must be a finite number"),
    ):
        with pytest.raises(ValueError, match=words):
            rule("ode", "output", **{"width": 8, "depth": 8, **change})


def test_bad_roles_and_optimizers():
    with pytest.raises(ValueError, match=r"role='hiden'.*did you mean 'hidden'"):
        rule("ode", "hiden", 8, 8)
    with pytest.raises(ValueError, match=r"optimizer='adamv'.*did you mean 'adam"):
        rule("ode", "hidden", 8, 8).lr_scale("adamv")


def test_scaling_does_not_need_torch():
    code = """
import importlib.util, pathlib, sys, types
sys.modules["torch"] = None
spec = importlib.util.find_spec("depthnet")
package = types.ModuleType("depthnet")
package.__path__ = spec.submodule_search_locations
sys.modules["depthnet"] = package  # without running depthnet/__init__.py
import depthnet.scaling
print(depthnet.scaling.classify(0.5, 0.5).summary)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "Depth-muP" in result.stdout, result.stderr
