"""How fast is a training step of a residual stack?

    python bench/throughput.py
    python bench/throughput.py --isa avx2 --sections step --rounds 10
    python bench/throughput.py --device cuda

Forward and backward (the gradients of x and of all weights) of `residual_stack`, beside eager PyTorch,
torch.compile, the stack's matrix products alone, and the time that the products' multiply-adds take at
the least, at the rate of independent FMAs in registers.  Targets that even this least time would miss on
the machine are called out of reach.

On a GPU, the limit is the peak that the maker of the chip publishes; bandwidths are of the bytes that
depthnet's plan says must move; peak memory is what a call allocates above what is there before it.
"""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Callable
from functools import partial

import torch
from common import (
    argument_parser,
    chip,
    dtype_name,
    interleaved,
    parse_args,
    print_machine,
    print_table,
    write_csv,
)
from memory import peak_of
from stack import CLASSES, FEATURES, GPU_SHAPES, PlainResNet, Stack, plain_stack
from torch import Tensor
from torch.nn.functional import cross_entropy

import depthnet
from depthnet import _C
from depthnet.kernels import plan, residual_stack, use_backend
from depthnet.scaling import torch_param_groups

ROWS = 128
SHAPES = [(64, 64), (128, 64), (256, 64), (512, 32), (1024, 16)]  # (n, L)
DEPTHS = [64, 256, 1024, 4096, 8192]
MEMBERS = 33
TRAINING_SHAPES = [(64, 64), (256, 64)]
DTYPE_SHAPES = [(128, 64), (512, 32)]
BLOCKS = {
    "plain": {},
    "block_depth=2": {"block_depth": 2},
    "norm=layer": {"norm": "layer"},
    "norm=rms": {"norm": "rms"},
    "activate=before": {"activate": "before"},
}
COMPILED_DEPTH = 64  # torch.compile unrolls the layers: at depth 1024 it would take an hour
LR = 1e-6  # small, so that the loss stays where it is and the work the same

BOTH = "forward+backward"
PRODUCTS = {"forward": 1, BOTH: 3}  # matrix products a layer: h; and the gradients of x and W
GEMMS, LIMIT = "bare GEMMs", "FMA limit"

# Per shape: how often as fast as the better of eager and compile, at least; the time as a part of the
# bare GEMMs', at most; the part of the FMA limit that is reached, at least, where there is a target.
# Sets narrower than AVX2 are held to AVX2's.
TARGETS = {
    "avx512": {
        (64, 64): (8, 0.55, None),
        (128, 64): (6, 0.6, 0.55),
        (256, 64): (5, 0.65, 0.55),
        (512, 32): (3, 0.65, 0.55),
        (1024, 16): (1.8, 0.75, None),
    },
    "avx2": {
        (64, 64): (8, 0.8, None),
        (128, 64): (6, 0.8, 0.65),
        (256, 64): (5, 1.0, 0.65),
        (512, 32): (3, 1.0, 0.65),
        (1024, 16): (1.8, 1.0, None),
    },
}


def flop(mode: str, n: int, depth: int, rows: int) -> int:
    """Of the stack's matrix products."""
    return 2 * PRODUCTS[mode] * rows * n * n * depth


def fma_limit(mode: str, n: int, depth: int, rows: int = ROWS) -> dict[str, Callable]:
    """For `interleaved`: the seconds that the matrix products take at the peak rate of FMAs."""
    work = flop(mode, n, depth, rows)
    return {LIMIT: lambda seconds: work / _C.fma_peak(seconds, torch.get_num_threads())}


def compiled(stack: Stack, run: Callable) -> Callable:
    """`run(function)` of the compiled plain stack, after the first call, which compiles."""
    torch._dynamo.reset()
    function = torch.compile(plain_stack, fullgraph=True, dynamic=False)
    start = time.perf_counter()
    run(function)
    depth, n, _ = stack.weight.shape
    print(f"torch.compile n={n} L={depth}: {time.perf_counter() - start:.0f} s", flush=True)
    return lambda: run(function)


