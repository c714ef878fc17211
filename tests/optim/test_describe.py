"""How a step finds out what has changed: addresses and fingerprints of tensors, in C and in Python."""

import itertools

import pytest
import torch
from optim.steps import close, equal, gradients, parameters, snapshot, train
from torch.testing._internal.two_tensor import TwoTensor

import depthnet
from depthnet.kernels import native, step

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
needs_c = pytest.mark.skipif(not native.FAST_DESCRIBE, reason="only the fallback is here")


def zoo():
    """Tensors of which some are laid out alike, and none otherwise."""
    base = torch.zeros(4, 6)
    every = {
        "none": None,
        "base": base,
        "alike": torch.ones(4, 6),
        "parameter alike": torch.nn.Parameter(torch.ones(4, 6)),
        "wants gradient": torch.ones(4, 6, requires_grad=True),
        "result": torch.ones(4, 6, requires_grad=True) * 2,
        "view alike": torch.zeros(8, 6)[4:],
        "half of it": base[:2],
        "other half": base[2:],
        "transposed": torch.zeros(6, 4).mT,
        "gaps": torch.zeros(4, 12)[:, ::2],
        "expanded": torch.zeros(4, 1).expand(4, 6),
        "expanded too": torch.zeros(6).expand(4, 6),
        "other shape": torch.zeros(6, 4),
        "flat": torch.zeros(24),
        "more dims": torch.zeros(4, 6, 1),
        "0-dim": torch.zeros(()),
        "0-dim alike": torch.ones(()),
        "one": torch.zeros(1),
        "empty": torch.zeros(0),
        "empty alike": torch.zeros(0),
        "empty too": torch.zeros(0, 3),
        "channels last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "channels first": torch.zeros(2, 3, 4, 5),
        "negated": torch._neg_view(torch.zeros(4, 6)),
        "sparse": torch.zeros(4, 6).to_sparse(),
        "csr": torch.eye(4).to_sparse_csr(),
        "wrapper": TwoTensor(torch.zeros(4, 6), torch.zeros(4, 6)),
        "inference": inference_tensor(),
    }
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.uint8):
        every[str(dtype)] = torch.zeros(4, 6, dtype=dtype)
    return every


def inference_tensor():
    with torch.inference_mode():
        return torch.zeros(4, 6)


@needs_c
def test_the_fallback_says_what_the_c_function_says(monkeypatch):
    """Equal addresses; fingerprints are equal for two tensors in C exactly if they are so in Python."""
    every = zoo()
    tensors, names = list(every.values()), list(every)
    fast = step.describe(tensors)
    monkeypatch.setattr(step, "FAST_DESCRIBE", False)
    slow = step.describe(tensors)
    assert fast.shape == slow.shape == (2, len(tensors))
    for i, name in enumerate(names):
        if tensors[i] is not None and tensors[i].numel():
            assert fast[0, i] == slow[0, i], name
    for i, j in itertools.combinations(range(len(tensors)), 2):
        pair = f"{names[i]} and {names[j]}"
        assert (fast[1, i] == fast[1, j]) == (slow[1, i] == slow[1, j]), pair


@pytest.mark.parametrize("fast", [pytest.param(True, marks=needs_c), False])
def test_equal_fingerprints_are_equal_layouts(monkeypatch, fast):
    monkeypatch.setattr(step, "FAST_DESCRIBE", fast)
    every = zoo()
    forms = dict(zip(every, step.describe(list(every.values()))[1].tolist(), strict=True))
    same = ["base", "alike", "parameter alike", "wants gradient", "result", "view alike"]
    assert {forms[name] for name in same} == {forms["base"]}
    assert forms["half of it"] == forms["other half"]
    assert forms["0-dim"] == forms["0-dim alike"]
    assert forms["empty"] == forms["empty alike"]
    nothing = ["none", "sparse", "csr", "wrapper"]
    assert [forms[name] for name in nothing] == [0] * len(nothing)
    alike = {*same[1:], "other half", "0-dim alike", "empty alike", "inference", *nothing}
    distinct = [name for name in every if name not in alike]
    assert len({forms[name] for name in distinct} | {0}) == len(distinct) + 1


@pytest.mark.parametrize("fast", [pytest.param(True, marks=needs_c), False])
def test_addresses_are_those_of_the_first_elements(monkeypatch, fast):
    monkeypatch.setattr(step, "FAST_DESCRIBE", fast)
    every = zoo()
    addresses = dict(zip(every, step.describe(list(every.values()))[0].tolist(), strict=True))
    for name, tensor in every.items():
        if name in ("none", "sparse", "csr", "wrapper"):
            assert addresses[name] == 0, name
        elif tensor.numel():
            assert addresses[name] == tensor.data_ptr(), name


def test_nothing_is_described():
    assert step.describe([]).shape == (2, 0)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_steps_with_the_fallback_are_the_same(monkeypatch, name):
    results = []
    for fast in (native.FAST_DESCRIBE, False):
        monkeypatch.setattr(step, "FAST_DESCRIBE", fast)
        params = parameters()
        optimizer = getattr(depthnet.optim, name)(params, lr=0.1)
        train(optimizer, params, 3)
        gradients(params, 3)
        params[1].grad = None
        params[2].grad = params[2].grad.mT.contiguous().mT
        optimizer.step()
        train(optimizer, params, 2, first=4)
        results.append(snapshot(optimizer))
    assert equal(*results)


def test_many_tensors_and_dimensions():
    """Up to 64 dimensions, and some thousand tensors."""
    deep = [torch.zeros([1] * dims) for dims in (1, 8, 25, 64)]
    forms = step.describe(deep)[1]
    assert len(set(forms.tolist())) == len(deep)
    params = [torch.ones(2, dtype=torch.float64).requires_grad_() for _ in range(3000)]
    twins = [torch.ones(2, dtype=torch.float64).requires_grad_() for _ in range(3000)]
    train(depthnet.optim.SGD(params, lr=0.1), params, 2)
    train(torch.optim.SGD(twins, lr=0.1), twins, 2)
    close(params, twins, steps=2)
