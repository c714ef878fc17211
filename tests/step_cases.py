"""The cases that every GPU backend's optimizer step passes, and the judge.

They take a `step`, a callable that runs a step's tables, with the attributes
    device: where the tables' tensors are;
    chunk: how many elements one of its blocks handles;
    truncates_bfloat16: whether bfloat16 is rounded towards 0 (only Triton's interpreter does).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from depthnet.kernels.device_tables import device_tables
from depthnet.kernels.step import ADDRESSES, GROUP, StepTables

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALVES = DTYPES[2:]
SIZES = [1, 7, 4096, 10_001]
ADAM = {"lr": 0.02, "eps": 1e-8, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "decoupled": 1}
SGD = {"lr": 0.02, "weight_decay": 0.1, "beta1": 0.9, "decoupled": 1}
GROUPS = {"adam": ADAM, "sgd": SGD}
STATES = {"adam": 2, "sgd": 1}

# Adam's parameter is what the most roundings lead to: 3 to g, 7 to m, 10 to v, 9 to the denominator, where
# those of v count half, 19 to the change, each constant being rounded once.  In float64 the constants are
# not more precise than the rest: they take 8 more, and 1 - 0.99^4 has 25 times the relative error of the
# power, of which the root leaves half; and the judge rounds as often.
ROUNDINGS = {torch.float32: 20, torch.float64: 2 * 40}
# A sum of squares has 64 of them added one after another, then trees of 128, which the root halves; the
# norm's roundings are those of g, and reach the change through m and through v.
ROUNDINGS_OF_NORM = 2 * 45


@dataclass
class Parameter:
    shape: int | tuple[int, ...]
    dtype: torch.dtype = torch.float32
    group: int = 0
    leading: int = 0
    states: int | None = None  # Adam: 2 or 3; SGD: 0 or 1; None for what STATES says
    master: bool = False
    fresh: bool = False  # the momentum buffer, zeros, is still unwritten
    rounding: int = 0
    offset: int = 0  # elements between an aligned address and each of the tensors
    misaligned: str = ""  # a column that is one element further off


def make_tables(
    device: str, rule: str, parameters: list[Parameter], *groups: dict, **options
) -> StepTables:
    """Random tensors for a step of the parameters, and their tables."""
    columns, scales = {name: [] for name in ADDRESSES}, []
    for each in parameters:
        shape = torch.Size([each.shape] if isinstance(each.shape, int) else each.shape)
        wide = torch.float64 if each.dtype == torch.float64 else torch.float32

        def place(name, values, dtype, each=each):
            offset = each.offset + (name == each.misaligned)
            memory = torch.empty(values.numel() + offset, dtype=dtype, device=device)
            return memory[offset:].view(values.shape).copy_(values)

        row = {"param": place("param", torch.randn(shape), each.dtype)}
        row["grad"] = place("grad", torch.randn(shape), each.dtype)
        states = [torch.randn(shape), torch.randn(shape).square(), torch.randn(shape).square()]
        if each.fresh:
            states[0].zero_()
        for i in range(STATES[rule] if each.states is None else each.states):
            row[f"state{i}"] = place(f"state{i}", states[i], wide)
        if each.master:
            row["master"] = place("master", row["param"].double() * (1 + 1e-4), wide)
        if rule == "adam" or each.rounding:
            row["step"] = torch.tensor(3.0 + 10 * len(scales), device=device)
        for name in ADDRESSES:
            columns[name].append(row.get(name))
        scales.append(torch.rand(3, shape[: each.leading].numel(), dtype=torch.float64) + 0.5)
    table = np.zeros(len(groups), GROUP)
    for row, group in zip(table, groups, strict=True):
        for name, value in group.items():
            row[name] = value
    return StepTables(
        rule=rule,
        columns=columns,
        leading=[each.leading for each in parameters],
        scales=torch.cat(scales, 1).to(device),
        group=[each.group for each in parameters],
        groups=table,
        fresh=[each.fresh for each in parameters],
        rounding=[each.rounding for each in parameters],
        **options,
    )


def tensors_of(tables: StepTables) -> list[Tensor]:
    return [tensor for tensor in itertools.chain(*tables.columns.values()) if tensor is not None]


def grad_factor(tables: StepTables) -> float:
    scale = 1 if tables.grad_scale is None else tables.grad_scale.item()
    if tables.max_grad_norm is None:
        return 1 / scale
    squares = sum(grad.double().square().sum().item() for grad in tables.columns["grad"])
    return min(1, tables.max_grad_norm / (squares**0.5 / scale + 1e-6)) / scale


def expected(tables: StepTables) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """For each parameter and column the float64 result, and what rounding errors are relative to: the
    result of the same formula with absolute values in it."""
    results, first_slice, factor = [], 0, grad_factor(tables)
    for i, param in enumerate(tables.params):
        row = {name: column[i] for name, column in tables.columns.items()}
        group = dict(zip(GROUP.names, tables.groups[tables.group[i]].tolist(), strict=True))
        lead = param.shape[: tables.leading[i]]
        scales = tables.scales[:, first_slice : first_slice + lead.numel()]
        first_slice += lead.numel()
        lr, eps, decay = scales.reshape(3, *lead, *[1] * (param.ndim - len(lead)))
        lr = lr * tables.lrs.get(tables.group[i], group["lr"])
        eps, decay = eps * group["eps"], decay * group["weight_decay"]
        beta1, beta2 = group["beta1"], group["beta2"]
        p = (param if row["master"] is None else row["master"]).double()
        g = row["grad"].double() * (-factor if group["maximize"] else factor)
        size_g = g.abs()
        if not group["decoupled"]:
            g, size_g = g + decay * p, size_g + (decay * p).abs()
        result = {}
        if tables.rule == "adam":
            t = row["step"].item() + 1
            m, v = row["state0"].double(), row["state1"].double()
            size_m, size_v = m.abs() + size_g, v + size_g**2
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
            result = {"state0": (m, size_m), "state1": (v, size_v)}
            if row["state2"] is not None:
                v = torch.maximum(row["state2"].double(), v)
                result["state2"] = v, v + size_v
            rate = lr / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)
            change, size = rate * m, rate * size_m * (1 + size_v / v)
        elif row["state0"] is not None:
            buffer = beta1 * row["state0"].double()
            size_b = buffer.abs() + size_g
            buffer += g if tables.fresh[i] else (1 - beta2) * g
            result = {"state0": (buffer, size_b)}
            change = lr * (g + beta1 * buffer if group["nesterov"] else buffer)
            size = lr * (size_g + size_b)
        else:
            change, size = lr * g, lr * size_g
        moved = (p * (1 - lr * decay) if group["decoupled"] else p) - change
        result["param"] = moved, p.abs() + size
        if row["master"] is not None:
            result["master"] = result["param"]
        results.append(result)
    return results


def check_step(step, tables: StepTables) -> None:
    """Run a step and compare everything that it writes with the float64 step."""
    results = expected(tables)
    counts = [None if count is None else count.item() for count in tables.columns["step"]]
    step(tables)
    for i, result in enumerate(results):
        for name, (want, size) in result.items():
            got = tables.columns[name][i]
            wide = torch.float64 if got.dtype == torch.float64 else torch.float32
            roundings = ROUNDINGS[wide]
            if tables.max_grad_norm is not None:
                roundings += ROUNDINGS_OF_NORM
            bound = roundings * torch.finfo(wide).eps / 2 * size
            if got.dtype.itemsize == 2:
                limits = torch.finfo(got.dtype)
                truncates = got.dtype == torch.bfloat16 and step.truncates_bfloat16
                last = limits.eps * torch.clamp(want.abs() + bound, min=limits.smallest_normal)
                bound += last if truncates else last / 2
            excess = (got.double() - want).abs() - bound
            # NaN exceeds too.
            bad = (~(excess <= 0)).flatten().nonzero()
            assert not len(bad), (
                f"{name} of parameter {i}, {len(bad)} elements, first {bad[0].item()}: "
                f"{got.flatten()[bad[0]].item()}, not {want.flatten()[bad[0]].item()}"
            )
    for before, after, param in zip(counts, tables.columns["step"], tables.params, strict=True):
        assert before is None or after.item() == before + (param.numel() > 0)
    assert not device_tables(tables, step.chunk).arrived.any()


def run_beside(step, tables: StepTables, make_optimizer) -> None:
    """10 steps from zero states, together with torch's optimizer."""
    theirs = [param.clone().requires_grad_() for param in tables.params]
    optimizer = make_optimizer(theirs)
    tables.scales.fill_(1)
    for name in ("state0", "state1", "state2", "step"):
        for state in filter(lambda tensor: tensor is not None, tables.columns[name]):
            state.zero_()
    for _ in range(10):
        for grad, their in zip(tables.columns["grad"], theirs, strict=True):
            grad.normal_()
            their.grad = grad.clone()
        step(tables)
        optimizer.step()
        tables.tensors["fresh"] = 0
    for ours, their in zip(tables.params, theirs, strict=True):
        # Both round each of some ten operations a step; errors add up.
        tolerance = 10 * 10 * torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, their.detach(), rtol=tolerance, atol=tolerance)


