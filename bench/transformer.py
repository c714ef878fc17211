"""Training steps of a transformer: depthnet.nn.Transformer beside the same model in plain PyTorch.

    python bench/transformer.py              # tokens/s, on this machine
    python bench/transformer.py --audit      # launches and bytes of a step, as on a GPU: counted, not run

A step is forward, cross entropy, backward and AdamW.  All providers have the same sizes, weights, tokens
and learning rates; plain PyTorch is written as its users write it (linear layers, layer_norm,
scaled_dot_product_attention, fused AdamW).  Each runs eagerly and through torch.compile.
"""

from __future__ import annotations

import time
from collections import Counter

import torch
from common import (
    argument_parser,
    interleaved,
    parse_args,
    print_machine,
    print_table,
    write_csv,
)
from roofline import ADAMW_BYTES, Kernel, Trace, after_fusion, flops, size
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import depthnet
from depthnet.kernels.mlp_activation import MLPS
from depthnet.kernels.triton.norm import MOST_PROGRAMS

VOCABULARY = 256
HEAD = 64
# width, depth, batch, context
SHAPES = ((128, 8, 8, 128), (256, 4, 8, 256))
AUDITED = (1024, 16, 8, 1024)


class PlainLayer(nn.Module):
    def __init__(self, width: int, mlp: str, multiplier: float, scale: float):
        super().__init__()
        inner = -(-width // 3) * 8 if mlp == "swiglu" else 4 * width
        self.mlp, self.multiplier, self.scale = mlp, multiplier, scale
        self.norm1, self.norm2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * inner if mlp == "swiglu" else inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, -1, HEAD)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        z = self.output(z.transpose(1, 2).reshape(batch, tokens, -1))
        x = x + self.multiplier * z
        return x + self.multiplier * self.down(activated(self.up(self.norm2(x)), self.mlp))


def activated(h: Tensor, mlp: str) -> Tensor:
    if mlp == "swiglu":
        gate, h = h.chunk(2, -1)
        return F.silu(gate) * h
    return F.gelu(h) if mlp == "gelu" else h.abs()


def angles(tokens: int) -> tuple[Tensor, Tensor]:
    """cos and sin of rotary positions, (tokens, HEAD) each."""
    half = torch.arange(0, HEAD, 2) / HEAD
    angle = torch.arange(tokens)[:, None] * 10000.0**-half
    return torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class PlainTransformer(nn.Module):
    """The same function as a depthnet.nn.Transformer, and the same weights."""

    def __init__(self, ours: depthnet.nn.Transformer, mlp: str):
        super().__init__()
        multiplier = ours.rules["hidden"].multiplier
        scale = ours.layers[0].attention.scale
        self.embedding = nn.Embedding(VOCABULARY, ours.width)
        self.layers = nn.ModuleList(
            PlainLayer(ours.width, mlp, multiplier, scale) for _ in range(ours.depth)
        )
        self.norm = nn.LayerNorm(ours.width, bias=False)
        self.head = nn.Linear(ours.width, VOCABULARY, bias=False)
        cos, sin = angles(ours.context)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        with torch.no_grad():
            self.embedding.weight.copy_(ours.embedding.weight)
            self.head.weight.copy_(ours.head.weight)
            for plain, own in zip(self.layers, ours.layers, strict=True):
                plain.qkv.weight.copy_(own.attention.qkv.weight)
                plain.output.weight.copy_(own.attention.output.weight)
                plain.up.weight.copy_(own.mlp.up.weight)
                plain.down.weight.copy_(own.mlp.down.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.head(self.norm(x))

    def adamw(self, ours: depthnet.nn.Transformer, lr: float) -> torch.optim.Optimizer:
        """torch's, with the learning rates that `ours` has."""
        scales = {group["name"]: group["lr_scale"] for group in ours.param_groups("adamw")}
        hidden = [p for p in self.layers.parameters() if p.ndim == 2]
        gains = [p for p in self.layers.parameters() if p.ndim == 1]
        params = {
            "input": [self.embedding.weight],
            "hidden": hidden,
            "norm": gains,
            "final_norm": [self.norm.weight],
            "output": [self.head.weight],
        }
        groups = [{"params": params[name], "lr": lr * scales[name]} for name in params]
        return torch.optim.AdamW(groups, fused=True)


def models(width: int, depth: int, context: int, mlp: str):
    ours = depthnet.nn.Transformer(
        VOCABULARY, width, depth, context=context, head_size=HEAD, mlp=mlp, output_std=0.02
    )
    return ours, PlainTransformer(ours, mlp)


def step_of(model, optimizer, tokens: Tensor, targets: Tensor):
    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def measure(shape: tuple[int, int, int, int], mlp: str, rounds: int, device: str) -> list[dict]:
    width, depth, batch, context = shape
    drawn = torch.randint(VOCABULARY, (batch, context + 1), device=device)
    tokens, targets = drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
    steps, losses = {}, {}
    for compiled in (False, True):
        torch.manual_seed(0)
        ours, plain = (model.to(device) for model in models(width, depth, context, mlp))
        optimizers = depthnet.optim.AdamW(ours, lr=2**-8), plain.adamw(ours, 2**-8)
        names = ("depthnet, compiled", "compile") if compiled else ("depthnet", "eager")
        for name, model, optimizer in zip(names, (ours, plain), optimizers, strict=True):
            run = torch.compile(model, dynamic=False) if compiled else model
            steps[name] = step_of(run, optimizer, tokens, targets)
            start = time.perf_counter()
            losses[name] = [steps[name]().item() for _ in range(3)]
            print(f"{name}: {time.perf_counter() - start:.0f} s for the first steps", flush=True)
    expected = torch.tensor(losses["eager"])
    for name, found in losses.items():  # they all train the same network
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-3, atol=1e-3, msg=name)
    times = interleaved(steps, rounds, seconds=0.1, device=device)
    return [
        {
            "width": width,
            "depth": depth,
            "batch": batch,
            "context": context,
            "mlp": mlp,
            "dtype": "float32",
            "provider": name,
            "ms": f"{seconds * 1e3:.3f}",
            "tokens_per_s": f"{batch * context / seconds:.0f}",
        }
        for name, seconds in times.items()
    ]


