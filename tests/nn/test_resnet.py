import copy
import math
import pickle

import pytest
import torch
from cases import plain_stack
from torch.nn.functional import cross_entropy

import depthnet
from depthnet import ResNet
from depthnet.nn import ResidualStack
from depthnet.scaling import PRESETS


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_forward_is_the_formula():
    model = ResNet(6, 16, 5, 3, output_std=1.0)
    x = torch.randn(4, 6)
    u, w, v = model.input.weight, model.blocks.weight, model.output.weight
    expected = plain_stack(x @ u.mT, w, 5**-0.5) @ v.mT
    torch.testing.assert_close(model(x), expected)


def test_initial_weights_have_their_sizes():
    model = ResNet(400, 300, 3, 10, output_std=1.0, base_width=100)
    assert model.input.weight.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert model.blocks.weight.std().item() == pytest.approx(300**-0.5, rel=0.02)
    assert model.output.weight.std().item() == pytest.approx(1 / 3, rel=0.05)
    assert not ResNet(4, 8, 2, 3).output.weight.any()


def test_all_presets_are_the_same_network_at_the_base_shape():
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    results = []
    for name in PRESETS:
        model = ResNet(
            6, 16, 4, 3, parametrization=name, base_width=16, base_depth=4, generator=generator()
        )
        optimizer = depthnet.optim.AdamW(model, lr=2**-6)
        for _ in range(3):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        results.append(loss.item())
    assert len(set(results)) == 1


def test_half_zero_is_depth_mup_with_its_axis_displaced():
    """At 4^k times the base depth, by exactly k octaves: depth_mup at lr is half_zero at lr * 2^-k."""
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    losses = {}
    for name, lr in (("depth_mup", 2.0**-7), ("half_zero", 2.0**-8)):
        model = ResNet(
            *(6, 16, 16, 3),
            parametrization=name,
            base_width=16,
            base_depth=4,
            generator=generator(),
        )
        groups = model.param_groups("adamw")
        for group in groups:
            group["lr"] = lr if group["name"] == "hidden" else 2.0**-7
        optimizer = depthnet.optim.AdamW(
            groups, weight_decay=0.0
        )  # lr * decay would be displaced too
        losses[name] = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["depth_mup"] == losses["half_zero"]
    assert losses["depth_mup"][-1] < losses["depth_mup"][0]


def test_param_groups_follow_the_table():
    model = ResNet(10, 256, 32, 3)  # r_n = 2, r_L = 4
    adam = {g["name"]: g for g in model.param_groups("adamw")}
    assert adam["hidden"]["lr_scale"] == 1 / 4
    assert adam["hidden"]["eps_scale"] == 1 / 4
    assert adam["hidden"]["weight_decay_scale"] == 4
    assert (adam["input"]["lr_scale"], adam["input"]["eps_scale"]) == (1, 1 / 2)
    assert (adam["output"]["lr_scale"], adam["output"]["eps_scale"]) == (1 / 2, 1)
    sgd = {g["name"]: g["lr_scale"] for g in model.param_groups("sgd")}
    assert sgd == {"input": 2, "hidden": 1, "output": 1 / 2}


def test_member_of_a_population_is_the_single_network():
    shape, options = (6, 16, 5, 3), {"output_std": 0.3}
    population = ResNet(
        *shape, population=3, generator=[generator(s) for s in (5, 6, 5)], **options
    )
    x = torch.randn(3, 4, 6)
    y = population(x)
    for member, seed in enumerate((5, 6, 5)):
        single = ResNet(*shape, generator=generator(seed), **options)
        for name, parameter in single.named_parameters():
            assert torch.equal(population.get_parameter(name)[member], parameter)
        torch.testing.assert_close(y[member], single(x[member]))
    shared = population(x[0])
    torch.testing.assert_close(shared[0], y[0])
    assert shared.shape == (3, 4, 3)


@pytest.mark.parametrize("population", [None, 3])
def test_active_features_are_a_one_hot_input_never_materialised(population):
    options = {"population": population, "output_std": 1.0, "dtype": torch.float64}
    dense = ResNet(12, 16, 2, 3, **options)
    sparse = ResNet(12, 16, 2, 3, active_features=4, **options)
    with torch.no_grad():
        dense.input.weight.copy_(sparse.input.weight.mT)
        dense.blocks.weight.copy_(sparse.blocks.weight)
        dense.output.weight.copy_(sparse.output.weight)
    index = torch.stack([torch.randperm(12)[:4] for _ in range(5)])
    one_hot = torch.zeros(5, 12, dtype=torch.float64).scatter(1, index, 1.0)
    y = sparse(index)
    torch.testing.assert_close(y, dense(one_hot))
    y.square().sum().backward()
    dense(one_hot).square().sum().backward()
    torch.testing.assert_close(sparse.input.weight.grad, dense.input.weight.grad.mT)


@pytest.mark.parametrize("population", [None, 2])
def test_active_features_stay_in_their_member(population):
    model = ResNet(12, 16, 2, 3, population=population, active_features=4)
    for bad in (12, -1):
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.tensor([[0, 1, 2, bad]]))


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_deeper_blocks_are_the_formula(norm):
    model = ResNet(5, 16, 3, 2, block_depth=2, norm=norm, output_std=1.0, generator=generator())
    assert model.blocks.weight.shape == (6, 16, 16)
    x = torch.randn(4, 5)
    blocks = {"block_depth": 2, "norm": norm}
    stream = plain_stack(model.input(x), model.blocks.weight, model.blocks.scale, **blocks)
    torch.testing.assert_close(model(x), model.output(stream))
    (hidden,) = (g for g in model.param_groups("adamw") if g["name"] == "hidden")
    assert hidden["lr_scale"] == ResNet(5, 16, 3, 2).param_groups("adamw")[1]["lr_scale"]


