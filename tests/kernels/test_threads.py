"""Threads change no bit of a native result, nor do concurrent callers and forked children."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import cpu_isas, grads, native

from depthnet import kernels, optim


def inputs(lead=(), rows=300, n=70, depth=5, dtype=torch.float32):
    """x, weight and the gradient of the output: several panels of rows, several strips of columns."""
    x, g = (torch.randn(*lead, rows, n).to(dtype) for _ in range(2))
    return x, (torch.randn(*lead, depth, n, n) / n**0.5).to(dtype), g


def run(x, weight, g, every=None, **block):
    def stack(x, weight):
        return kernels.residual_stack(x, weight, 0.3, checkpoint_every=every, **block)

    return grads(stack, [x, weight], g)


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("every", [None, 2])
def test_residual_stack_has_equal_bits_on_any_number_of_threads(
    backend, dtype, lead, every, set_threads
):
    for rows in (1, 300):
        arguments = inputs(lead, rows, dtype=dtype)
        set_threads(1)
        expected = run(*arguments, every)
        for threads in (2, 3, 5):
            set_threads(threads)
            assert same(run(*arguments, every), expected), f"{rows} rows, {threads} threads"


@native
@pytest.mark.parametrize(
    "block",
    [{"block_depth": 2}, {"block_depth": 3, "norm": "layer"}, {"activate": "before"}],
    ids=str,
)
def test_other_blocks_have_equal_bits_on_any_number_of_threads(backend, block, set_threads):
    # So deep that the backward pass takes segments, of more blocks where panels are narrower.
    arguments = inputs(depth=60)
    set_threads(1)
    expected = run(*arguments, **block)
    assert not expected[2].isnan().any()
    for threads in (2, 3):
        set_threads(threads)
        assert same(run(*arguments, **block), expected), f"{threads} threads"


# A forked child has none of its parent's threads, and whoever waits for them waits for ever.  torch's
# own parallel operators do: the tensors are too small for them.  The parent is a process of its own, which
# can be stopped.
PARENT = """
import os
import torch
from depthnet import kernels

torch.set_num_threads(2)
x, weight = torch.randn(200, 64), torch.randn(5, 64, 64) / 8

def run():
    free = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = kernels.residual_stack(*free, 0.3)
    y.backward(x)
    h = kernels.scaled_residual(x, y.detach(), 0.5)
    return [y.detach(), h, *(tensor.grad for tensor in free)]

def right():
    return all(torch.equal(a, b) for a, b in zip(run(), expected))

expected = run()
"""
FORK = """
child = os.fork()
if child == 0:
    os._exit(0 if right() else 1)
assert os.waitpid(child, 0)[1] == 0
assert right()  # the parent goes on
print("right")
"""
LOADER = """
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        torch.set_num_threads(2)  # a worker starts with one
        return right()

for _ in range(2):  # epochs, each with new workers
    for batch in torch.utils.data.DataLoader(Rows(), num_workers=2, multiprocessing_context="fork"):
        assert batch.all() and right()
print("right")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="fork is the start method of Linux")
@pytest.mark.skipif(not cpu_isas(), reason="the native kernels are not built")
@pytest.mark.parametrize("child", [FORK, LOADER], ids=["fork", "DataLoader"])
def test_a_forked_child_can_use_the_kernels_after_its_parent_has(child):
    result = subprocess.run(
        [sys.executable, "-c", PARENT + child],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout.strip() == "right", result.stderr


@native
def test_concurrent_callers_do_not_touch_each_other(backend):
    def work(call):
        x, _, g, _ = call
        return [*run(*call), kernels.scaled_residual(x, g, 0.3)]

    calls = [(*inputs(rows=100 + i, n=40 + i), every) for i in range(12) for every in (None, 2)]
    expected = [work(call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, calls * 2))
    assert all(map(same, results, expected * 2))


@native
def test_every_kernel_lets_other_python_threads_run(backend, monkeypatch):
    """Between entry and return of a native function another thread counts on.

    While the interpreter takes the lock from no thread by itself, that thread can only count if the
    function has released it.
    """
    ticks, stop, released = 0, threading.Event(), set()

    def count():
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0)  # gives the lock back

    class Watched:
        def __getattr__(self, name):
            function = getattr(native_module, name)

            def call(*arguments):
                before = ticks
                result = function(*arguments)
                if ticks != before:
                    released.add(name)
                return result

            return call

    native_module = kernels.cpu._C
    monkeypatch.setattr(kernels.cpu, "_C", Watched())
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    counter = threading.Thread(target=count)
    counter.start()
    try:
        wanted = {
            f"residual{stack}_{way}" for stack in ("", "_stack") for way in ("forward", "backward")
        }
        wanted |= {"linear", "embedding_sum_forward", "embedding_sum_backward", "optimizer_step"}
        deadline = time.monotonic() + 60
        while not wanted <= released and time.monotonic() < deadline:
            x, weight, g = inputs()
            run(x, weight, g)
            grads(lambda x, h: kernels.scaled_residual(x, h, 0.3), [x, g], g)
            grads(kernels.linear, [x, weight[0]], g)
            index = torch.randint(len(x), (300, 70))
            grads(lambda x: kernels.embedding_sum(index, x), [x], g)  # noqa: B023
            weight.grad = torch.randn_like(weight)
            optim.AdamW([weight.requires_grad_()], lr=0.1).step()
        assert wanted <= released
    finally:
        stop.set()
        counter.join()
        sys.setswitchinterval(interval)
