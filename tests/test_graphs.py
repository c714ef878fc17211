"""Captured training steps: the same results as the plain loop, on every device.

Where there is no GPU a stand-in for torch.cuda keeps a log, and its graphs replay by running the step
again on the tensors that were captured.
"""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR
from torch.optim.optimizer import _global_optimizer_post_hooks

import depthnet
from depthnet import graphs
from depthnet.kernels import device_tables, use_backend

OPTIMIZERS = {
    "depthnet": lambda model, lr: depthnet.optim.AdamW(model, lr=lr, max_grad_norm=1.0),
    "torch": lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr, foreach=False),
}
SCHEDULERS = {
    "exponential": lambda optimizer: ExponentialLR(optimizer, 0.7),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 10),
    "one cycle": lambda optimizer: OneCycleLR(
        optimizer, 0.05, total_steps=20, cycle_momentum=False
    ),
}


class Training:
    """A small network, its optimizer, and one step of it."""

    def __init__(
        self, device="cpu", lr=0.01, make=OPTIMIZERS["depthnet"], scaler=None, backend="auto"
    ):
        generator = torch.Generator().manual_seed(0)
        self.model = depthnet.ResNet(6, 16, 4, 3, output_std=1.0, generator=generator).to(device)
        self.lr = torch.tensor(lr, device=device) if isinstance(lr, float) else lr.item()
        self.optimizer = make(self.model, self.lr)
        self.scaler, self.backend = scaler, backend

    def step(self, x, y, label_smoothing=0.0):
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(x), y, label_smoothing=label_smoothing)
        if self.scaler is None:
            loss.backward()
            with use_backend(self.backend):
                self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss

    def tensors(self):
        states = [self.optimizer.state[p] for p in self.model.parameters()]
        tensors = [*self.model.parameters(), *[t for state in states for t in state.values()]]
        if self.scaler is not None:
            tensors += [self.scaler._scale, self.scaler._growth_tracker]
        return tensors


def batches(number, device="cpu", size=8):
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        x = torch.randn(size, 6, generator=generator)
        y = torch.randint(3, (size,), generator=generator)
        yield x.to(device), y.to(device)


def losses_of(step, training, schedule=None, number=10, device="cpu"):
    scheduler = schedule(training.optimizer) if schedule else None
    losses = []
    for x, y in batches(number, device):
        losses.append(step(x, y).detach())
        if scheduler:
            scheduler.step()
    return torch.stack(losses)


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


# ---- without a GPU: plain calls ----


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=list(SCHEDULERS))
def test_on_the_cpu_it_is_the_plain_loop(make, schedule):
    plain, captured = Training(make=make), Training(make=make)
    want = losses_of(plain.step, plain, schedule)
    got = losses_of(graphs.capture(captured.step), captured, schedule)
    assert torch.equal(got, want)
    assert same(captured.tensors(), plain.tensors())
    assert captured.lr != 0.01  # the schedulers have moved the tensor itself
    assert captured.optimizer.param_groups[0]["lr"] is captured.lr


def test_on_the_cpu_arguments_and_outputs_are_those_of_the_function():
    calls = []

    def step(*args, **kwargs):
        calls.append((args, kwargs))
        return calls

    captured, x = graphs.capture(step), torch.ones(2)
    for size in (1, 2, 3, 4, 5, 6):
        assert captured(x[:1], "a", [size], key=x) is calls
    args, kwargs = calls[5]
    assert args[1:] == ("a", [6])
    assert kwargs["key"] is x


@pytest.mark.parametrize("warmup", [0, -1, 1.5, "3", True])
def test_warmup_is_a_positive_number(warmup):
    with pytest.raises((TypeError, ValueError), match=r"warmup must be .*, got "):
        graphs.capture(print, warmup=warmup)


# ---- a stand-in for the GPU ----


class Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name, self.device = cuda, name, torch.device("cpu")

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class Graph:
    """Its replay runs what was captured again."""

    def __init__(self, cuda):
        self.cuda, self.body = cuda, None

    def capture_begin(self, capture_error_mode):
        assert not self.cuda.capturing
        self.cuda.log.append(f"capture on {self.cuda.current.name}")
        self.cuda.capturing = self

    def capture_end(self):
        if not self.cuda.capturing:
            raise RuntimeError("the capture has been ended")
        self.cuda.log.append("captured")
        self.cuda.capturing = None

    def replay(self):
        self.cuda.log.append(f"replay on {self.cuda.current.name}")
        self.body()


