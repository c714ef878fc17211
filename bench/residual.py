"""What bandwidth does scaled_residual reach?

    python bench/residual.py
    python bench/residual.py --device cuda

Forward x + scale * (|h| - mean|h|) and backward, beside eager PyTorch, torch.compile, and a plain copy
of the same number of bytes (the limit of the memory).  Every provider writes to outputs allocated
beforehand; on a GPU depthnet allocates its own, in PyTorch's caching allocator.  Forward moves x, h, y and
one bit an element; backward the two gradients and the bits.
"""

import itertools
from collections.abc import Callable

import torch
from common import argument_parser, dtype_name, interleaved, parse_args, print_machine, write_csv
from torch import Tensor

from depthnet import _C
from depthnet.kernels.cpu import DTYPES
from depthnet.kernels.dispatch import select

SHAPES = [(128, 64), (128, 256), (128, 1024), (2048, 256), (16384, 256), (65536, 256)]
SCALE = 0.1


def native(mode: str, x: Tensor, h: Tensor, y: Tensor, signs: Tensor) -> Callable[[], object]:
    """depthnet's kernel without autograd; backward x is the output's gradient and y that of h."""
    rows, n = x.shape
    if x.is_cuda:
        backend = select("scaled_residual", x)
        x, h, signs = x[None], h[None], signs[None]
        constants = (SCALE, None, 1.0, 1.0, True)
        if mode == "forward":
            return lambda: backend.scaled_residual(x, h, *constants, True)
        return lambda: backend.scaled_residual_backward(x, signs, *constants)
    kernel = _C.residual_forward if mode == "forward" else _C.residual_backward
    used = (x, h, y, signs) if mode == "forward" else (x, signs, y)
    tensors = [value for tensor in used for value in (tensor.data_ptr(), 0)]
    shape = (DTYPES[x.dtype], 1, rows, n)
    constants = (SCALE, 0, 1.0, 1.0, True, torch.get_num_threads())

    def call(alive=used):  # the kernel sees addresses only
        kernel(*shape, *tensors, *constants)

    return call


def providers(mode: str, rows: int, n: int, dtype: torch.dtype, device: str) -> tuple[dict, float]:
    x, h = (torch.randn(rows, n, device=device).to(dtype) for _ in range(2))
    y, z, mean = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x[:, :1])
    signs = torch.zeros(rows, (n + 7) // 8, dtype=torch.uint8, device=device)
    if mode == "forward":
        bytes_moved = rows * n * (3 * x.element_size() + 1 / 8)

        def eager(y=y, z=z, mean=mean):
            torch.abs(h, out=z)
            torch.mean(z, -1, keepdim=True, out=mean)
            torch.sub(z, mean, out=z)
            torch.add(x, z, alpha=SCALE, out=y)
    else:
        bytes_moved = rows * n * (2 * x.element_size() + 1 / 8)

        def eager(y=y, z=z, mean=mean):
            torch.mean(x, -1, keepdim=True, out=mean)
            torch.sub(x, mean, out=y)
            torch.sgn(h, out=z)
            torch.mul(y, z, out=y)
            y.mul_(SCALE)

    source = torch.randn(int(bytes_moved / 8), device=device)  # read once and written once
    target = torch.empty_like(source)
    return {
        "depthnet": native(mode, x, h, y, signs),
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
        "copy": lambda: target.copy_(source),
    }, bytes_moved


def main() -> None:
    device = parse_args(argument_parser(__doc__)).device
    print_machine(device)
    print(
        f"{'mode':>8} {'dtype':>9} {'rows':>6} {'n':>5}  GB/s: depthnet  eager compile   copy"
        "  of copy  x best"
    )
    rows = []
    for dtype, mode in itertools.product((torch.float32, torch.bfloat16), ("forward", "backward")):
        for shape in SHAPES:
            torch._dynamo.reset()
            functions, bytes_moved = providers(mode, *shape, dtype, device)
            times = interleaved(functions, device=device)
            rate = {name: bytes_moved / seconds / 1e9 for name, seconds in times.items()}
            of_copy = rate["depthnet"] / rate["copy"]
            against_best = rate["depthnet"] / max(rate["eager"], rate["compile"])
            name = dtype_name(dtype)
            print(
                f"{mode:>8} {name:>9} {shape[0]:>6} {shape[1]:>5}        {rate['depthnet']:8.1f} "
                f"{rate['eager']:6.1f} {rate['compile']:7.1f} {rate['copy']:6.1f} {of_copy:8.2f} "
                f"{against_best:7.1f}",
                flush=True,
            )
            for provider, seconds in times.items():
                rows.append(
                    {
                        "kernel": "scaled_residual",
                        "mode": mode,
                        "dtype": name,
                        "rows": shape[0],
                        "n": shape[1],
                        "provider": provider,
                        "ms": f"{seconds * 1e3:.5f}",
                        "gb_per_s": f"{rate[provider]:.2f}",
                        "bytes": int(bytes_moved),
                    }
                )
    write_csv("residual.csv", rows, device=device)


if __name__ == "__main__":
    main()
