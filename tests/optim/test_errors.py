"""Everything is checked before the first write: after an error nothing has moved, and all goes on."""

import pytest
import torch
from optim.steps import NAMES, equal, gradients, momentum, parameters, snapshot, train
from torch.testing._internal.two_tensor import TwoTensor

import depthnet
from depthnet import kernels
from depthnet.kernels import native


def sparse(param):
    return param.detach().to_sparse()


def wrapped(param):
    return TwoTensor(torch.ones(param.shape), torch.ones(param.shape))


BAD = {
    "sparse": (sparse, RuntimeError, "does not take sparse gradients"),
    "wrapper": (wrapped, TypeError, "takes plain tensors and DTensors, got a TwoTensor of shape"),
}


@pytest.mark.parametrize("kind", list(BAD))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("after", [0, 2], ids=["at the first step", "later"])
def test_a_bad_gradient_of_the_last_parameter_leaves_the_first_alone(name, kind, after):
    """Parameters, states and counts; and the steps that follow are those of an optimizer without error,
    SGD's first gradient, which is not dampened, included."""
    make, error, words = BAD[kind]
    options = {"lr": 0.1, **momentum(name)} | ({"dampening": 0.5} if name == "SGD" else {})
    params, twin = parameters(), parameters()
    optimizer = getattr(depthnet.optim, name)(params, **options)
    train(optimizer, params, after)
    before = snapshot(optimizer)
    gradients(params, after)
    params[-1].grad = make(params[-1])
    for _ in range(2):
        with pytest.raises(error, match=f"{name} {words}"):
            optimizer.step()
        assert equal(before, snapshot(optimizer))
    train(optimizer, params, 2, first=after)
    train(getattr(depthnet.optim, name)(twin, **options), twin, after + 2)
    assert equal(params, twin)


@pytest.mark.skipif(native._C is None, reason="only a native backend refuses a layout")
@pytest.mark.parametrize("after", [0, 2], ids=["at the first step", "later"])
@pytest.mark.parametrize("name", NAMES)
def test_a_backend_that_cannot_run_the_last_parameter(name, after):
    options = {"lr": 0.1, **momentum(name)} | ({"dampening": 0.5} if name == "SGD" else {})
    params, twin = parameters(shapes=[(3,), (4, 5)]), parameters(shapes=[(3,), (4, 5)])
    optimizer = getattr(depthnet.optim, name)(params, **options)
    train(optimizer, params, after)
    before = [p.detach().clone() for p in params]
    gradients(params, after)
    params[1].grad = params[1].grad.mT.contiguous().mT
    with kernels.use_backend("cpu"), pytest.raises(RuntimeError, match="differ in layout"):
        optimizer.step()
    assert equal(before, params)
    train(optimizer, params, 2, first=after)
    train(getattr(depthnet.optim, name)(twin, **options), twin, after + 2)
    assert equal(params, twin)


def test_a_wrapper_as_parameter_is_refused():
    param = torch.nn.Parameter(wrapped(torch.zeros(2, 3)))
    param.grad = wrapped(param)
    with pytest.raises(TypeError, match="SGD takes plain tensors and DTensors, got a TwoTensor"):
        depthnet.optim.SGD([param], lr=0.1).step()


def test_what_is_no_list_of_parameters_is_refused_as_by_torch():
    param = torch.zeros(3, requires_grad=True)
    optimizer = depthnet.optim.SGD([param], lr=0.1)
    with pytest.raises(ValueError, match="can't optimize a non-leaf"):
        optimizer.add_param_group({"params": [param * 2]})
    with pytest.raises(TypeError, match=r"iterable of Tensors|can only optimize Tensors"):
        depthnet.optim.SGD([3.0], lr=0.1)
    with pytest.raises(ValueError, match="empty parameter list"):
        depthnet.optim.SGD([], lr=0.1)


def test_sparse_gradients_of_an_embedding_are_refused():
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    optimizer = depthnet.optim.AdamW(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="AdamW does not take sparse gradients"):
        optimizer.step()


def test_an_error_in_a_closure_leaves_everything_alone():
    params = parameters()
    optimizer = depthnet.optim.AdamW(params, lr=0.1)
    train(optimizer, params, 2)
    before = snapshot(optimizer)

    def closure():
        raise ArithmeticError("no loss today")

    with pytest.raises(ArithmeticError):
        optimizer.step(closure)
    assert equal(before, snapshot(optimizer))


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_state_of_another_shape_is_refused_whole(backend, name):
    """As from a checkpoint of another model: shapes that do not fit, and shapes that broadcast."""
    for shape in ((4, 5), (1, 6)):
        params, others = parameters(shapes=[(3,), (4, 6)]), parameters(shapes=[(3,), shape])
        other = getattr(depthnet.optim, name)(others, **momentum(name))
        train(other, others, 2)
        optimizer = getattr(depthnet.optim, name)(params, **momentum(name))
        optimizer.load_state_dict(other.state_dict())
        before = snapshot(optimizer)
        gradients(params, 0)
        with pytest.raises((RuntimeError, ValueError)):
            optimizer.step()
        assert equal(before, snapshot(optimizer))


def test_a_vector_as_lr_of_a_group_is_named():
    """Vectors belong into lr_scale; the constructor puts them there, nobody does between steps."""
    params = parameters(shapes=[(2, 3)])
    optimizer = depthnet.optim.AdamW(params, lr=0.1)
    train(optimizer, params, 1)
    optimizer.param_groups[0]["lr"] = torch.tensor([0.1, 0.2])
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match="lr"):
        optimizer.step()
    assert equal(before, snapshot(optimizer))
