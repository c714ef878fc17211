"""DTensors: shards are stepped where they are; what needs other ranks is refused."""

import copy

import pytest
import torch
import torch.distributed as dist
from optim.steps import NAMES, equal, momentum, parameters, snapshot

import depthnet

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


@pytest.fixture
def mesh():
    """One rank of four; no rank is ever spoken to, which a fake process group would not show."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        yield init_device_mesh("cpu", (4,))
    finally:
        dist.destroy_process_group()


@pytest.fixture
def gloo():
    """A mesh of one process, whose collectives are real."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def placed(tensor, mesh, *placements):
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(tensor, mesh, placements, run_check=False)


def train_placed(optimizer, pairs, mesh, placements, steps, first=0):
    """Equal gradients for DTensors' shards and for plain twins."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for param, twin in pairs:
            grad = torch.randn(twin.shape, generator=generator).to(twin.dtype)
            twin.grad, param.grad = grad.clone(), placed(grad.clone(), mesh, *placements)
        optimizer.step()


@pytest.mark.parametrize("kind", ["Shard", "Replicate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_shards_are_stepped_as_plain_tensors(mesh, name, dtype, kind):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placement = Shard(0) if kind == "Shard" else Replicate()
    plain = parameters(dtype, [(6, 5), (4,)])
    params = [torch.nn.Parameter(placed(p.detach().clone(), mesh, placement)) for p in plain]
    options = {"lr": 0.1, "weight_decay": 0.1, **momentum(name)}
    if dtype == torch.bfloat16:
        options["master_weights"] = True
    ours = getattr(depthnet.optim, name)(params, **options)
    twin = getattr(depthnet.optim, name)(plain, **options)
    pairs = list(zip(params, plain, strict=True))
    for step in range(4):
        train_placed(ours, pairs, mesh, [placement], 1, first=step)
        twin.step()
    assert equal([p.to_local() for p in params], plain)
    for param, p in pairs:
        for key, value in ours.state[param].items():
            assert isinstance(value, DTensor) == (key != "step")
            local = value.to_local() if key != "step" else value
            assert torch.equal(local, twin.state[p][key])


def test_checkpoints_of_shards(mesh):
    from torch.distributed.tensor import Shard

    plain = parameters(torch.bfloat16, [(6, 5)])
    params = [torch.nn.Parameter(placed(p.detach().clone(), mesh, Shard(0))) for p in plain]
    options = {"lr": 0.1, "master_weights": True}
    ours, twin = depthnet.optim.AdamW(params, **options), depthnet.optim.AdamW(plain, **options)
    pairs = list(zip(params, plain, strict=True))
    for step in range(4):
        if step == 2:
            state = copy.deepcopy(ours.state_dict())
            ours = depthnet.optim.AdamW(params)
            ours.load_state_dict(state)
        train_placed(ours, pairs, mesh, [Shard(0)], 1, first=step)
        twin.step()
    assert equal([p.to_local() for p in params], plain)


def test_a_real_process_group(gloo):
    """A model made of DTensors by distribute_tensor, forward, backward and all."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    weight, x = torch.randn(4, 3), torch.randn(5, 3)
    param = torch.nn.Parameter(distribute_tensor(weight.clone(), gloo, [Shard(0)]))
    plain = weight.clone().requires_grad_()
    ours, twin = depthnet.optim.AdamW([param], lr=0.1), depthnet.optim.AdamW([plain], lr=0.1)
    inputs = distribute_tensor(x, gloo, [Replicate()])
    for _ in range(3):
        for optimizer, w, data in ((ours, param, inputs), (twin, plain, x)):
            optimizer.zero_grad()
            (data @ w.mT).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(param.full_tensor(), plain)


def partial(grad, mesh):
    from torch.distributed.tensor import Partial

    return placed(grad, mesh, Partial())


def shard1(grad, mesh):
    from torch.distributed.tensor import Shard

    return placed(grad, mesh, Shard(1))