class Cuda:
    """torch.cuda, as far as it is used, for tensors that are on the CPU."""

    def __init__(self):
        self.log, self.capturing = [], None
        self.main = self.current = Stream(self, "main")

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def traced(self, step_fn, tensors):
        """A step as a GPU sees it: what is captured executes nothing, and `tensors()` stay."""

        def run(*args, **kwargs):
            if not self.capturing:
                self.log.append(f"step on {self.current.name}")
                return step_fn(*args, **kwargs)
            before = [tensor.detach().clone() for tensor in tensors()]
            output = step_fn(*args, **kwargs)
            output.data.fill_(torch.nan)
            with torch.no_grad():
                for tensor, value in zip(tensors(), before, strict=True):
                    tensor.copy_(value)

            def body():
                output.data.copy_(step_fn(*args, **kwargs))

            self.capturing.body = body
            return output

        return run


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(graphs, "_on_gpu", lambda value: isinstance(value, torch.Tensor))
    monkeypatch.setattr(device_tables, "capturing", lambda: cuda.capturing is not None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(cuda, "side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: cuda.current)
    monkeypatch.setattr(torch.cuda, "stream", cuda.stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(cuda))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: cuda.log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return cuda


def captured_training(cuda, warmup=2, **options):
    training = Training(**options)
    step = graphs.capture(cuda.traced(training.step, training.tensors), warmup=warmup)
    return training, step


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
@pytest.mark.parametrize("schedule", [None, *SCHEDULERS.values()], ids=[None, *SCHEDULERS])
def test_every_call_is_one_step_of_the_plain_loop(cuda, make, schedule):
    plain = Training(make=make)
    training, step = captured_training(cuda, make=make)
    assert torch.equal(losses_of(step, training, schedule), losses_of(plain.step, plain, schedule))
    assert same(training.tensors(), plain.tensors())


def test_streams_and_graphs_are_used_in_order(cuda):
    training, step = captured_training(cuda, warmup=2)
    losses_of(step, training, number=5)
    warm = ["side waits for main", "step on side", "main waits for side"]
    replay = ["replay on main"]
    assert cuda.log == [
        *(warm * 2),
        *("synchronize", "capture on side", "captured"),
        *(replay * 3),
    ]


def test_outputs_are_the_callers(cuda):
    training, step = captured_training(cuda, warmup=1)
    losses = [step(x, y) for x, y in batches(6)]
    kept = [loss.clone() for loss in losses]
    step(*next(batches(1)))
    assert same(losses, kept)
    assert len(set(torch.stack(losses).tolist())) == 6
    assert losses[0].requires_grad  # of a plain call
    assert not losses[-1].requires_grad
    assert training.model.training


def test_inputs_may_be_nested_and_are_not_written(cuda):
    weight = torch.ones(3, requires_grad=True)
    optimizer = depthnet.optim.SGD([weight], lr=torch.tensor(0.1))

    def step(pair, power, *, batch):
        optimizer.zero_grad()
        loss = mse_loss(pair[0] * weight**power + batch["shift"], pair[1][0])
        loss.backward()
        optimizer.step()
        return loss

    captured = graphs.capture(cuda.traced(step, lambda: [weight]), warmup=1)
    want, got, given, copies = [], [], [], []
    for into, function in ((want, step), (got, captured)):
        with torch.no_grad():
            weight.fill_(1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            a, b, c = torch.randn(3, 3, generator=generator)
            given += [a, b, c]
            copies += [a.clone(), b.clone(), c.clone()]
            into.append(function((a, [b]), 2, batch={"shift": c}).detach())
    assert same(want, got)
    assert same(given, copies)


def test_keyword_arguments_have_no_order(cuda):
    _, step = captured_training(cuda, warmup=1)
    for x, y in batches(2):
        step(x=x, y=y)
    step(y=y, x=x)
    assert cuda.log.count("replay on main") == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda x, y: ((x[:4], y), {}),
            ValueError,
            r"args\[0\] must be as in the captured call, a torch.float32 of shape \(8, 6\) on cpu, "
            r"got a torch.float32 of shape \(4, 6\) on cpu",
        ),
        (lambda x, y: ((x, y.int()), {}), ValueError, r"args\[1\] must .*int64.*got .*int32"),
        (
            lambda x, y: ((x.to("meta"), y), {}),
            ValueError,
            r"args\[0\] must .* on cpu, got .* on meta",
        ),
        (
            lambda x, y: ((x.clone().requires_grad_(), y), {}),
            ValueError,
            r"args\[0\] must .*, got .* that requires a gradient",
        ),
        (lambda x, y: ((x, 3), {}), ValueError, r"args\[1\] must .*, a torch.int64 .*, got 3"),
        (
            lambda x, y: ((x, y), {"label_smoothing": 0.2}),
            ValueError,
            r"kwargs\['label_smoothing'\] must be as in the captured call, 0.1, got 0.2",
        ),
        (
            lambda x, y: ((x,), {"y": y}),
            TypeError,
            r"must be structured as in the captured call, \(\(\*, \*\), \{'label_smoothing': \*\}\), "
            r"got \(\(\*,\), \{'label_smoothing': \*, 'y': \*\}\)",
        ),
        (lambda x, y: ((x, [y]), {}), TypeError, r"got \(\(\*, \[\*\]\), "),
    ],
)
def test_inputs_that_do_not_fit_the_graph(cuda, change, error, message):
    training, step = captured_training(cuda, warmup=1)
    for x, y in batches(3):
        step(x, y, label_smoothing=0.1)
    before = [t.clone() for t in training.tensors()]
    args, kwargs = change(x, y)
    with pytest.raises(error, match=message):
        step(*args, **{"label_smoothing": 0.1, **kwargs})
    assert same(before, training.tensors())
    step(x, y, label_smoothing=0.1)
    assert not same(before, training.tensors())


