"""A parametrization applied to a torch model of one's own."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from depthnet._checks import number, one_of
from depthnet.diagnostics.stream import find_blocks
from depthnet.scaling import Parametrization, Rule
from depthnet.scaling.groups import group, track

# What a parameter can be.
ROLES = ("input", "hidden", "output", "bias", "norm")

# Under which names attention modules hold the size of a head, or the number of heads.
HEAD_SIZE = ("head_dim", "head_size", "attention_head_size", "d_head", "dim_head", "d_kv")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

# Standard deviations of draws from one distribution lie this many standard errors apart at most.
NOISE = 4

# (here, in the base)
Pair = tuple[int, int]


class Multiplied:
    """A forward hook that multiplies a module's output, of a tuple the first."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, module: nn.Module, arguments: tuple, output: Tensor | tuple):
        first, *rest = output if isinstance(output, tuple) else (output,)
        if not isinstance(first, Tensor):
            raise TypeError(
                f"a {type(module).__name__} whose output is scaled must return a tensor, or a tuple "
                f"with a tensor first, got {type(output).__name__}"
            )
        return (first * self.factor, *rest) if isinstance(output, tuple) else first * self.factor


@dataclass(frozen=True)
class ScaledParameter:
    """What was decided about a parameter.

    family: its name, the same for all blocks.
    role: as of scaling.Parametrization.rule.
    in_block: whether its rates follow the depth.
    width: (n, base_width), what its rule calls so: fan-in of hidden and output weights, else fan-out.
    rule: its scales. init_ratio: of its initial std to the base's.
    factor: what its initial weights were multiplied by.
    """

    family: str
    role: str
    in_block: bool
    width: Pair
    rule: Rule
    init_ratio: float
    factor: float = 1.0

    @property
    def kind(self) -> str:
        return f"blocks.{self.role}" if self.in_block else self.role

    @property
    def group(self) -> str:
        """The name of its parameter group: those of one name have the same rule."""
        return f"{self.kind}.x{self.width[0] / self.width[1]:.10g}"