def bare_gemms(stack: Stack) -> Callable:
    """Three products a layer, into memory allocated beforehand.

    The operands of rows are the same in all layers, so that they stay in the caches.
    """
    x, grad = stack.x.detach(), stack.grad
    h, grad_x = torch.empty_like(x), torch.empty_like(x)
    grad_weights = [torch.empty_like(layer) for layer in stack.layers]
    weights = [layer.detach() for layer in stack.layers]
    transposed, grad_t = [weight.T for weight in weights], grad.T

    def run():
        for weight in transposed:
            torch.mm(x, weight, out=h)
        for weight, grad_weight in zip(weights, grad_weights, strict=True):
            torch.mm(grad_t, x, out=grad_weight)
            torch.mm(grad, weight, out=grad_x)

    return run


def records(
    times: dict[str, float],
    *,
    section: str,
    n: int,
    depth: int,
    kernel: str = "residual_stack",
    mode: str = BOTH,
    members: int = 1,
    rows: int = ROWS,
    dtype: torch.dtype = torch.float32,
) -> list[dict]:
    key = {
        "section": section,
        "kernel": kernel,
        "mode": mode,
        "n": n,
        "depth": depth,
        "members": members,
        "rows": rows,
        "dtype": dtype_name(dtype),
    }
    return [
        {**key, "provider": provider, "ms": f"{seconds * 1e3:.5f}"}
        for provider, seconds in times.items()
    ]


def milliseconds(times: dict[str, float]) -> list[float]:
    return [seconds * 1e3 for seconds in times.values()]


JUDGED = ("reached", "target", "limit", "")


def judged(value: float, reaches: Callable, target: float, limit: float) -> tuple:
    """The columns JUDGED; `limit` is the value of a code that runs at the FMA limit."""
    passes, possible = reaches(value, target), reaches(limit, target)
    verdict = "pass" if passes else "miss" if possible else "out of reach"
    sign = {operator.ge: "≥", operator.le: "≤"}[reaches]
    return value, f"{sign} {target}", limit, verdict


def step(rounds: int) -> list[dict]:
    """A training step at the shapes of SHAPES."""
    targets = TARGETS["avx512" if _C.selected_isa().startswith("avx512") else "avx2"]
    rows, table, verdicts = [], [], []
    for n, depth in SHAPES:
        stack = Stack(n, depth, ROWS)
        times = interleaved(
            {
                "depthnet": stack.depthnet_step,
                "eager": stack.eager_step,
                "compile": compiled(stack, stack.eager_step),
                GEMMS: bare_gemms(stack),
            },
            rounds,
            limits=fma_limit(BOTH, n, depth),
        )
        rows += records(times, section="step", n=n, depth=depth)
        ours, gemms, least = times["depthnet"], times[GEMMS], times[LIMIT]
        best = min(times["eager"], times["compile"])
        table.append((n, depth, *milliseconds(times), best / ours, ours / gemms, least / ours))
        speedup, of_gemms, of_limit = targets[n, depth]
        judgements = {
            "best / depthnet": judged(best / ours, operator.ge, speedup, best / least),
            f"depthnet / {GEMMS}": judged(ours / gemms, operator.le, of_gemms, least / gemms),
        }
        if of_limit is not None:
            reached = judged(least / ours, operator.ge, of_limit, 1.0)
            judgements[f"{LIMIT} / depthnet"] = reached
        verdicts += [(n, depth, ratio, *columns) for ratio, columns in judgements.items()]
    print_table(
        "Forward + backward, ms (best: the better of eager and compile)",
        ("n", "L", *times, "best / depthnet", f"depthnet / {GEMMS}", f"{LIMIT} / depthnet"),
        table,
    )
    print_table("Targets", ("n", "L", "", *JUDGED), verdicts)
    return rows