def test_inputs_on_two_devices(cuda):
    training, step = captured_training(cuda)
    x, y = next(batches(1))
    with pytest.raises(
        ValueError, match=r"args\[1\] must be on cpu, as the other .* on meta; move"
    ):
        step(x, y.to("meta"))
    with pytest.raises(ValueError, match=r"args\[0\] must not require a gradient"):
        step(x.requires_grad_(), y)
    assert cuda.log == []
    assert training.optimizer.state == {}


# ---- what a graph has fixed of the optimizers ----


def test_a_number_that_changes_is_an_error(cuda):
    """A replay would use the number of the capture."""
    training, step = captured_training(cuda, lr=torch.tensor(0.01))
    scheduler = ExponentialLR(training.optimizer, 0.5)
    data = list(batches(4))
    for x, y in data[:3]:
        step(x, y)
    scheduler.step()
    before = [t.clone() for t in training.tensors()]
    with pytest.raises(
        RuntimeError,
        match=r"AdamW.param_groups\[0\]\['lr'\] was 0.0\d+ when the step was captured, and is 0.0\d+ "
        r"now; .*make it a 0-dim tensor on the GPU",
    ):
        step(*data[3])
    assert same(before, training.tensors())


def test_a_scheduler_inside_the_step_is_an_error(cuda):
    training = Training(lr=torch.tensor(0.01))
    scheduler = ExponentialLR(training.optimizer, 0.5)

    def step_fn(x, y):
        loss = training.step(x, y)
        scheduler.step()
        return loss

    step = graphs.capture(cuda.traced(step_fn, training.tensors), warmup=1)
    data = list(batches(2))
    step(*data[0])
    with pytest.raises(RuntimeError, match=r"\['lr'\] was 0.0049\d* when .* and is 0.0024\d* now"):
        step(*data[1])


@pytest.mark.parametrize("key", ["betas", "weight_decay", "max_grad_norm", "lr_scale"])
def test_other_settings_that_change_are_errors(cuda, key):
    training, step = captured_training(cuda)
    for x, y in batches(3):
        step(x, y)
    group = training.optimizer.param_groups[-1]
    group[key] = {"betas": (0.5, 0.9), "lr_scale": torch.ones(4)}.get(key, 0.123)
    with pytest.raises(RuntimeError, match=rf"\['{key}'\] was .* when the step was captured"):
        step(x, y)


