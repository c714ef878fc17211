"""The same bits on any number of threads, however the work is cut into pieces."""

import pytest
import torch
from cases import native
from optim.steps import (
    ADAM,
    SGD,
    crossed,
    equal,
    gradients,
    parameters,
    snapshot,
    states,
    threads,
    train,
)

import depthnet

# Pieces of work are 16384 elements, counted through all tensors: their ends fall inside tensors, on
# their ends, inside slices, and in runs of tensors that are shorter than a vector.
MANY = [
    (1,),
    (5_461, 3),
    (),
    (16_384,),
    (7,),
    (3, 15_000),
    *[(n,) for n in range(1, 40)],
    (33_333,),
]


def made(name, dtype, options, groups=3):
    params = parameters(dtype, MANY)
    shared = [{"params": params[i::groups], "lr": 0.01 * (i + 1)} for i in range(groups)]
    shared[0]["maximize"] = True
    return getattr(depthnet.optim, name)(shared, weight_decay=0.1, **options), params


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {}),
        ("Adam", {"amsgrad": True, "max_grad_norm": 1.0}),
        ("SGD", {"momentum": 0.9, "nesterov": True, "max_grad_norm": 1.0}),
        ("SGD", {}),
    ],
    ids=["AdamW", "Adam clipped", "SGD clipped", "SGD"],
)
def test_equal_bits_on_one_and_many_threads(backend, name, options, dtype):
    results = []
    for count in (1, 2, 3):
        with threads(count):
            optimizer, params = made(name, dtype, options)
            train(optimizer, params, 2)
            results.append(snapshot(optimizer))
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


@native
@pytest.mark.parametrize(
    "options",
    [{"master_weights": True}, {"stochastic_rounding": True, "max_grad_norm": 1.0}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equal_bits_with_masters_and_stochastic_rounding(backend, options, dtype):
    results = []
    for count in (1, 2, 3):
        with threads(count):
            optimizer, params = made("AdamW", dtype, options)
            train(optimizer, params, 2)
            results.append(snapshot(optimizer))
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_any_length_are_those_of_single_tensors(backend, dtype):
    """Rates for slices that end inside a piece of work: the bits of an optimizer over each slice alone."""
    stack = torch.randn(5, 7_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = stack.clone().requires_grad_()
    slices = [row.clone().requires_grad_() for row in stack]
    rates = [0.01, 0.02, 0.03, 0.04, 0.05]
    ours = depthnet.optim.AdamW([whole], lr=rates)
    groups = [{"params": [row], "lr": rate} for row, rate in zip(slices, rates, strict=True)]
    single = depthnet.optim.AdamW(groups)
    for step in range(3):
        whole.grad = torch.randn(5, 7_001, generator=torch.Generator().manual_seed(step)).to(dtype)
        for row, grad in zip(slices, whole.grad, strict=True):
            row.grad = grad.clone()
        ours.step()
        single.step()
    assert equal(whole.unbind(), slices)


@native
def test_a_parameter_does_not_depend_on_the_others_beside_it(backend):
    """Nor on their number: each is stepped to the bits that it has alone."""
    optimizer, params = made("AdamW", torch.float32, {}, groups=1)
    train(optimizer, params, 2)
    alone = parameters(torch.float32, MANY)
    singles = [depthnet.optim.AdamW([p], lr=0.01, weight_decay=0.1, maximize=True) for p in alone]
    for step in range(2):
        gradients(alone, step)
        for single in singles:
            single.step()
    assert equal(params, alone)
    assert equal(states(optimizer), [state for single in singles for state in states(single)])


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "options"), [("Adam", ADAM), ("SGD", SGD)], ids=["Adam", "SGD"])
def test_an_element_does_not_depend_on_where_it_lies(backend, name, options, dtype):
    """Whether a vector is full or not, the arithmetic is the same: of numbers that begin alike, tensors of
    every length get the same bits, with all options crossed."""
    lengths = [*range(1, 68, 3), 100]
    rows = crossed(options)
    generator = torch.Generator().manual_seed(0)
    start, *grads = torch.randn(4, 100, generator=generator).to(dtype)
    groups = [
        {"params": [start[:length].clone().requires_grad_() for length in lengths], **row}
        for row in rows
    ]
    optimizer = getattr(depthnet.optim, name)(groups, lr=0.01)
    for grad in grads:
        for group in groups:
            for param in group["params"]:
                param.grad = grad[: len(param)].clone()
        optimizer.step()
    for group, row in zip(groups, rows, strict=True):
        whole = group["params"][-1]
        for param in group["params"]:
            assert torch.equal(param, whole[: len(param)]), (row, len(param))
            for key, state in optimizer.state[param].items():
                if key != "step":
                    assert torch.equal(state, optimizer.state[whole][key][: len(param)]), (row, key)
