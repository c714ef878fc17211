"""Steps inside a CUDA graph, without a GPU: what is uploaded, kept, and refused."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from optim.steps import NAMES, equal, gradients, momentum, parameters, snapshot, train
from step_cases import ADAM, Parameter, make_tables
from torch.utils._python_dispatch import TorchDispatchMode

import depthnet
from depthnet.kernels import device_tables


class Copies(TorchDispatchMode):
    """The copies into some tensors, as a graph has them: whatever the source holds at a replay."""

    def __init__(self, targets):
        super().__init__()
        self.targets, self.nodes = {target.data_ptr() for target in targets}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default and args[0].data_ptr() in self.targets:
            self.nodes.append(args[:2])
        return function(*args, **(kwargs or {}))

    def replay(self):
        for target, source in self.nodes:
            target.copy_(source)


@pytest.fixture
def capturing(monkeypatch):
    """Says, inside its `with` block, that a graph is captured."""

    @contextmanager
    def block():
        with monkeypatch.context() as patch:
            patch.setattr(device_tables, "capturing", lambda: True)
            yield

    return block


class Uploads:
    """The tables of a step, with gradients at addresses of one's choice."""

    def __init__(self):
        self.host = make_tables("cpu", "adam", [Parameter(10), Parameter(7)], ADAM)
        self.device = device_tables.device_tables(self.host, chunk=64)

    def refresh(self, address):
        self.host.tensors["grad"] = address
        self.host.groups["lr"] = address / 1000
        assert device_tables.device_tables(self.host, chunk=64) is self.device

    def capture(self, *addresses):
        with Copies([self.device.tensors, self.device.groups]) as graph:
            for address in addresses:
                self.refresh(address)
        return graph

    def hold(self, address):
        """Whether the device has the tables for that address."""
        tensors = self.device.tensors.numpy().view(self.host.tensors.dtype)
        groups = self.device.groups.numpy().view(self.host.groups.dtype)
        return (tensors["grad"] == address).all() and (groups["lr"] == address / 1000).all()


# ---- the tables on the device ----


@pytest.mark.parametrize("before", [1, 2])
def test_a_graph_brings_its_own_tables(capturing, before):
    """Also where, at the capture, the device had them already: others are there at the replay."""
    uploads = Uploads()
    uploads.refresh(before)
    with capturing():
        graph = uploads.capture(2)
    uploads.refresh(3)
    uploads.refresh(4)
    assert uploads.hold(4)
    graph.replay()
    assert uploads.hold(2)


def test_a_step_after_a_replay_brings_its_own_tables(capturing):
    """Though they are those of the last step that the host knows of."""
    uploads = Uploads()
    with capturing():
        graph = uploads.capture(2)
    uploads.refresh(1)
    graph.replay()
    uploads.refresh(1)
    assert uploads.hold(1)


def test_two_graphs_have_two_tables(capturing):
    uploads = Uploads()
    uploads.refresh(1)
    with capturing():
        first, second = uploads.capture(2), uploads.capture(3)
    for _ in range(2):
        first.replay()
        assert uploads.hold(2)
        second.replay()
        assert uploads.hold(3)


def test_two_steps_in_one_graph(capturing):
    """Those that are alike share a buffer: not every torch can pin memory during a capture."""
    uploads = Uploads()
    with capturing():
        graph = uploads.capture(2, 3, 2)
    assert len(graph.nodes) == 6
    sources = [source.data_ptr() for _, source in graph.nodes]
    assert sources[:2] == sources[4:] != sources[2:4]
    graph.replay()
    assert uploads.hold(2)


def test_without_a_graph_only_changes_are_uploaded():
    uploads = Uploads()
    assert len(uploads.capture(1, 1, 1, 2, 2).nodes) == 4


# ---- what a step refuses to do inside a graph ----


@pytest.mark.parametrize("name", NAMES)
def test_a_first_step_is_refused(capturing, name):
    """Its states would be made anew, as zeros, by every replay."""
    params = parameters()
    optimizer = getattr(depthnet.optim, name)(params, lr=0.1, **momentum(name))
    gradients(params, 0)
    before = snapshot(optimizer)
    with (
        capturing(),
        pytest.raises(RuntimeError, match=rf"{name}: .* CUDA graph.*make a step outside"),
    ):
        optimizer.step()
    assert equal(before, snapshot(optimizer))
    train(optimizer, params, 1)
    with capturing():
        optimizer.step()
    assert not equal(before[:1], params[:1])


@pytest.mark.parametrize("change", ["a gradient more", "momenta with lr on a GPU", "a group more"])
def test_a_step_that_needs_other_tables_is_refused(capturing, monkeypatch, change):
    params = parameters()
    optimizer = depthnet.optim.AdamW(params[:3], lr=torch.tensor(0.1))
    gradients(params, 0)
    if change == "a gradient more":
        params[0].grad = None
    optimizer.step()
    if change == "a gradient more":
        gradients(params, 0)
    elif change == "a group more":
        optimizer.add_param_group({"params": params[3:]})
    else:
        monkeypatch.setattr("depthnet.optim.plan.on_devices", bool)
        optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    before = snapshot(optimizer)
    with capturing(), pytest.raises(RuntimeError, match=r"AdamW: .* for the same parameters"):
        optimizer.step()
    assert equal(before, snapshot(optimizer))


def test_steps_that_were_all_skipped_are_no_first_step(capturing):
    params = parameters()
    optimizer = depthnet.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    assert not optimizer.state_pending
    for skipped in (True, True, False):
        gradients(params, 0)
        optimizer.found_inf = torch.tensor(float(skipped))
        optimizer.step()
        assert optimizer.state_pending is skipped
        if skipped:
            with capturing(), pytest.raises(RuntimeError, match="GradScaler does not skip"):
                optimizer.step()
    before = snapshot(optimizer)
    with capturing():
        optimizer.step()
    assert not equal(before, snapshot(optimizer))


def test_tables_that_a_graph_reads_outlive_the_plan(capturing):
    """Other settings make other tables; those of the graph live as long as the optimizer."""
    params = parameters()
    optimizer = depthnet.optim.AdamW(params, lr=0.1)
    train(optimizer, params, 1)
    plain = [weakref.ref(batch.tables) for batch in optimizer._plan.batches]
    optimizer.param_groups[0]["amsgrad"] = True
    train(optimizer, params, 1)
    captured = [weakref.ref(batch.tables) for batch in optimizer._plan.batches]
    with capturing():
        optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = False
    train(optimizer, params, 1)
    gc.collect()
    assert not any(tables() for tables in plain)
    assert all(tables() for tables in captured)
    del optimizer
    gc.collect()
    assert not any(tables() for tables in captured)