def passes(rounds: int) -> list[dict]:
    """The passes of a step, each against the FMA limit of its products."""
    rows, table = [], []
    for n, depth in SHAPES:
        stack = Stack(n, depth, ROWS)
        x, grad = stack.x, stack.grad
        output = stack.depthnet()
        frozen = residual_stack(x, stack.weight.detach(), stack.scale)
        backward = partial(torch.autograd.grad, grad_outputs=grad, retain_graph=True)
        times = interleaved(
            {
                "forward": stack.depthnet,
                "backward-data": partial(backward, frozen, x),
                "backward": partial(backward, output, (x, stack.weight)),
            },
            rounds,
            limits=fma_limit("forward", n, depth),
        )
        least = times.pop(LIMIT)
        times["backward-weight"] = times["backward"] - times["backward-data"]
        for mode, seconds in times.items():
            rows += records({"depthnet": seconds}, section="passes", mode=mode, n=n, depth=depth)
        share = [times[mode] / least for mode in ("forward", "backward-data", "backward-weight")]
        table.append((n, depth, *milliseconds(times), *(f"{100 / each:.0f} %" for each in share)))
    print_table(
        "The passes of a step, ms, and the share of the FMA limit that each one of them reaches",
        ("n", "L", *times, "forward", "backward-data", "backward-weight"),
        table,
    )
    return rows


def depth(rounds: int) -> list[dict]:
    """Time a layer from depth 64 to 8192."""
    n = 64
    steps = {depth: Stack(n, depth, ROWS).depthnet_step for depth in DEPTHS}
    times = interleaved(steps, rounds)
    first = times[DEPTHS[0]] / DEPTHS[0]
    print_table(
        f"Forward + backward, n = {n}: time a layer relative to L = {DEPTHS[0]}",
        ("L", "ms", *JUDGED),
        [
            (depth, seconds * 1e3, *judged(seconds / depth / first, operator.le, 1.15, 1.0))
            for depth, seconds in times.items()
        ],
    )
    return [
        row
        for depth, seconds in times.items()
        for row in records({"depthnet": seconds}, section="depth", n=n, depth=depth)
    ]


def blocks(rounds: int) -> list[dict]:
    """Blocks of several layers, with norms, and activated first, beside plain ones of as many layers."""
    rows, table = [], []
    for n, depth in TRAINING_SHAPES:
        stack = Stack(n, depth, ROWS)
        inputs = stack.x, stack.weight

        def step(block, stack=stack, inputs=inputs):
            output = residual_stack(*inputs, stack.scale, **block)
            return torch.autograd.grad(output, inputs, stack.grad)

        providers = {name: partial(step, block) for name, block in BLOCKS.items()}
        times = interleaved(providers, rounds)
        rows += records(times, section="blocks", n=n, depth=depth)
        for name, seconds in times.items():
            table.append((n, depth, name, seconds * 1e3, seconds / times["plain"]))
    print_table("Blocks, forward + backward", ("n", "layers", "block", "ms", "times plain"), table)
    return rows


def population(rounds: int) -> list[dict]:
    """Many networks as one population against one call for each."""
    n, depth = 64, 64
    one, many = "depthnet", "one call a network"
    rows, table = [], []
    for batch in (ROWS, 16):
        together = Stack(n, depth, batch, population=(MEMBERS,))
        singles = [Stack(n, depth, batch) for _ in range(MEMBERS)]
        times = interleaved(
            {
                one: together.depthnet_step,
                many: lambda singles=singles: [single.depthnet_step() for single in singles],
            },
            rounds,
            limits=fma_limit(BOTH, n, depth, MEMBERS * batch),
        )
        rows += records(times, section="population", n=n, depth=depth, members=MEMBERS, rows=batch)
        reached = judged(times[many] / times[one], operator.ge, 2, times[many] / times[LIMIT])
        table.append((batch, *milliseconds(times), *reached))
    print_table(
        f"{MEMBERS} networks of n = {n}, L = {depth} as one population, forward + backward, ms",
        ("B", *times, *JUDGED),
        table,
    )
    return rows


@torch.no_grad()
def inference(rounds: int) -> list[dict]:
    """The forward pass alone at the shapes of SHAPES."""
    rows, table = [], []
    for n, depth in SHAPES:
        stack = Stack(n, depth, ROWS)
        times = interleaved(
            {
                "depthnet": stack.depthnet,
                "eager": stack.eager,
                "compile": compiled(stack, stack.eager),
            },
            rounds,
            limits=fma_limit("forward", n, depth),
        )
        rows += records(times, section="inference", mode="forward", n=n, depth=depth)
        best = min(times["eager"], times["compile"])
        table.append((n, depth, *milliseconds(times), best / times["depthnet"]))
    print_table("Inference, ms", ("n", "L", *times, "best / depthnet"), table)
    return rows


