"""How long should a training step take on a GPU, by what is published of the chips?

    python bench/roofline.py

Everything here is predicted, nothing is measured on a GPU.  The step is that of a ResNet in bfloat16
autocast with float32 parameters: input layer, stack, output layer, loss, backward, AdamW.  What each
provider launches is traced on the CPU: eager PyTorch's operators other than views; torch.compile's kernels
after inductor's fusion; of depthnet the operators around the stack, and the stack's launches by its plan.

A kernel takes the time of its operations at the peak rate or that of its bytes at the memory's bandwidth,
whichever is longer, and a launch.  Every kernel reads and writes memory, even what a cache might hold.
That is the same for all providers, and they may well take longer.  "by plan" is depthnet's time with what
its plan says of the stack, which adds the L2's bandwidth, uneven loads and chains of layers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import NamedTuple

import plot
import torch
from common import computes, print_table, write_csv
from stack import CLASSES, FEATURES, GPU_SHAPES, PlainResNet
from torch import Tensor, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.exc import InductorError
from torch._inductor.ir import MultiOutput
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import depthnet
from depthnet.kernels import plan
from depthnet.kernels.chips import CHIPS, Chip
from depthnet.kernels.planning import OWN_HOST_SECONDS, TORCH_HOST_SECONDS

ADAMW_BYTES = 28  # an element: float32 p, m, v read and written, g read
DEPTHS = 2, 3, 4  # at which torch.compile's kernels are counted


class Kernel(NamedTuple):
    flops: int
    bytes: int


class Trace(TorchDispatchMode):
    """Collects what each operator would launch, its inputs and outputs being in memory."""

    def __init__(self):
        super().__init__()
        self.kernels = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "aten" and computes(func):  # depthnet's own are in its plan
            formula = flop_registry.get(func._overloadpacket)
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            new = [] if any(result.alias_info for result in func._schema.returns) else out
            moved = size([args, kwargs, new, written(func._schema.arguments, args, kwargs)])
            self.kernels[Kernel(flops, moved)] += 1
        return out


def written(parameters, args, kwargs) -> list:
    """The arguments that an operator writes to; an optimizer writes gradients only to unscale them."""
    given = {parameter.name: arg for parameter, arg in zip(parameters, args, strict=False)} | kwargs
    return [
        given.get(parameter.name)
        for parameter in parameters
        if parameter.alias_info and parameter.alias_info.is_write and parameter.name != "grads"
    ]


def size(tree) -> int:
    """Bytes of the tensors; what is repeated along a dimension lies in memory once."""
    return sum(
        leaf.element_size()
        * math.prod(n for n, stride in zip(leaf.shape, leaf.stride(), strict=True) if stride)
        for leaf in tree_leaves(tree)
        if isinstance(leaf, Tensor)
    )


def loss_of(model: Callable, rows: int) -> Tensor:
    x, target = torch.randn(rows, FEATURES), torch.randint(CLASSES, (rows,))
    with torch.autocast("cpu", torch.bfloat16):
        return cross_entropy(model(x), target)


def eager(n: int, depth: int, rows: int) -> tuple[Counter, Counter]:
    """The kernels of forward and backward, and those of the optimizer."""
    with FakeTensorMode():
        model = PlainResNet(n, depth)
        optimizer = model.adamw(1e-3)
        with Trace() as passes:
            loss_of(model, rows).backward()
        optimizer.step()  # the first one makes the state
        with Trace() as step:
            optimizer.step()
    return passes.kernels, step.kernels


def depthnet_around(n: int, depth: int, rows: int) -> Counter:
    """The kernels of forward and backward beside those of the stack."""
    with FakeTensorMode():
        model = depthnet.ResNet(FEATURES, n, depth, CLASSES)
        with Trace() as passes:
            loss_of(model, rows).backward()
    return passes.kernels


@cache
def fused(n: int, depth: int, rows: int) -> Counter:
    return after_fusion(lambda: PlainResNet(n, depth), lambda model: loss_of(model, rows))


def after_fusion(build: Callable[[], nn.Module], loss: Callable[[Callable], Tensor]) -> Counter:
    """The kernels of forward and backward after inductor's fusion, none of which is generated.

    loss: of the compiled model.
    """
    kernels = Counter()

    class Counted(Exception):
        pass

    def count(nodes):
        for node in nodes:
            # A result of an operator with several is no kernel, and its bytes are counted at the operator.
            if not isinstance(node, NopKernelSchedulerNode) and not isinstance(
                node.node, MultiOutput
            ):
                moved = node.get_read_write_buffers_sizes()
                kernels[Kernel(node.estimate_flops() or 0, moved)] += 1
        raise Counted

    def compile_inner(graph, inputs, **options):
        with suppress(InductorError):  # caused by Counted
            compile_fx_inner(graph, inputs, **options)
        return make_boxed_func(graph.forward)

    def backend(graph, inputs):
        return compile_fx(graph, inputs, inner_compile=compile_inner)

    torch._dynamo.reset()
    caches = {"fx_graph_cache": False, "fx_graph_remote_cache": False}
    with config.patch(_post_fusion_custom_pass=count, **caches), FakeTensorMode():
        model = torch.compile(build(), backend=backend, fullgraph=True, dynamic=False)
        loss(model).backward()
    return kernels


def compiled(n: int, depth: int, rows: int) -> Counter:
    """As `fused`, of a depth that would take long to compile: every layer adds the same kernels."""
    first, second, third = (fused(n, few, rows) for few in DEPTHS)
    layer = second - first
    assert first + layer == second
    assert second + layer == third
    total = Counter(first)
    for kernel, count in layer.items():
        total[kernel] += (depth - DEPTHS[0]) * count
    return total


def flops(kernels: Counter) -> int:
    return sum(count * kernel.flops for kernel, count in kernels.items())


def seconds(kernels: Counter, chip: Chip) -> float:
    """The least that the GPU takes."""
    return sum(
        count
        * (
            chip.launch_seconds
            + max(kernel.flops / chip.flops["bfloat16"], kernel.bytes / chip.memory_bandwidth)
        )
        for kernel, count in kernels.items()
    )


def record(kernels: Counter, device: float, host: float) -> dict[str, object]:
    """Launches are queued: a step takes as long as the GPU needs, or as the host needs to launch it."""
    moved = sum(count * kernel.bytes for kernel, count in kernels.items())
    return {
        "launches": kernels.total(),
        "gflop": f"{flops(kernels) / 1e9:.3f}",
        "mbyte": f"{moved / 1e6:.3f}",
        "device_ms": f"{device * 1e3:.4f}",
        "host_ms": f"{host * 1e3:.4f}",
        "ms": f"{max(device, host) * 1e3:.4f}",
    }


def training_step(n: int, depth: int, rows: int) -> list[dict]:
    """Rows of the CSV: every provider on every chip."""
    passes, torch_adamw = eager(n, depth, rows)
    after_fusion = compiled(n, depth, rows)
    assert flops(after_fusion) == flops(passes)
    around = depthnet_around(n, depth, rows)
    parameters = depth * n * n + n * (FEATURES + CLASSES)
    adamw = Counter([Kernel(0, ADAMW_BYTES * parameters)])
    records = []
    for arch, chip in CHIPS.items():
        stack = plan((rows, n), (depth, n, n), torch.bfloat16, arch)
        own = adamw.copy()
        for launch in stack.forward + stack.backward_data + stack.backward_weight:
            each = Kernel(launch.flops // launch.count, launch.bytes // launch.count)
            own[each] += launch.count
        everything = around + own
        host = TORCH_HOST_SECONDS * around.total() + OWN_HOST_SECONDS * own.total()
        by_plan = seconds(around + adamw, chip) + stack.seconds
        providers = {
            "depthnet": record(everything, seconds(everything, chip), host),
            "depthnet, by plan": record(everything, by_plan, host),
        }
        for name, kernels in {"eager": passes, "compile": after_fusion}.items():
            kernels = kernels + torch_adamw
            host = TORCH_HOST_SECONDS * kernels.total()
            providers[name] = record(kernels, seconds(kernels, chip), host)
        of = {"chip": chip.name, "n": n, "depth": depth, "rows": rows, "dtype": "bfloat16"}
        records += [
            {"evidence": "predicted", **of, "regime": stack.regime, "provider": name, **figures}
            for name, figures in providers.items()
        ]
    return records


def report(rows: list[dict]) -> None:
    lines = {}
    for row in rows:
        of = row["chip"], row["n"], row["depth"], row["rows"], row["regime"]
        lines.setdefault(of, {})[row["provider"]] = row
    providers = list(next(iter(lines.values())))
    for key, title in {
        "launches": "Launches of a training step",
        "ms": "PREDICTED ms of a training step",
        "device_ms": "PREDICTED ms of a training step that the host does not hold up, as in a CUDA graph",
    }.items():
        table = [(*of, *(float(own[name][key]) for name in providers)) for of, own in lines.items()]
        if key == "launches":
            table = [(*line[:5], *map(int, line[5:])) for line in table]
        print_table(title, ("", "n", "L", "B", "regime", *providers), table)


def main() -> None:
    print(f"{__doc__}\nAssumed:")
    print(f"{TORCH_HOST_SECONDS * 1e6:.0f} us of host time for a launch of torch's")
    print(f"{OWN_HOST_SECONDS * 1e6:.0f} us of host time for a launch of depthnet's")
    for chip in CHIPS.values():
        print(
            f"{chip.name}: {chip.flops['bfloat16'] / 1e12:.0f} TFLOP/s, "
            f"{chip.memory_bandwidth / 1e12:.2f} TB/s, L2 {chip.cache_bandwidth / 1e12:.1f} TB/s, "
            f"{chip.launch_seconds * 1e6:.1f} us between kernels"
        )
    rows = [row for shape in GPU_SHAPES for row in training_step(*shape)]
    report(rows)
    write_csv("roofline.csv", rows)
    plot.roofline()


if __name__ == "__main__":
    main()