def make_twins(device: str, rule: str, parameters: list[Parameter], group: dict) -> StepTables:
    """Parameters, and after them as many with the same values: whose master copies say what is rounded
    stochastically in the others."""
    twins = [replace(each, rounding=0, master=True) for each in parameters]
    tables = make_tables(device, rule, [*parameters, *twins], group)
    for name, column in tables.columns.items():
        for i, twin in enumerate(column[len(parameters) :]):
            if twin is not None:
                twin.copy_(tables.columns["param" if name == "master" else name][i])
    half = tables.scales.shape[1] // 2
    tables.scales[:, half:] = tables.scales[:, :half]
    return tables


def rounding_bits(elements: np.ndarray, rounding: int, step: int) -> np.ndarray:
    """The random bits of csrc/math/step.h."""

    def scramble(x):
        x = np.asarray(x, np.uint64)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor) & np.uint64(0xFFFFFFFF)
        return x ^ (x >> np.uint64(16))

    elements = np.asarray(elements, np.uint64)
    key = scramble(scramble(rounding) ^ np.uint64(step))
    key = scramble(key ^ (elements >> np.uint64(32)))
    return scramble(scramble(elements & np.uint64(0xFFFFFFFF)) ^ key).astype(np.uint32)


def rounded(x: np.ndarray, bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    """float32 x rounded with random bits: added below the last bit kept, they may carry into it."""
    if dtype == torch.bfloat16:
        words = (x.view(np.uint32).astype(np.uint64) + (bits >> 16) & 0xFFFF0000).astype(np.uint32)
        moved = words.view(np.float32)
    else:

        def spacing(size):  # of float16
            return np.exp2(np.maximum(np.frexp(size)[1] - 1, -14) - 10).astype(np.float32)

        size = np.where(np.isfinite(x), np.minimum(np.abs(x), 2.0**20), 0).astype(np.float32)
        moved = size + (bits >> 19).astype(np.float32) * np.float32(2**-13) * spacing(size)
        moved = np.copysign(np.floor(moved / spacing(moved)) * spacing(moved), x)
    return torch.from_numpy(np.where(np.isfinite(x), moved, x).astype(np.float32)).to(dtype)


def check_rounding(tables: StepTables, first_element: int = 0) -> None:
    """Compare parameters of `make_twins` that a step has rounded with their twins."""
    count = len(tables.params) // 2
    for i, param in enumerate(tables.params[:count]):
        elements = first_element + np.arange(param.numel())
        bits = rounding_bits(elements, tables.rounding[i], tables.columns["step"][i].item())
        exact = tables.columns["master"][count + i].cpu().flatten()
        want = rounded(exact.numpy(), bits, param.dtype)
        torch.testing.assert_close(param.cpu().flatten(), want, rtol=0, atol=0, equal_nan=True)


class StepTests:
    """What a test file inherits that has a fixture `step`."""

    @pytest.mark.parametrize("offset", [0, 1, 4])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_adam(self, step, dtype, offset):
        parameters = [Parameter(size, dtype, offset=offset) for size in SIZES]
        parameters.append(Parameter(1100, dtype, states=3, offset=offset))
        check_step(step, make_tables(step.device, "adam", parameters, ADAM))

    @pytest.mark.parametrize("offset", [0, 1, 4])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_sgd(self, step, dtype, offset):
        parameters = [Parameter(size, dtype, offset=offset) for size in SIZES]
        parameters.append(Parameter(1100, dtype, states=0, offset=offset))
        check_step(step, make_tables(step.device, "sgd", parameters, SGD))

    @pytest.mark.parametrize("decoupled", [0, 1])
    @pytest.mark.parametrize("nesterov", [0, 1])
    def test_sgd_groups(self, step, decoupled, nesterov):
        plain = {**SGD, "decoupled": decoupled, "nesterov": nesterov}
        dampened = {**plain, "beta2": 0.3, "maximize": 1}
        parameters = [
            Parameter((2, 750), dtype, group, leading=1, states=states, fresh=fresh)
            for dtype in DTYPES
            for group in (0, 1)
            for states, fresh in ((0, False), (1, False), (1, True))
        ]
        check_step(step, make_tables(step.device, "sgd", parameters, plain, dampened))

    def test_sgd_without_momentum(self, step):
        parameters = [Parameter(size, states=0) for size in SIZES]
        check_step(step, make_tables(step.device, "sgd", parameters, SGD))

    def test_groups_and_slices(self, step):
        groups = [
            ADAM,
            {**ADAM, "beta1": 0.0, "decoupled": 0, "eps": 1e-3},
            {**ADAM, "beta1": 0.3, "beta2": 0.999, "lr": 1.0, "maximize": 1},
            {**ADAM, "beta2": 0.0, "decoupled": 0, "weight_decay": 0.0},
        ]
        parameters = [
            Parameter((3, 2, 700), group=0, leading=2),
            Parameter((2, 9001), group=1, leading=1, offset=3),
            Parameter((5, 4), group=2),
            Parameter((7,), torch.float64, group=3, leading=1),
            Parameter((), group=2),
        ]
        check_step(step, make_tables(step.device, "adam", parameters, *groups))

    def test_mixed_tables(self, step):
        """Every optional part in one launch, each for some of the parameters."""
        parameters = [
            Parameter(5000, torch.bfloat16, master=True),
            Parameter(5000, torch.bfloat16, states=3),
            Parameter((3, 1024), torch.float16, leading=1, states=3, master=True),
            Parameter(1025, torch.float32, states=3, offset=1),
            Parameter(77, torch.float64, group=1),
        ]
        groups = ADAM, {**ADAM, "decoupled": 0}
        tables = make_tables(step.device, "adam", parameters, *groups)
        check_step(step, tables)
        check_step(step, tables)  # with the counts of the first

    @pytest.mark.parametrize("rule", ["adam", "sgd"])
    def test_masters(self, step, rule):
        parameters = [
            Parameter(size, dtype, master=True, offset=offset)
            for dtype in HALVES
            for offset in (0, 1)
            for size in SIZES
        ]
        check_step(step, make_tables(step.device, rule, parameters, GROUPS[rule]))

    @pytest.mark.parametrize("name", ADDRESSES[:6])
    def test_one_tensor_is_misaligned(self, step, name):
        parameters = [
            Parameter(1100, dtype, states=3, master=True, misaligned=name) for dtype in DTYPES
        ]
        check_step(step, make_tables(step.device, "adam", parameters, ADAM))

    def test_rows_without_elements(self, step):
        """Nothing happens to them, with others or alone."""
        empty = [Parameter(0), Parameter((0, 3), leading=1), Parameter((3, 0), leading=1)]
        for parameters in ([*empty, Parameter((2, 5), leading=1), *empty], empty):
            check_step(step, make_tables(step.device, "adam", parameters, ADAM))

    @pytest.mark.parametrize("beta1", [0.0, 0.3, 0.5, 0.9, 1 - 2**-20])
    def test_moments_from_the_nearer_end(self, step, beta1):
        """Nothing cancels: a moment that is the gradient stays; without memory it becomes the gradient."""
        tables = make_tables(step.device, "adam", [Parameter(1000)], {**ADAM, "beta1": beta1})
        moment, grad = tables.columns["state0"][0], tables.columns["grad"][0]
        moment.copy_(grad * 1e10 if beta1 == 0 else grad)
        step(tables)
        assert torch.equal(moment, grad)

    def test_lr_tensor(self, step):
        lr = torch.tensor(0.3, device=step.device)
        group = {**ADAM, "lr": torch.nan, "lr_address": lr.data_ptr()}
        tables = make_tables(step.device, "adam", [Parameter(9)], group, lrs={0: lr})
        check_step(step, tables)
        lr.fill_(0.03)
        check_step(step, tables)

    @pytest.mark.parametrize("rule", ["adam", "sgd"])
    def test_found_inf_leaves_everything_as_it_is(self, step, rule):
        parameters = [Parameter(size) for size in SIZES]
        options = {"found_inf": torch.ones(1, device=step.device), "max_grad_norm": 1.0}
        tables = make_tables(step.device, rule, parameters, GROUPS[rule], **options)
        before = [tensor.clone() for tensor in tensors_of(tables)]
        step(tables)
        assert all(map(torch.equal, tensors_of(tables), before))
        tables.found_inf.zero_()
        check_step(step, tables)

    @pytest.mark.parametrize("rule", ["adam", "sgd"])
    @pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e4])
    def test_grad_scale_and_norm(self, step, rule, max_grad_norm):
        parameters = [
            Parameter(size, dtype, offset=offset)
            for dtype in (torch.float32, *HALVES)  # whose norm is too coarse for float64
            for size, offset in ((1, 0), (1100, 1), (4096, 0), (10_001, 0))
        ]
        grad_scale = torch.full((1,), 3.0, device=step.device)
        options = {"grad_scale": grad_scale, "max_grad_norm": max_grad_norm}
        check_step(step, make_tables(step.device, rule, parameters, GROUPS[rule], **options))

    def test_norm_of_float64(self, step):
        parameters = [Parameter(50_000, torch.float64, offset=offset) for offset in (0, 1)]
        tables = make_tables(step.device, "adam", parameters, ADAM, max_grad_norm=1.0)
        check_step(step, tables)

    def test_nan_gradients_give_nan(self, step):
        tables = make_tables(step.device, "adam", [Parameter(3, states=3), Parameter(5)], ADAM)
        tables.columns["state2"][0][0] = torch.nan
        tables.columns["grad"][0][1] = torch.nan
        step(tables)
        assert tables.columns["state2"][0].isnan().tolist() == [True, True, False]
        assert tables.params[0].isnan().tolist() == [True, True, False]
        assert tables.params[1].isfinite().all()

    @pytest.mark.parametrize("rule", ["adam", "sgd"])
    def test_norm_that_is_nan_gives_nan(self, step, rule):
        options = {"max_grad_norm": 1.0}
        parameters = [Parameter(3), Parameter(5)]
        tables = make_tables(step.device, rule, parameters, GROUPS[rule], **options)
        tables.columns["grad"][0][1] = torch.nan
        step(tables)
        assert all(param.isnan().all() for param in tables.params)

    @pytest.mark.parametrize("rule", ["adam", "sgd"])
    def test_infinite_parameter_leaves_moments_alone_without_decay(self, step, rule):
        group = {**GROUPS[rule], "decoupled": 0, "weight_decay": 0.0}
        tables = make_tables(step.device, rule, [Parameter(3)], group)
        tables.params[0][0] = torch.inf
        step(tables)
        assert tables.columns["state0"][0].isfinite().all()

    @pytest.mark.parametrize("decoupled", [False, True])
    @pytest.mark.parametrize("amsgrad", [False, True])
    @pytest.mark.parametrize("maximize", [False, True])
    def test_adam_is_torchs(self, step, decoupled, amsgrad, maximize):
        group = {**ADAM, "decoupled": decoupled, "maximize": maximize}
        states = 3 if amsgrad else 2
        parameters = [
            Parameter((30, 41), torch.float64, states=states),
            Parameter(7, states=states),
        ]
        tables = make_tables(step.device, "adam", parameters, group)
        rule = torch.optim.AdamW if decoupled else torch.optim.Adam
        options = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.1}
        options |= {"amsgrad": amsgrad, "maximize": maximize}
        run_beside(step, tables, lambda params: rule(params, **options))

    @pytest.mark.parametrize(
        ("momentum", "dampening", "nesterov"),
        [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)],
    )
    def test_sgd_is_torchs(self, step, momentum, dampening, nesterov):
        group = {"lr": 0.02, "weight_decay": 0.1, "beta1": momentum, "beta2": dampening}
        group["nesterov"] = nesterov
        states = int(momentum != 0)
        parameters = [Parameter(s, torch.float64, states=states, fresh=True) for s in (7, 1500)]
        tables = make_tables(step.device, "sgd", parameters, group)
        options = {"lr": 0.02, "weight_decay": 0.1, "momentum": momentum}
        options |= {"dampening": dampening, "nesterov": nesterov}
        run_beside(step, tables, lambda params: torch.optim.SGD(params, **options))

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("rule", ["adam", "sgd"])
    def test_stochastic_rounding(self, step, rule, dtype):
        parameters = [
            Parameter(10_001, dtype, rounding=5),
            Parameter((3, 333), dtype, leading=1, rounding=9, offset=1),
        ]
        tables = make_twins(step.device, rule, parameters, GROUPS[rule])
        for _ in range(2):
            step(tables)
            check_rounding(tables)
            for param, master in zip(tables.params, tables.columns["master"][2:], strict=False):
                master.copy_(param)
        assert [count.item() for count in tables.columns["step"][:2]] == [5, 15]

    @pytest.mark.parametrize("dtype", HALVES)
    def test_stochastic_rounding_at_the_ends(self, step, dtype):
        """Subnormal results, results that overflow, infinities and NaN."""
        top = torch.finfo(dtype).max
        param = torch.tensor([top, -top, torch.inf, -torch.inf, torch.nan, 0.0, 1e-6, top])
        grad = torch.tensor([-top / 5000, top / 9000, 1.0, 1.0, 1.0, 3e-6, -1.1e-5, -12.0])
        tables = make_twins(
            *(step.device, "sgd", [Parameter((100, 8), dtype, states=0, rounding=1)]),
            {"lr": 0.7654321},
        )
        tables.scales.fill_(1)
        for each in tables.columns["grad"]:
            each.copy_(grad * torch.linspace(0.01, 1.3, 100)[:, None])
        for each in (*tables.params, tables.columns["master"][1]):
            each.copy_(param.to(dtype).expand(100, 8))
        step(tables)
        check_rounding(tables)
        result = tables.params[0]
        assert result.isinf().sum() > 200
        assert result[result.isfinite()].abs().max() == top

    @pytest.mark.parametrize("dtype", HALVES)
    def test_elements_beyond_32_bits(self, step, dtype):
        """The chunk of a tensor of more than 2^32 elements that crosses 2^32; only it has memory."""
        tables = make_twins(step.device, "sgd", [Parameter(2000, dtype, rounding=3)], SGD)
        begin = 2**32 - 1000
        for name, column in tables.columns.items():
            for i, tensor in enumerate(column):
                if name != "step" and tensor is not None:
                    tables.tensors[name][i] -= begin * tensor.element_size()
        chunks = torch.tensor([[0, 0, begin, begin + 2000], [1, 1, begin, begin + 2000]])
        device_tables(tables, step.chunk).chunks = chunks.to(step.device)
        step(tables)
        check_rounding(tables, begin)