def training(rounds: int) -> list[dict]:
    """A whole training step of depthnet.ResNet, with loss and AdamW."""
    x, target = torch.randn(ROWS, FEATURES), torch.randint(CLASSES, (ROWS,))

    rows, table = [], []
    for n, depth in TRAINING_SHAPES:
        ours, plain = (depthnet.ResNet(FEATURES, n, depth, CLASSES) for _ in range(2))
        our_adamw = depthnet.optim.AdamW(ours, lr=LR)
        torch_adamw = torch.optim.AdamW(torch_param_groups(plain, LR), fused=True)

        def depthnet_step(model=ours, optimizer=our_adamw):
            train(model, optimizer, x, target)

        def reference_step(model=plain, optimizer=torch_adamw):
            with use_backend("reference"):
                train(model, optimizer, x, target)

        times = interleaved({"depthnet": depthnet_step, "reference": reference_step}, rounds)
        rows += records(
            times, section="training", kernel="ResNet", mode="training step", n=n, depth=depth
        )
        table.append((n, depth, *milliseconds(times), times["reference"] / times["depthnet"]))
    print_table(
        "ResNet, a step with loss and AdamW, ms (reference: plain PyTorch, fused AdamW)",
        ("n", "L", *times, "reference / depthnet"),
        table,
    )
    return rows


def dtypes(rounds: int) -> list[dict]:
    """A training step in bfloat16 and float64."""
    rows, table = [], []
    for dtype in (torch.bfloat16, torch.float64):
        for n, depth in DTYPE_SHAPES:
            stack = Stack(n, depth, ROWS, dtype)
            times = interleaved(
                {"depthnet": stack.depthnet_step, "eager": stack.eager_step}, rounds
            )
            rows += records(times, section="dtypes", n=n, depth=depth, dtype=dtype)
            ratio = times["eager"] / times["depthnet"]
            table.append((dtype_name(dtype), n, depth, *milliseconds(times), ratio))
    print_table(
        "Forward + backward in other dtypes, ms",
        ("dtype", "n", "L", *times, "eager / depthnet"),
        table,
    )
    return rows


def on_gpu(
    providers: dict[str, Callable[[], object]],
    rounds: int,
    section: str,
    n: int,
    depth: int,
    batch: int,
    dtype: torch.dtype,
    mode: str = BOTH,
    kernel: str = "residual_stack",
) -> tuple[list[dict], list[tuple]]:
    """Rows of the CSV and of the table: time, rates of the stack's work, and memory."""
    products = "forward" if mode == "forward" else BOTH
    own = plan((batch, n), (depth, n, n), dtype)
    moved = sum(launch.bytes for launch in own.forward) if mode == "forward" else own.bytes
    limit = chip().flops[dtype_name(dtype)] if chip() else None
    times = interleaved(providers, rounds, device="cuda")
    shape = {"n": n, "depth": depth, "rows": batch, "dtype": dtype}
    rows, lines = records(times, section=section, kernel=kernel, mode=mode, **shape), []
    for row, (name, seconds) in zip(rows, times.items(), strict=True):
        rate = flop(products, n, depth, batch) / seconds
        row["tflop_per_s"] = f"{rate / 1e12:.3f}"
        row["percent_of_peak"] = f"{100 * rate / limit:.2f}" if limit else "unknown chip"
        row["gb_per_s"] = f"{moved / seconds / 1e9:.1f}" if name == "depthnet" else ""
        # A whole step frees gradients first, and a captured one has its memory beforehand.
        row["peak_bytes"] = peak_of(providers[name], "cuda") if kernel == "residual_stack" else ""
        measured = (row[key] for key in COLUMNS)
        lines.append((mode, row["dtype"], n, depth, batch, name, seconds * 1e3, *measured))
    return rows, lines


COLUMNS = "tflop_per_s", "percent_of_peak", "gb_per_s", "peak_bytes"
HEADER = "", "dtype", "n", "L", "B", "", "ms", *COLUMNS