def test_a_replaced_lr_tensor_is_an_error(cuda):
    training, step = captured_training(cuda)
    for x, y in batches(3):
        step(x, y)
    training.optimizer.param_groups[0]["lr"] = training.lr.clone()
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['lr'\] was .* changes in place"):
        step(x, y)


def test_an_lr_on_the_cpu_is_a_number(cuda, monkeypatch):
    training, step = captured_training(cuda)
    for x, y in batches(2):
        step(x, y)
    monkeypatch.setattr(graphs, "_on_gpu", lambda v: isinstance(v, torch.Tensor) and v.ndim > 0)
    for x, y in batches(2):
        step(x, y)
    with torch.no_grad():
        training.lr.mul_(0.5)
    with pytest.raises(RuntimeError, match=r"\['lr'\] was 0.0099\d* when .* and is 0.0049\d* now"):
        step(x, y)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_a_state_that_was_loaded_needs_another_capture(cuda, make):
    training, step = captured_training(cuda, make=make)
    for x, y in batches(3):
        step(x, y)
    training.optimizer.load_state_dict(training.optimizer.state_dict())
    with pytest.raises(
        RuntimeError, match=r"AdamW has another state, .* capture the step anew after"
    ):
        step(x, y)
    plain = Training(make=make)
    again = graphs.capture(cuda.traced(training.step, training.tensors), warmup=1)
    for x, y in batches(3):
        plain.step(x, y)
    for x, y in batches(4):
        plain.step(x, y)
        again(x, y)
    assert same(training.tensors(), plain.tensors())


def test_plain_steps_between_replays(cuda):
    """Such as one of a smaller batch at the end of an epoch."""
    plain = Training()
    training, step = captured_training(cuda)
    for epoch in range(3):
        for x, y in batches(4):
            plain.step(x, y)
            step(x, y)
        for x, y in batches(1, size=3 + epoch):
            plain.step(x, y)
            training.step(x, y)
    assert same(training.tensors(), plain.tensors())


def test_warmup_lasts_until_grad_scaler_lets_a_step_be(cuda):
    """What a graph captures must find the optimizer's states made."""
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3) for _ in "ab"]
    plain = Training(scaler=scalers[0])
    training, step = captured_training(cuda, warmup=1, scaler=scalers[1])
    for x, y in batches(10):
        plain.step(x, y)
        step(x, y)
    assert cuda.log.count("step on side") > 2
    assert cuda.log.count("replay on main") > 2
    assert scalers[0].get_scale() == scalers[1].get_scale() < 2.0**127
    assert same(training.tensors(), plain.tensors())


# ---- failures ----


def test_a_capture_that_fails_says_where_and_why(cuda):
    training = Training()

    def step_fn(x, y):
        loss = training.step(x, y)
        if cuda.capturing:
            cuda.capturing.capture_end()  # the capture is invalid from here on
            raise RuntimeError(
                "CUDA error: operation not permitted when stream is capturing"
            )  # here
        return loss

    step = graphs.capture(step_fn, warmup=1)
    (x, y), *_ = batches(1)
    step(x, y)
    with pytest.raises(
        RuntimeError, match="could not be captured as a CUDA graph, line "
    ) as raised:
        step(x, y)
    message = str(raised.value)
    assert f"of {__file__}: raise RuntimeError" in message
    assert "not permitted when stream is capturing\n" in message
    assert ".item()" in message
    assert str(raised.value.__cause__).startswith("CUDA error")
    assert cuda.current is cuda.main
    assert not cuda.capturing


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_other_errors_of_the_step_are_its_own(cuda, error):
    def step_fn(x):
        if cuda.capturing:
            raise error("mine")
        return x

    step, x = graphs.capture(step_fn, warmup=1), torch.ones(2)
    step(x)
    with pytest.raises(error, match="mine"):
        step(x)
    assert cuda.current is cuda.main
    assert not cuda.capturing
    assert not _global_optimizer_post_hooks


