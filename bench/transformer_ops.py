"""How fast are the operators between a transformer's products, beside PyTorch's own and their fusion?

    python bench/transformer_ops.py
    python bench/transformer_ops.py --device cuda

residual_norm (layer, rms), mlp_activation (gelu, swiglu, abs; four times as wide), rotary (heads of 64):
forward and forward with backward, beside eager PyTorch, torch.compile, and a plain copy of the same number
of bytes (the limit of the memory).  Every provider is called as a user calls it: through autograd, and it
allocates its results.  The bytes are those of inputs, results and their gradients, each once a pass.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from common import argument_parser, dtype_name, interleaved, parse_args, print_machine, write_csv
from torch import Tensor
from torch.nn import functional as F
from transformer import HEAD, activated, angles, turned

from depthnet import kernels
from depthnet.kernels.mlp_activation import MLPS
from depthnet.nn.transformer import rotations

SHAPES = [(1024, 128), (2048, 256), (8192, 768)]  # tokens, width
TEXT = 128  # tokens of it
SCALE, EPS = 0.1, 1e-5
SINGLE, HALF = torch.float32, torch.bfloat16


class Case(NamedTuple):
    ours: Callable
    plain: Callable  # what a user of torch writes
    inputs: list[Tensor]
    grads: list[Tensor]  # of the outputs
    forward_bytes: int
    backward_bytes: int


def residual_norm(norm: str, tokens: int, n: int, stream, narrow, random) -> Case:
    def ours(x, branch, weight):
        return kernels.residual_norm(x, branch, SCALE, weight, norm=norm, eps=EPS)

    def plain(x, branch, weight):
        s = x + SCALE * branch
        if norm == "layer":
            y = F.layer_norm(s, weight.shape, weight, None, EPS)
        else:
            y = F.rms_norm(s, weight.shape, weight, EPS)
        return s, y.to(branch.dtype)

    x, branch, weight = random(stream, tokens, n), random(narrow, tokens, n), random(stream, n)
    grads = [random(stream, tokens, n), random(narrow, tokens, n)]
    once = x.nbytes + branch.nbytes
    return Case(ours, plain, [x, branch, weight], grads, 2 * once, 2 * once + x.nbytes)


def mlp_activation(kind: str, tokens: int, n: int, dtype, _, random) -> Case:
    def ours(h):
        return kernels.mlp_activation(h, kind)

    def plain(h):
        return activated(h, kind)

    h = random(dtype, tokens, 8 * n if kind == "swiglu" else 4 * n)
    grad = random(dtype, tokens, 4 * n)
    return Case(ours, plain, [h], [grad], h.nbytes + grad.nbytes, 2 * h.nbytes + grad.nbytes)


def rotary(_, tokens: int, n: int, dtype, __, random) -> Case:
    batch, heads = tokens // TEXT, n // HEAD
    qkv = random(dtype, batch, TEXT, 3, heads, HEAD)
    rotation = rotations(TEXT, HEAD).to(qkv.device, torch.float32)
    cos, sin = (table.to(qkv) for table in angles(TEXT))

    def ours(qkv):
        return kernels.rotary(qkv, rotation)

    def plain(qkv):
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return turned(q, cos, sin), turned(k, cos, sin), v

    grads = [random(dtype, batch, heads, TEXT, HEAD) for _ in range(3)]
    return Case(ours, plain, [qkv], grads, 2 * qkv.nbytes, 2 * qkv.nbytes)


PAIRS = [(SINGLE, SINGLE), (SINGLE, HALF), (HALF, HALF)]  # of the stream, and what is added to it
EQUAL = [(SINGLE, SINGLE), (HALF, HALF)]
OPERATORS = {
    residual_norm: (("layer", "rms"), PAIRS),
    mlp_activation: (MLPS, EQUAL),
    rotary: (("",), EQUAL),
}


def providers(case: Case, backward: bool, device: str) -> tuple[dict[str, Callable], int]:
    inputs = [tensor.requires_grad_() for tensor in case.inputs]

    def provider(function: Callable) -> Callable[[], object]:
        if not backward:
            return lambda: function(*inputs)
        return lambda: torch.autograd.grad(function(*inputs), inputs, case.grads)

    moved = case.forward_bytes + (case.backward_bytes if backward else 0)
    source = torch.randn(moved // 8, device=device)  # read once and written once
    target = torch.empty_like(source)
    return {
        "depthnet": provider(case.ours),
        "eager": provider(case.plain),
        "compile": provider(torch.compile(case.plain, dynamic=False)),
        "copy": lambda: target.copy_(source),
    }, moved


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="of timings (default: %(default)s)")
    args = parse_args(parser)
    print_machine(args.device)
    print(
        f"{'operator':>14} {'variant':>7} {'mode':>16} {'stream':>8} {'branch':>8} {'tokens':>6} {'n':>5}"
        "  GB/s: depthnet  eager compile   copy  of copy  x best"
    )

    def random(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(*shape, device=args.device, dtype=dtype)

    cases = [
        (operator, variant, dtypes, shape, backward)
        for operator, (variants, types) in OPERATORS.items()
        for variant in variants
        for dtypes in types
        for shape in SHAPES
        for backward in (False, True)
    ]
    lines = []
    for operator, variant, dtypes, (tokens, n), backward in cases:
        torch._dynamo.reset()
        case = operator(variant, tokens, n, *dtypes, random)
        functions, moved = providers(case, backward, args.device)
        times = interleaved(functions, rounds=args.rounds, device=args.device)
        rate = {name: moved / seconds / 1e9 for name, seconds in times.items()}
        of_copy = rate["depthnet"] / rate["copy"]
        against_best = rate["depthnet"] / max(rate["eager"], rate["compile"])
        of = {
            "operator": operator.__name__,
            "variant": variant,
            "mode": "forward+backward" if backward else "forward",
            "stream": dtype_name(dtypes[0]),
            "branch": dtype_name(dtypes[1]),
            "tokens": tokens,
            "n": n,
        }
        widths = (14, 7, 16, 8, 8, 6, 5)
        print(
            " ".join(f"{cell:>{width}}" for cell, width in zip(of.values(), widths, strict=True))
            + f"        {rate['depthnet']:8.1f} {rate['eager']:6.1f} {rate['compile']:7.1f} "
            f"{rate['copy']:6.1f} {of_copy:8.2f} {against_best:7.1f}",
            flush=True,
        )
        lines += [
            {
                **of,
                "provider": provider,
                "ms": f"{seconds * 1e3:.5f}",
                "gb_per_s": f"{rate[provider]:.2f}",
                "bytes": moved,
            }
            for provider, seconds in times.items()
        ]
    write_csv("transformer_ops.csv", lines, device=args.device)


if __name__ == "__main__":
    main()