def test_activation_before_the_product():
    model = ResNet(5, 16, 3, 2, activate="before", output_std=1.0)
    x = torch.randn(4, 5)
    stream = plain_stack(model.input(x), model.blocks.weight, model.blocks.scale, activate="before")
    torch.testing.assert_close(model(x), model.output(stream))
    assert "activate='before'" in repr(model)


def test_checkpointing_does_not_change_the_gradients():
    x = torch.randn(4, 6)
    gradients = []
    for every in (None, 3):
        model = ResNet(6, 16, 8, 3, output_std=1.0, checkpoint_every=every, generator=generator())
        model(x).square().sum().backward()
        gradients.append(model.blocks.weight.grad)
    torch.testing.assert_close(*gradients)


def test_state_dict_copy_and_pickle():
    model = ResNet(6, 16, 4, 3, output_std=1.0)
    x = torch.randn(4, 6)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {
        "input.weight": (16, 6),
        "blocks.weight": (4, 16, 16),
        "output.weight": (3, 16),
    }
    other = ResNet(6, 16, 4, 3)
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


def test_double_and_half_precision():
    model = ResNet(6, 16, 4, 3, output_std=1.0)
    x = torch.randn(4, 6)
    expected = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-5)
    y = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=0.1, atol=0.1)


def test_meta_device():
    model = ResNet(6, 16, 1000, 3, device="meta")
    assert model(torch.empty(4, 6, device="meta")).shape == (4, 3)


def test_repr_names_the_exponents():
    assert "depth_mup (alpha=0.5, gamma=0.5)" in repr(ResNet(2, 4, 3, 2))


def test_depth_zero():
    model = ResNet(6, 16, 0, 3, output_std=1.0)
    x = torch.randn(4, 6)
    torch.testing.assert_close(model(x), x @ model.input.weight.mT @ model.output.weight.mT)
    model(x).sum().backward()


def test_residual_stack_module():
    stack = ResidualStack(8, 4, activation=(1.0, 0.5), mean_subtract=False)
    x = torch.randn(3, 8)
    torch.testing.assert_close(stack(x), plain_stack(x, stack.weight, 0.5, (1.0, 0.5), False))


@pytest.mark.parametrize("depth", [64, 1024])
def test_activations_stay_of_size_one_at_any_depth(depth):
    """For |x| with multiplier L^-1/2 the mean square grows to exp(1 - 2/pi) = 1.438 at infinite width."""
    model = ResidualStack(256, depth, generator=generator())
    with torch.no_grad():
        x = torch.randn(64, 256, generator=generator(1))
        growth = model(x).square().mean() / x.square().mean()
    assert growth.item() == pytest.approx(math.exp(1 - 2 / math.pi), rel=0.1)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"depth": -1}, ValueError, "depth must be at least 0, got -1"),
        ({"depth": 2.0}, TypeError, "depth must be an integer, got 2.0"),
        ({"width": 0}, ValueError, "width must be at least 1, got 0"),
        ({"activation": "gelu"}, ValueError, "activation='gelu' is not one of"),
        ({"parametrization": "muP"}, ValueError, "parametrization='muP'.*did you mean 'mup'"),
        ({"population": 0}, ValueError, "population must be at least 1"),
        (
            {"generator": [generator()], "population": 2},
            ValueError,
            "one for each of the 2 members",
        ),
        (
            {"active_features": 9},
            ValueError,
            "active_features must be at most in_features, 4, got 9",
        ),
        ({"block_multiplier": math.inf}, ValueError, "block_multiplier must be a finite number"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1"),
        ({"base_depth": 0}, ValueError, "base_depth must be at least 1"),
        ({"block_depth": 0}, ValueError, "block_depth must be at least 1"),
        ({"norm": "batch"}, ValueError, "norm='batch' is not one of layer, rms"),
        ({"norm": "layer", "activate": "before"}, ValueError, "activate='before' goes without"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    arguments = {"in_features": 4, "width": 8, "depth": 2, "out_features": 3, **change}
    with pytest.raises(error, match=words):
        ResNet(**arguments)


@pytest.mark.parametrize(
    ("options", "x", "error", "words"),
    [
        ({}, torch.zeros(5, 3), ValueError, r"x must have the shape \(B, 4\), got \(5, 3\)"),
        ({}, torch.zeros(4), ValueError, r"x must have the shape \(B, 4\)"),
        (
            {"population": 2},
            torch.zeros(3, 5, 4),
            ValueError,
            r"\(B, 4\) or \(2, B, 4\), got \(3, 5, 4\)",
        ),
        ({}, torch.zeros(5, 4, dtype=torch.int64), TypeError, "x must have the dtype of the model"),
        ({"active_features": 2}, torch.zeros(5, 2), TypeError, "x must hold the int64 indices"),
    ],
)
def test_bad_inputs_are_named(options, x, error, words):
    with pytest.raises(error, match=words):
        ResNet(4, 8, 2, 3, **options)(x)
