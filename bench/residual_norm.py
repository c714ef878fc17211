"""How fast is residual_norm beside PyTorch's own operators and their fusion?

    python bench/residual_norm.py
    python bench/residual_norm.py --device cuda

s = x + scale * branch and norm(s) * weight (and + bias for `layer`), forward and forward with backward,
beside eager PyTorch (F.layer_norm, F.rms_norm), torch.compile, and a plain copy of the same number of
bytes (the limit of the memory).  Every provider is called as a user calls it: through autograd, and it
allocates its results.  Forward moves x, branch, s and y; backward moves s and four gradients.
"""

import itertools
from collections.abc import Callable

import torch
from common import argument_parser, dtype_name, interleaved, parse_args, print_machine, write_csv
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from depthnet import kernels

SHAPES = [(128, 256), (2048, 256), (2048, 512), (8192, 768), (16384, 1024)]
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2]
SCALE, EPS = 0.1, 1e-5


def plain(norm: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """What a user of torch writes."""

    def layer(x, branch, weight, bias):
        s = x + SCALE * branch
        return s, layer_norm(s, weight.shape, weight, bias, EPS).to(branch.dtype)

    def rms(x, branch, weight):
        s = x + SCALE * branch
        return s, rms_norm(s, weight.shape, weight, EPS).to(branch.dtype)

    return layer if norm == "layer" else rms


def providers(
    mode: str, norm: str, rows: int, n: int, dtypes: tuple[torch.dtype, torch.dtype], device: str
) -> tuple[dict, int]:
    def random(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    stream, narrow = dtypes
    parameters = [random(stream, n) for _ in range(2 if norm == "layer" else 1)]
    inputs = [random(dtype, rows, n) for dtype in dtypes] + parameters
    inputs = [tensor.requires_grad_() for tensor in inputs]
    grads = [random(dtype, rows, n) for dtype in dtypes]
    bytes_moved = 2 * rows * n * (stream.itemsize + narrow.itemsize)
    if mode != "forward":
        bytes_moved += rows * n * (3 * stream.itemsize + 2 * narrow.itemsize)

    def provider(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], object]:
        if mode == "forward":
            return lambda: function(*inputs)
        return lambda: torch.autograd.grad(function(*inputs), inputs, grads)

    def depthnet(x, branch, *parameters):
        return kernels.residual_norm(x, branch, SCALE, *parameters, norm=norm, eps=EPS)

    source = torch.randn(bytes_moved // 8, device=device)  # read once and written once
    target = torch.empty_like(source)
    return {
        "depthnet": provider(depthnet),
        "eager": provider(plain(norm)),
        "compile": provider(torch.compile(plain(norm), dynamic=False)),
        "copy": lambda: target.copy_(source),
    }, bytes_moved


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="of timings (default: %(default)s)")
    args = parse_args(parser)
    print_machine(args.device)
    print(
        f"{'mode':>16} {'norm':>5} {'stream':>8} {'branch':>8} {'rows':>6} {'n':>5}"
        "  GB/s: depthnet  eager compile   copy  of copy  x best"
    )
    lines = []
    for dtypes, norm, mode in itertools.product(
        DTYPES, ("layer", "rms"), ("forward", "forward+backward")
    ):
        for shape in SHAPES:
            torch._dynamo.reset()
            functions, bytes_moved = providers(mode, norm, *shape, dtypes, args.device)
            times = interleaved(functions, rounds=args.rounds, device=args.device)
            rate = {name: bytes_moved / seconds / 1e9 for name, seconds in times.items()}
            of_copy = rate["depthnet"] / rate["copy"]
            against_best = rate["depthnet"] / max(rate["eager"], rate["compile"])
            stream, branch = map(dtype_name, dtypes)
            print(
                f"{mode:>16} {norm:>5} {stream:>8} {branch:>8} {shape[0]:>6} {shape[1]:>5}"
                f"        {rate['depthnet']:8.1f} {rate['eager']:6.1f} {rate['compile']:7.1f} "
                f"{rate['copy']:6.1f} {of_copy:8.2f} {against_best:7.1f}",
                flush=True,
            )
            for provider, seconds in times.items():
                lines.append(
                    {
                        "kernel": "residual_norm",
                        "mode": mode,
                        "norm": norm,
                        "stream": stream,
                        "branch": branch,
                        "rows": shape[0],
                        "n": shape[1],
                        "provider": provider,
                        "ms": f"{seconds * 1e3:.5f}",
                        "gb_per_s": f"{rate[provider]:.2f}",
                        "bytes": bytes_moved,
                    }
                )
    write_csv("residual_norm.csv", lines, device=args.device)


if __name__ == "__main__":
    main()
