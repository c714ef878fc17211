"""What bandwidth does scaled_residual reach?

    python bench/residual.py

Forward x + scale * (|h| - mean|h|) and backward, beside eager PyTorch, torch.compile, and a plain copy
of the same number of bytes (the limit of the memory).  Every provider writes to outputs allocated
beforehand.  Forward moves x, h, y and one bit an element; backward the two gradients and the bits.
"""

import itertools

import torch
from common import dtype_name, interleaved, print_machine, write_csv

from depthnet import _C
from depthnet.kernels.cpu import DTYPES

SHAPES = [(128, 64), (128, 256), (128, 1024), (2048, 256), (16384, 256), (65536, 256)]
SCALE = 0.1


def providers(mode: str, rows: int, n: int, dtype: torch.dtype) -> tuple[dict, float]:
    x, h, g = (torch.randn(rows, n).to(dtype) for _ in range(3))
    y, z, mean = torch.empty_like(x), torch.empty_like(x), torch.empty(rows, 1, dtype=dtype)
    signs = torch.zeros(rows, (n + 7) // 8, dtype=torch.uint8)
    threads = torch.get_num_threads()
    constants = (SCALE, 0, 1.0, 1.0, True, threads)
    shape = (DTYPES[dtype], 1, rows, n)

    def blocks(*tensors):
        return [value for tensor in tensors for value in (tensor.data_ptr(), 0)]

    if mode == "forward":
        tensors = blocks(x, h, y, signs)
        bytes_moved = rows * n * (3 * x.element_size() + 1 / 8)

        def native(alive=(x, h, y, signs)):  # the kernel sees addresses only
            _C.residual_forward(*shape, *tensors, *constants)

        def eager(y=y, z=z, mean=mean):
            torch.abs(h, out=z)
            torch.mean(z, -1, keepdim=True, out=mean)
            torch.sub(z, mean, out=z)
            torch.add(x, z, alpha=SCALE, out=y)
    else:
        tensors = blocks(g, signs, y)
        bytes_moved = rows * n * (2 * x.element_size() + 1 / 8)

        def native(alive=(g, signs, y)):
            _C.residual_backward(*shape, *tensors, *constants)

        def eager(y=y, z=z, mean=mean):
            torch.mean(g, -1, keepdim=True, out=mean)
            torch.sub(g, mean, out=y)
            torch.sgn(h, out=z)
            torch.mul(y, z, out=y)
            y.mul_(SCALE)

    source = torch.randn(int(bytes_moved / 8))  # read once and written once
    target = torch.empty_like(source)
    compiled = torch.compile(eager, dynamic=False)
    return {
        "depthnet": native,
        "eager": eager,
        "compile": compiled,
        "copy": lambda: target.copy_(source),
    }, bytes_moved


def main() -> None:
    print_machine()
    print(
        f"{'mode':>8} {'dtype':>9} {'rows':>6} {'n':>5}  GB/s: depthnet  eager compile   copy"
        "  of copy  x best"
    )
    rows = []
    for dtype, mode in itertools.product((torch.float32, torch.bfloat16), ("forward", "backward")):
        for shape in SHAPES:
            torch._dynamo.reset()
            functions, bytes_moved = providers(mode, *shape, dtype)
            times = interleaved(functions)
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
    write_csv("residual.csv", rows)


if __name__ == "__main__":
    main()