@pytest.mark.parametrize("wrong", [partial, shard1])
@pytest.mark.parametrize("after", [0, 2], ids=["at the first step", "later"])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_gradient_placed_otherwise_is_refused_whole(mesh, name, wrong, after):
    """That of the second parameter; the first does not move, and nothing is made of it."""
    from torch.distributed.tensor import Replicate

    plain = parameters(shapes=[(4,), (8, 8)])
    params = [torch.nn.Parameter(placed(p.detach().clone(), mesh, Replicate())) for p in plain]
    optimizer = getattr(depthnet.optim, name)(params, lr=0.1, **momentum(name))
    pairs = list(zip(params, plain, strict=True))
    train_placed(optimizer, pairs, mesh, [Replicate()], after)
    before = [t.to_local() if hasattr(t, "to_local") else t for t in snapshot(optimizer)]
    params[0].grad = placed(torch.ones(4), mesh, Replicate())
    shape = (8, 2) if wrong is shard1 else (8, 8)
    grad = wrong(torch.ones(shape), mesh)
    assert grad.shape == params[1].shape
    params[1].grad = grad
    with pytest.raises(ValueError, match=r"must be placed alike, got .*; redistribute it first"):
        optimizer.step()
    now = [t.to_local() if hasattr(t, "to_local") else t for t in snapshot(optimizer)]
    assert equal(before, now)


def test_rates_over_a_sharded_dimension_are_refused(mesh):
    from torch.distributed.tensor import Shard

    def step(dim, scale):
        local = torch.ones(2, 3, 4)
        param = torch.nn.Parameter(placed(local.clone(), mesh, Shard(dim)))
        param.grad = placed(local.clone(), mesh, Shard(dim))
        scale = torch.ones(param.shape[: len(scale)])
        depthnet.optim.SGD([{"params": [param], "lr_scale": scale}], lr=0.25).step()
        return param.to_local()

    with pytest.raises(ValueError, match="rates over the 1 leading dimensions need these whole"):
        step(0, (8,))
    with pytest.raises(ValueError, match="rates over the 2 leading dimensions need these whole"):
        step(1, (2, 12))
    assert (step(1, (2,)) == 0.75).all()
    assert (step(2, (2, 3)) == 0.75).all()


def test_norms_of_shards_are_refused_and_those_of_copies_are_not(mesh):
    from torch.distributed.tensor import Replicate, Shard

    for placement in (Shard(0), Replicate()):
        param = torch.nn.Parameter(placed(torch.zeros(4), mesh, placement))
        param.grad = placed(torch.ones(4), mesh, placement)
        optimizer = depthnet.optim.SGD([param], lr=1.0, max_grad_norm=1.0)
        if placement.is_replicate():
            optimizer.step()  # the norm is 2
            torch.testing.assert_close(param.to_local(), torch.full((4,), -0.5))
            continue
        with pytest.raises(ValueError, match="max_grad_norm: the norm of sharded gradients"):
            optimizer.step()
        assert not param.to_local().any()


def test_rates_of_copies_may_be_vectors(mesh):
    from torch.distributed.tensor import Replicate

    param = torch.nn.Parameter(placed(torch.zeros(2, 3), mesh, Replicate()))
    param.grad = placed(torch.ones(2, 3), mesh, Replicate())
    depthnet.optim.SGD([param], lr=[1.0, 2.0]).step()
    assert param.to_local().tolist() == [[-1.0] * 3, [-2.0] * 3]


def test_a_gradient_that_a_collective_still_brings(gloo):
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import Replicate

    param = torch.nn.Parameter(placed(torch.zeros(3), gloo, Replicate()))
    optimizer = depthnet.optim.SGD([param], lr=1.0)
    for step in (1, 2):
        arriving = AsyncCollectiveTensor(torch.arange(3.0))
        param.grad = placed(arriving, gloo, Replicate())
        assert type(param.grad._local_tensor) is AsyncCollectiveTensor
        optimizer.step()
        assert param.to_local().tolist() == [0.0, -step, -2.0 * step]