class Scaling:
    """How a model is scaled: its `param_groups`.

    Called with an optimizer's rule (`adamw`, `adam` or `sgd`) it returns the model's parameter groups, as
    ResNet.param_groups does; printed, it is a table of all decisions.  It knows parameters by name, so
    that they may be replaced, and its model by a weak reference; copies of the model have their own.

    parametrization: the scaling.Parametrization.
    parameters: a ScaledParameter for each name.
    multipliers: by the names of modules, what their outputs are multiplied by.
    attention: by the names of modules, what their attention logits are multiplied by.
    Names are the same for all blocks here.
    """

    def __init__(
        self,
        module: nn.Module,
        parametrization: Parametrization,
        parameters: dict[str, ScaledParameter],
        multipliers: dict[str, float],
        attention: dict[str, float],
    ):
        self.parametrization, self.parameters = parametrization, parameters
        self.multipliers, self.attention = multipliers, attention
        self._adopt(module)

    def _adopt(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        track(module)

    def __getstate__(self) -> dict:
        return {**vars(self), "_module": self._module()}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._adopt(state["_module"])

    def __call__(self, optimizer: str) -> list[dict]:
        groups: dict[str, dict] = {}
        for name, param in self._module().named_parameters():
            if name not in self.parameters:
                raise ValueError(
                    f"{name} was not a parameter of the model when it was scaled; scale it after its "
                    "modules have been replaced or wrapped"
                )
            scaled = self.parameters[name]
            if scaled.group not in groups:
                groups[scaled.group] = group(scaled.group, [], scaled.rule, optimizer)
            groups[scaled.group]["params"].append(param)
        return list(groups.values())

    def __repr__(self) -> str:
        heads = ("parameter", "role", "width", "initial", "lr", "eps", "weight decay")
        rows = {  # a row for all blocks that are alike
            (
                scaled.family,
                scaled.kind,
                "{} / {}".format(*scaled.width),
                *(
                    f"{scale:.4g}"
                    for scale in (
                        scaled.factor,
                        scaled.rule.lr_scale("adamw"),
                        scaled.rule.eps_scale(),
                        scaled.rule.weight_decay_scale("adamw"),
                    )
                ),
            ): None
            for scaled in self.parameters.values()
        }
        lengths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        lines = [f"{self.parametrization}, AdamW's scales relative to the base"]
        for cells in (heads, *rows):
            padded = (cell.ljust(size) for cell, size in zip(cells, lengths, strict=True))
            lines.append("  ".join(padded).rstrip())
        for what, factors in (("output", self.multipliers), ("logits", self.attention)):
            lines += [f"{what} of {family} x {factor:.4g}" for family, factor in factors.items()]
        return "\n".join(lines)


def scale(
    module: nn.Module,
    parametrization: str | tuple[float, float] | Parametrization = "completep",
    *,
    base: nn.Module,
    blocks: str | None = None,
    branches: str | Sequence[str] = (),
    roles: Mapping[str, str] | None = None,
    transposed: str | Sequence[str] = (),
    init: bool | float | Mapping[str, float] = True,
) -> nn.Module:
    """Apply a parametrization to a torch model, in place, relative to a base of the same architecture.

    Hyperparameters tuned on the base then hold for the model.  Shapes that differ between the two tell
    which dimensions grow, and with that each parameter's role, whose rule is that of
    `scaling.Parametrization.rule`:

    | what grows | role |
    |---|---|
    | fan-in and fan-out | hidden |
    | fan-out only, as of embeddings | input |
    | fan-in only | output |
    | a vector | norm if it is called weight, else bias |
    | nothing | input, with all scales 1 |

    What is in a block follows the depth besides, r_L being the number of blocks over the base's: learning
    rates as r_L^-gamma, eps as r_L^-alpha.  Outputs of branches are multiplied by r_L^-alpha, and initial
    weights rescaled.  An output layer that shares the embedding's weight has its output divided by r_n in
    place of rates of its own.  If the size d of attention heads grows, logits get 1 / d instead of d^-1/2,
    where the module has a float `scaling` that its forward reads.  At the base shape nothing changes, to
    the bit.

    The model gets two attributes: `parametrization`, and `param_groups`, a Scaling.  Names in its
    state_dict stay, and multipliers are not in it: a model that is built anew is scaled before its weights
    are loaded.

    Args:
        module: the model; no depthnet.ResNet, or other module with param_groups, may be in it.
        parametrization: a preset's name, exponents (alpha, gamma), or a scaling.Parametrization.
        base: the model at the shape where hyperparameters are (or were) tuned, only to look at.  It may be
            on the meta device, with `init` a number.
        blocks: a pattern of the names of the residual blocks, such as "layers.*" (`*` within one part of a
            name); None if there are none.
        branches: patterns, within a block, of the modules whose outputs are added to the stream, such as
            ("self_attn", "mlp"); of outputs that are tuples, the first is.
        roles: role by pattern of parameter names (`*` across dots), for what shapes cannot tell.
        transposed: patterns of parameters (..., in, out) of modules of one's own.  Layers of torch and
            Conv1D of transformers are known.
        init: True rescales the initial weights from the standard deviations that the base has now.  A
            number, or numbers by pattern of parameter names, are those of its matrices instead; vectors
            then stay.  False leaves all weights alone, as is right for trained ones.

    Raises:
        TypeError, ValueError: an argument is not as described, or something is ambiguous; the error names
            the parameter or module, and nothing has been changed.
    """
    for argument, model in (("module", module), ("base", base)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{argument} must be a torch.nn.Module, got {type(model).__name__}")
    for name, submodule in module.named_modules():
        if hasattr(submodule, "param_groups"):
            raise ValueError(
                f"module: {name or 'it'} ({type(submodule).__name__}) has param_groups: it has been "
                "scaled, or scales itself"
            )
    parametrization = Parametrization.of(parametrization)
    pair = _Pair(module, base, blocks)
    depth_rule = parametrization.rule(
        "hidden",
        fan_in=1,
        width=1,
        depth=pair.depth,
        base_width=1,
        base_depth=pair.base_depth,
        block_multiplier=1.0,
    )
    branch_multipliers = _branches(pair, branches, depth_rule.multiplier)
    parameters, head_multipliers = _parameters(
        pair, parametrization, depth_rule, roles or {}, _patterns(transposed)
    )
    attention = _attention(pair, parametrization) if parametrization.width_rule == "mup" else {}
    if init is not False:
        parameters = _with_factors(pair, parameters, init)

    multipliers = branch_multipliers | head_multipliers
    # A module that has several names gets one hook.
    hooked = {module.get_submodule(name): factor for name, factor in multipliers.items()}
    for submodule, factor in hooked.items():
        submodule.register_forward_hook(Multiplied(factor))
    for name, factor in attention.items():
        module.get_submodule(name).scaling *= factor
    with torch.no_grad():
        for name, param in module.named_parameters():
            if parameters[name].factor != 1:
                param.mul_(parameters[name].factor)
    module.parametrization = parametrization
    by_family = (
        {pair.family(name): factor for name, factor in factors.items()}
        for factors in (multipliers, attention)
    )
    module.param_groups = Scaling(module, parametrization, parameters, *by_family)
    return module


class _Pair:
    """A model and its base: what is where in both."""

    def __init__(self, module: nn.Module, base: nn.Module, blocks: str | None):
        self.module, self.pattern = module, blocks
        self.blocks = [] if blocks is None else _named("blocks", module, blocks)
        self.base_blocks = [] if blocks is None else _named("blocks", base, blocks)
        # r_L is 1 without blocks.
        self.depth, self.base_depth = len(self.blocks) or 1, len(self.base_blocks) or 1
        self.base_parameters = dict(base.named_parameters(remove_duplicate=False))
        self.base_modules = dict(base.named_modules(remove_duplicate=False))

    def within(self, name: str) -> str | None:
        """The rest of a name that lies in a block, with its dot; None for other names."""
        for block in self.blocks:
            if name.startswith(f"{block}.") or name == block:
                return name.removeprefix(block)
        return None

    def family(self, name: str) -> str:
        rest = self.within(name)
        return name if rest is None else f"{self.pattern}{rest}"

    def counterpart(self, name: str, found: Mapping):
        """What has this name in the base, or, if it is in a block, in the first block that has it."""
        rest = self.within(name)
        names = [name] if rest is None else [name, *(block + rest for block in self.base_blocks)]
        return next((found[each] for each in names if each in found), None)


def _patterns(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _named(argument: str, module: nn.Module, pattern: str) -> list[str]:
    """Names of the submodules that match."""
    if not isinstance(pattern, str):
        raise TypeError(f"{argument} must be patterns of names, got {pattern!r}")
    try:
        found = {id(each) for each in find_blocks(module, pattern)}
    except ValueError:
        raise ValueError(
            f"{argument}: {pattern!r} finds no module in the {type(module).__name__}"
        ) from None
    return [name for name, each in module.named_modules() if id(each) in found]


def _branches(pair: _Pair, branches: str | Sequence[str], multiplier: float) -> dict[str, float]:
    names = [
        f"{block}.{name}"
        for block in pair.blocks
        for pattern in _patterns(branches)
        for name in _named("branches", pair.module.get_submodule(block), pattern)
    ]
    if not names and multiplier != 1:
        raise ValueError(
            "branches must name the modules in a block whose outputs are added to the stream, such as "
            f"('self_attn', 'mlp'): they are to be multiplied by {multiplier:.4g}"
        )
    for name in names:
        inner = next((each for each in names if each.startswith(f"{name}.")), None)
        if inner is not None:
            raise ValueError(f"branches must not lie in each other: {inner} is in {name}")
    return dict.fromkeys(names, multiplier) if multiplier != 1 else {}


def _parameters(
    pair: _Pair,
    parametrization: Parametrization,
    depth_rule: Rule,
    roles: Mapping[str, str],
    transposed: Sequence[str],
) -> tuple[dict[str, ScaledParameter], dict[str, float]]:
    """Every name's parameter, and multipliers of the modules whose weight is an embedding's, too."""
    for pattern, role in roles.items():
        one_of(f"roles[{pattern!r}]", role, ROLES)
    named = dict(pair.module.named_parameters(remove_duplicate=False))
    for argument, patterns in (("roles", roles), ("transposed", transposed)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise ValueError(f"{argument}: no parameter is called {pattern!r}")
    parameters: dict[str, ScaledParameter] = {}
    grown: set[float] = set()  # ratios of dimensions in blocks
    suspects: dict[str, set[float]] = {}
    for name, param in named.items():
        base = pair.counterpart(name, pair.base_parameters)
        if base is None:
            raise ValueError(
                f"{name} is not in base, nor in one of its blocks; if it is in a residual block here, "
                f"blocks={pair.pattern!r} does not name it"
            )
        shape, base_shape = tuple(param.shape), tuple(base.shape)
        if len(shape) != len(base_shape):
            raise ValueError(f"{name} has the shape {shape}, and {base_shape} in base")
        given = next((role for pattern, role in roles.items() if fnmatchcase(name, pattern)), None)
        flipped = any(fnmatchcase(name, pattern) for pattern in transposed)
        owner = pair.module.get_submodule(name.rpartition(".")[0])
        role, fan_in, fan_out = _role(name, owner, shape, base_shape, given, flipped)
        in_block = pair.within(name) is not None
        ratios = {size / base for size, base in zip(shape, base_shape, strict=True) if size != base}
        if in_block:
            grown |= ratios
        elif role == "hidden" and given is None:
            suspects[name] = ratios
        parameters[name] = _scaled(
            pair.family(name), role, in_block, fan_in, fan_out, parametrization, depth_rule
        )
    for name, ratios in suspects.items():
        if pair.blocks and not ratios <= grown:
            raise ValueError(
                f"{name} would be hidden, but grows by {sorted(ratios)}, and nothing in the blocks by "
                f"{sorted(ratios - grown)}: build the base with the same inputs and outputs, or say "
                f"what it is with roles={{{name!r}: ...}}"
            )
    return parameters, _shared(named, parameters, parametrization)


def _shared(
    named: Mapping[str, Tensor],
    parameters: dict[str, ScaledParameter],
    parametrization: Parametrization,
) -> dict[str, float]:
    """Give names of one tensor one rule; multipliers of modules that use an embedding as output layer."""
    names: dict[int, list[str]] = {}
    for name, param in named.items():
        names.setdefault(id(param), []).append(name)
    multipliers = {}
    for together in names.values():
        decided = {parameters[name].group: parameters[name] for name in together}
        if len(decided) == 1:
            continue
        by_role = {scaled.role: scaled for scaled in decided.values()}
        if len(decided) != 2 or set(by_role) != {"input", "output"}:
            raise ValueError(
                f"{' and '.join(together)} are one tensor, with the different roles "
                f"{' and '.join(decided)}; make them one with roles={{...}}"
            )
        width, base_width = by_role["input"].width
        rule = parametrization.rule("tied", fan_in=1, width=width, depth=0, base_width=base_width)
        tied = replace(by_role["input"], role="tied", rule=rule)
        for name in together:
            if parameters[name].role == "output" and tied.rule.multiplier != 1:
                multipliers[name.rpartition(".")[0]] = tied.rule.multiplier
            parameters[name] = tied
    return multipliers


def _role(
    name: str,
    owner: nn.Module,
    shape: tuple[int, ...],
    base_shape: tuple[int, ...],
    role: str | None,
    transposed: bool,
) -> tuple[str, Pair, Pair]:
    """A parameter's role (unless given), fan-in and fan-out."""

    def sizes(dimensions: Sequence[int]) -> Pair:
        return (
            math.prod(shape[dimension] for dimension in dimensions),
            math.prod(base_shape[dimension] for dimension in dimensions),
        )

    def ambiguous(what: str) -> ValueError:
        return ValueError(
            f"{name} of shape {shape}, {base_shape} in base: {what}; say what it is with "
            f"roles={{{name!r}: ...}}, one of {', '.join(ROLES)}"
        )

    vector = "norm" if name.rpartition(".")[2] == "weight" else "bias"
    if len(shape) <= 1:
        return role or vector, (1, 1), sizes(range(len(shape)))
    dimensions = _dimensions(owner, shape, transposed)
    if dimensions is not None:
        fan_in, fan_out = map(sizes, dimensions)
        if role is None and isinstance(owner, EMBEDDINGS) and shape[0] != base_shape[0]:
            raise ambiguous("its rows should be as many as in base (the same vocabulary)")
        if role is None:
            into, out_of = fan_in[0] != fan_in[1], fan_out[0] != fan_out[1]
            role = ("hidden" if out_of else "output") if into else "input"
        return role, fan_in, fan_out
    growing = [i for i, size in enumerate(shape) if size != base_shape[i]]
    fan_in, fan_out = sizes(growing[-1:]), sizes(growing[:1])
    if role is None:
        alike = len(growing) == 2 and fan_in[0] * fan_out[1] == fan_in[1] * fan_out[0]
        if sum(size > 1 for size in shape) <= 1:
            role = vector
        elif growing and not alike:
            raise ambiguous(
                f"which dimension of a {type(owner).__name__}'s is the fan-in is not known"
            )
        else:
            role = "hidden" if growing else "input"
    return role, fan_in, fan_out


def _dimensions(
    owner: nn.Module, shape: tuple[int, ...], transposed: bool
) -> tuple[Sequence[int], Sequence[int]] | None:
    """Which dimensions of a weight make up fan-in and fan-out; None where nobody has said so."""
    last = len(shape) - 1
    if transposed:
        return [last - 1], [last]
    if isinstance(owner, EMBEDDINGS):
        return [], [1]  # one row at a time
    if isinstance(owner, _ConvTransposeNd):
        return [0, *range(2, last + 1)], [1]
    if isinstance(owner, (nn.Linear, _ConvNd)):
        return range(1, last + 1), [0]
    if isinstance(owner, nn.MultiheadAttention) and last == 1:
        return [1], [0]
    if type(owner).__name__ == "Conv1D" and last == 1:  # of transformers
        return [0], [1]
    features = getattr(owner, "in_features", None), getattr(owner, "out_features", None)
    if features[0] != features[1]:
        return {features: ([0], [1]), features[::-1]: ([1], [0])}.get(shape)
    return None


def _scaled(
    family: str,
    role: str,
    in_block: bool,
    fan_in: Pair,
    fan_out: Pair,
    parametrization: Parametrization,
    depth_rule: Rule,
) -> ScaledParameter:
    width = fan_in if role in ("hidden", "output") else fan_out

    def rule(which: int) -> Rule:
        return parametrization.rule(
            role,
            fan_in=fan_in[which],
            width=width[which],
            depth=0,  # rates of every role follow the depth below
            base_width=width[1],
            block_multiplier=1.0,
            output_std=1.0,
        )

    here, there = rule(0), rule(1)
    if in_block:
        here = replace(
            here,
            update_scale=here.update_scale * depth_rule.update_scale,
            grad_scale=here.grad_scale * depth_rule.grad_scale,
        )
    # Biases and gains start as in the base.
    init_ratio = here.init_std / there.init_std if there.init_std else 1.0
    return ScaledParameter(family, role, in_block, width, here, init_ratio)


def _attention(pair: _Pair, parametrization: Parametrization) -> dict[str, float]:
    """By module whose heads have another size than the base's, what its `scaling` is multiplied by."""
    factors = {}
    for name, module in pair.module.named_modules():
        base = pair.counterpart(name, pair.base_modules)
        sizes = _integer(module, HEAD_SIZE), _integer(base, HEAD_SIZE)
        wants = (
            f"{name or 'module'} ({type(module).__name__}): build model and base with heads of the same "
            "size, and more of them: attention would need logits ∝ 1 / size"
        )
        if None in sizes:
            heads = _integer(module, HEADS), _integer(base, HEADS)
            if None not in heads and heads[0] == heads[1] and _grows(module, base):
                raise ValueError(f"{wants}; both have {heads[0]} heads, and the width differs")
        elif sizes[0] != sizes[1]:
            scalings = getattr(module, "scaling", None), getattr(base, "scaling", None)
            known = all(isinstance(value, float) and value > 0 for value in scalings)
            if not (
                known and math.isclose(scalings[0] / scalings[1], (sizes[1] / sizes[0]) ** 0.5)
            ):
                raise ValueError(
                    f"{wants}; sizes are {sizes[0]} and {sizes[1]}, and no attribute `scaling` follows "
                    "size^-1/2"
                )
            factors[name] = parametrization.attention_scale(*sizes) * sizes[0] ** 0.5
    return factors


def _integer(module: nn.Module | None, names: Sequence[str]) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if type(value) is int), None)


def _grows(module: nn.Module, base: nn.Module) -> bool:
    there = dict(base.named_parameters())
    return any(
        name in there and param.ndim > 1 and param.shape != there[name].shape
        for name, param in module.named_parameters()
    )


def _with_factors(
    pair: _Pair, parameters: dict[str, ScaledParameter], init: bool | float | Mapping[str, float]
) -> dict[str, ScaledParameter]:
    """The parameters with what their initial weights are to be multiplied by, the same in all blocks."""
    named = dict(pair.module.named_parameters())
    families: dict[tuple[str, str], list[str]] = {}
    for name in named:
        families.setdefault((parameters[name].family, parameters[name].group), []).append(name)
    factors = {}
    for family, names in families.items():
        own = [named[name] for name in names]
        base = [pair.counterpart(name, pair.base_parameters) for name in names]
        at_base = pair.depth == pair.base_depth and own[0].shape == base[0].shape
        if at_base or (init is not True and own[0].ndim < 2):
            continue
        std, base_std = _std(names, own, "module"), _given_std(names[0], init)
        error = (2 * sum(map(torch.numel, own))) ** -0.5
        if base_std is None:
            base = list({id(param): param for param in base}.values())
            base_std = _std(names, base, "base")
            error = math.hypot(error, (2 * sum(map(torch.numel, base))) ** -0.5)
            if std and not base_std:
                raise ValueError(
                    f"init: {names[0]} starts as a constant in base, but not in the model"
                )
        if not std or not base_std:  # what starts as a constant stays
            continue
        factor = base_std * parameters[names[0]].init_ratio / std
        if abs(math.log(factor)) > NOISE * error:
            factors[family] = factor
    return {
        name: replace(scaled, factor=factors.get((scaled.family, scaled.group), 1.0))
        for name, scaled in parameters.items()
    }


def _given_std(name: str, init: bool | float | Mapping[str, float]) -> float | None:
    """A matrix's standard deviation at the base shape; None if it is to be measured."""
    if init is True:
        return None
    given = init if isinstance(init, Mapping) else {"*": init}
    for pattern, std in given.items():
        if fnmatchcase(name, pattern):
            if number(f"init of {name}", std) < 0:
                raise ValueError(f"init of {name} must not be negative, got {std}")
            return std
    raise ValueError(f"init: no pattern fits {name}")


def _std(names: Sequence[str], tensors: Sequence[Tensor], argument: str) -> float:
    """The standard deviation over all entries of tensors with means of their own."""
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(
            f"init: {names[0]} of {argument} is on the meta device, and has no standard deviation; give "
            + ("init=False" if argument == "module" else "that of the base's weights: init=0.02")
        )
    variances = [tensor.detach().float().var(correction=0).item() for tensor in tensors]
    return (sum(variances) / len(variances)) ** 0.5