def test_a_graph_is_freed_with_its_step(cuda):
    """At once, by reference counts: the memory of a graph is large.  So after a failure."""
    _, step = captured_training(cuda)
    for x, y in batches(4):
        step(x, y)
    with pytest.raises(ValueError, match=r"args\[0\]"):
        step(x[:1], y)
    graph = weakref.ref(step._graph)
    gc.collect()
    gc.disable()
    try:
        del step
        assert graph() is None
    finally:
        gc.enable()


# ---- a GPU ----

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def close(left, right):
    """Far nearer than one step is long; libraries may choose other algorithms for a graph."""
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("backend", ["auto", "triton", "cuda", "reference"])
@pytest.mark.parametrize("schedule", [None, *SCHEDULERS.values()], ids=[None, *SCHEDULERS])
def test_on_a_gpu_it_is_the_plain_loop(backend, schedule):
    """The learning rate, a tensor, changes between replays."""
    reasons = {each.name: each.reasons for each in depthnet.kernels.backends()}
    if reasons.get(backend):
        pytest.skip("; ".join(reasons[backend]))
    plain, captured = (Training("cuda", backend=backend) for _ in range(2))
    got = losses_of(graphs.capture(captured.step), captured, schedule, device="cuda")
    want = losses_of(plain.step, plain, schedule, device="cuda")
    close([got, *captured.tensors()], [want, *plain.tensors()])
    assert all(state["step"] == 10 for state in captured.optimizer.state.values())


@needs_gpu
@pytest.mark.parametrize("set_to_none", [True, False])
def test_on_a_gpu_plain_steps_between_replays(set_to_none):
    """They write their own tables where the graph has its own."""
    plain, captured = Training("cuda"), Training("cuda")
    for training in (plain, captured):
        zero_grad = training.optimizer.zero_grad
        training.optimizer.zero_grad = lambda zero_grad=zero_grad: zero_grad(set_to_none)
    step = graphs.capture(captured.step)
    for epoch in range(3):
        for x, y in batches(5, "cuda"):
            plain.step(x, y)
            step(x, y)
        for x, y in batches(2, "cuda", size=3 + epoch):
            plain.step(x, y)
            captured.step(x, y)
    close(captured.tensors(), plain.tensors())


@needs_gpu
def test_on_a_gpu_two_graphs_of_one_optimizer():
    plain, captured = Training("cuda"), Training("cuda")
    steps = {size: graphs.capture(captured.step) for size in (8, 5)}
    for _ in range(6):
        for size, step in steps.items():
            for x, y in batches(1, "cuda", size):
                plain.step(x, y)
                step(x, y)
    close(captured.tensors(), plain.tensors())


@needs_gpu
def test_on_a_gpu_with_grad_scaler():
    scalers = [torch.amp.GradScaler("cuda", init_scale=2.0**127, growth_interval=3) for _ in "ab"]
    plain, captured = (Training("cuda", scaler=scaler) for scaler in scalers)
    step = graphs.capture(captured.step)
    for x, y in batches(14, "cuda"):
        plain.step(x, y)
        step(x, y)
    assert scalers[0].get_scale() == scalers[1].get_scale()
    close(captured.tensors(), plain.tensors())


@needs_gpu
def test_on_a_gpu_dropout_goes_on():
    x = torch.ones(1000, device="cuda")
    step = graphs.capture(lambda x: torch.nn.functional.dropout(x))
    masks = torch.stack([step(x) for _ in range(8)])
    assert len(set(map(tuple, masks.tolist()))) == 8


@needs_gpu
def test_on_a_gpu_a_failed_capture_is_explained_and_the_stream_restored():
    training = Training("cuda")

    def step_fn(x, y):
        loss = training.step(x, y)
        return loss.item()

    step = graphs.capture(step_fn, warmup=1)
    (x, y), *_ = batches(1, "cuda")
    before = torch.cuda.current_stream()
    step(x, y)
    with pytest.raises(RuntimeError, match=r"could not be captured.*return loss.item\(\)"):
        step(x, y)
    assert torch.cuda.current_stream() == before
    assert torch.ones(2, device="cuda").sum().item() == 2