class TraceAll(Trace):
    """A trace in which an operator of depthnet's is a kernel, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "depthnet":
            self.kernels[Kernel(0, size([args, out]))] += 1
        return out


def audit(mlps: list[str]) -> list[dict]:
    """Launches and bytes of a step in bfloat16 autocast; see bench/roofline.py for how they are found."""
    width, depth, batch, context = AUDITED

    def loss(model) -> Tensor:
        tokens = torch.randint(VOCABULARY, (batch, context))
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    def eager(index: int, mlp: str) -> Counter:
        with FakeTensorMode():
            model = models(width, depth, context, mlp)[index]
            with TraceAll() as trace:
                loss(model).backward()
        return trace.kernels

    def compiled(index: int, mlp: str) -> Counter:
        few, more = (
            after_fusion(lambda: models(width, layers, context, mlp)[index], loss)  # noqa: B023
            for layers in (2, 3)
        )
        total = Counter(few)
        for kernel, count in (more - few).items():  # every layer adds the same kernels
            total[kernel] += (depth - 2) * count
        return total

    rows = []
    for mlp in mlps:
        traces = {
            "depthnet": eager(0, mlp),
            "depthnet, compiled": compiled(0, mlp),
            "eager": eager(1, mlp),
            "compile": compiled(1, mlp),
        }
        # The programs' parts of the gradients of the norms' weights are added up by a launch of its own.
        sums = Counter({Kernel(0, 4 * MOST_PROGRAMS * width): 2 * depth})
        traces = {
            name: kernels + sums if name.startswith("depthnet") else kernels
            for name, kernels in traces.items()
        }
        parameters = sum(p.numel() for p in models(width, depth, context, mlp)[0].parameters())
        for name, kernels in traces.items():
            moved = sum(count * kernel.bytes for kernel, count in kernels.items())
            rows.append(
                {
                    "evidence": "counted, not measured",
                    "width": width,
                    "depth": depth,
                    "batch": batch,
                    "context": context,
                    "mlp": mlp,
                    "dtype": "bfloat16",
                    "provider": name,
                    "launches": kernels.total(),
                    "mbyte": f"{moved / 1e6:.1f}",
                    "optimizer_mbyte": f"{ADAMW_BYTES * parameters / 1e6:.1f}",
                    "gflop": f"{flops(kernels) / 1e9:.1f}",
                }
            )
    return rows


def report(rows: list[dict]) -> None:
    lines: dict[tuple, dict[str, float]] = {}
    for row in rows:
        of = tuple(row[key] for key in ("width", "depth", "batch", "context", "mlp"))
        lines.setdefault(of, {})[row["provider"]] = float(row["tokens_per_s"])
    providers = list(next(iter(lines.values())))
    table = []
    for of, rates in lines.items():
        best = max(rates["eager"], rates["compile"])
        table.append((*of, *map(round, map(rates.get, providers)), rates["depthnet"] / best))
    header = ("n", "L", "B", "T", "mlp", *providers, "depthnet / best plain")
    print_table("Training, tokens/s", header, table)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mlp", nargs="+", choices=MLPS, default=["gelu", "swiglu"])
    parser.add_argument("--audit", action="store_true", help="count launches and bytes instead")
    args = parse_args(parser)
    print_machine(args.device)
    if args.audit:
        rows = audit(args.mlp)
        columns = ("mlp", "provider", "launches", "mbyte", "optimizer_mbyte", "gflop")
        title = "Forward and backward, n = {}, L = {}, B = {}, T = {}, bfloat16".format(*AUDITED)
        print_table(title, columns, [tuple(row[key] for key in columns) for row in rows])
        write_csv("transformer_audit.csv", rows)
        return
    rows = []
    for shape in SHAPES:
        for mlp in args.mlp:
            rows += measure(shape, mlp, args.rounds, args.device)
            torch._dynamo.reset()
    report(rows)
    write_csv("transformer.csv", rows, device=args.device)


if __name__ == "__main__":
    main()