def stack(rounds: int) -> list[dict]:
    """On a GPU: the stack's training step and its inference."""
    rows, table = [], []
    for dtype, shape in itertools.product((torch.float32, torch.bfloat16), GPU_SHAPES):
        n, depth, batch = shape
        own = Stack(n, depth, batch, dtype, device="cuda")
        step = {"depthnet": own.depthnet_step, "eager": own.eager_step, GEMMS: bare_gemms(own)}
        inference = {name: torch.no_grad()(getattr(own, name)) for name in ("depthnet", "eager")}
        if depth <= COMPILED_DEPTH:
            step["compile"] = compiled(own, own.eager_step)
        for mode, providers in ((BOTH, step), ("forward", inference)):
            new = on_gpu(providers, rounds, "stack", *shape, dtype, mode)
            rows += new[0]
            table += new[1]
    print_table(f"Residual stack, {chip().name if chip() else 'unknown chip'}", HEADER, table)
    return rows


def train(model, optimizer, x: Tensor, target: Tensor) -> Tensor:
    """A training step; on a GPU in bfloat16 autocast."""
    optimizer.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
        loss = cross_entropy(model(x), target)
    loss.backward()
    optimizer.step()
    return loss


def network(rounds: int) -> list[dict]:
    """On a GPU: a whole training step of a network, in bfloat16 autocast; plain and as a CUDA graph."""
    rows, table = [], []
    for n, depth, batch in GPU_SHAPES:
        x = torch.randn(batch, FEATURES, device="cuda")
        target = torch.randint(CLASSES, (batch,), device="cuda")
        ours = [depthnet.ResNet(FEATURES, n, depth, CLASSES, device="cuda") for _ in range(2)]
        one, other = (partial(train, each, depthnet.optim.AdamW(each, lr=LR)) for each in ours)
        plain = PlainResNet(n, depth, device="cuda")
        plain_adamw = plain.adamw(LR)
        steps = {
            "depthnet": one,
            "depthnet, captured": depthnet.graphs.capture(other),
            "eager": partial(train, plain, plain_adamw),
        }
        if depth <= COMPILED_DEPTH:
            torch._dynamo.reset()
            steps["compile"] = partial(train, torch.compile(plain, dynamic=False), plain_adamw)
        for step in steps.values():
            for _ in range(5):  # compiled and captured before anything is timed
                step(x, target)
        providers = {name: partial(step, x, target) for name, step in steps.items()}
        new = on_gpu(
            *(providers, rounds, "network", n, depth, batch, torch.bfloat16),
            mode="training step",
            kernel="ResNet",
        )
        rows += new[0]
        table += new[1]
    print_table("ResNet, a step with loss and AdamW, bfloat16 autocast", HEADER, table)
    return rows


SECTIONS = {
    "cpu": (step, passes, depth, blocks, population, inference, training, dtypes),
    "cuda": (stack, network),
}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--isa",
        choices=_C.isas(),
        help="instruction set of depthnet's kernels and of the FMA limit, results in "
        "throughput_<isa>.csv; torch keeps its own (default: the widest, in throughput.csv)",
    )
    parser.add_argument(
        "--rounds", type=int, default=30, help="timings a provider (default: %(default)s)"
    )
    names = {device: [each.__name__ for each in own] for device, own in SECTIONS.items()}
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=[*names["cpu"], *names["cuda"]],
        help="what to measure; the CSV keeps its rows of all other sections (default: all; "
        f"{' and '.join(names['cuda'])} are a GPU's)",
    )
    args = parse_args(parser)
    for name in args.sections or ():
        if name not in names[args.device]:
            parser.error(f"--sections: there is no {name} on --device {args.device}")
    if args.isa:
        _C.select_isa(args.isa)
    print_machine(args.device)
    file = f"throughput_{args.isa}.csv" if args.isa else "throughput.csv"
    for section in SECTIONS[args.device]:
        if section.__name__ in (args.sections or names[args.device]):
            write_csv(file, section(args.rounds), "section", args.device)


if __name__ == "__main__":
    main()
