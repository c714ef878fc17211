"""Parameter groups of modules whose parametrization scales learning rates.

No torch import: a module is anything with torch.nn.Module's `named_modules` and `parameters`, and a
scaled module is one that has a method `param_groups(optimizer)` besides.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from depthnet._checks import one_of
from depthnet.scaling.parametrization import OPTIMIZERS, Rule

SCALES = ("lr_scale", "eps_scale", "weight_decay_scale")

# Live scaled modules: how an optimizer recognises parameters that come without their module.
_tracked: weakref.WeakSet = weakref.WeakSet()


def track(module) -> None:
    """Remember a scaled module for as long as it lives."""
    _tracked.add(module)


def group(name: str, params: list, rule: Rule, optimizer: str) -> dict:
    """The parameter group of tensors that follow one rule."""
    return {
        "name": name,
        "params": params,
        "rule": optimizer,
        "lr_scale": rule.lr_scale(optimizer),
        "eps_scale": rule.eps_scale(),
        "weight_decay_scale": rule.weight_decay_scale(optimizer),
    }


def param_groups(module, optimizer: str) -> list[dict]:
    """Parameter groups of a module: those of each scaled module in it, and one for the rest.

    Every group has a name, `params`, `lr_scale`, `eps_scale` and `weight_decay_scale`.

    Args:
        optimizer: `adamw` (decoupled weight decay), `adam` (coupled) or `sgd`.
    """
    one_of("optimizer", optimizer, OPTIMIZERS)
    groups, seen = [], set()
    for name, submodule in module.named_modules():
        if not hasattr(submodule, "param_groups"):
            continue
        for group in submodule.param_groups(optimizer):
            params = [param for param in group["params"] if id(param) not in seen]
            seen.update(map(id, params))
            if params:
                full_name = f"{name}.{group['name']}" if name else group["name"]
                groups.append({**group, "params": params, "name": full_name})
    rest = [param for param in module.parameters() if id(param) not in seen]
    if rest:
        scales = dict.fromkeys(SCALES, 1.0)
        groups.append({"params": rest, "name": "other", "rule": optimizer, **scales})
    return groups


def check_unscaled(parameters: Iterable, optimizer: str, write: str) -> None:
    """Raise a ValueError if bare parameters belong to a module that scales their learning rates."""
    ids = {id(param) for param in parameters}
    for module in list(_tracked):
        for group in module.param_groups(optimizer):
            scales = [group[key] for key in SCALES]
            if any(scale != 1 for scale in scales) and any(id(p) in ids for p in group["params"]):
                described = ", ".join(f"{key}={group[key]:g}" for key in SCALES)
                raise ValueError(
                    f"params: bare parameters of a {type(module).__name__} were given, but its "
                    f"parametrization, {module.parametrization}, scales its {group['name']} group "
                    f"({described}). Write {write}(model, ...) or "
                    f"{write}(model.param_groups({optimizer!r}), ...) instead of "
                    f"{write}(model.parameters(), ...)"
                )


def torch_param_groups(
    module,
    lr: float,
    *,
    optimizer: str = "adamw",
    eps: float | None = None,
    weight_decay: float | None = None,
) -> list[dict]:
    """Plain parameter groups, every scale multiplied out, for any optimizer of torch's API.

    Example: torch.optim.AdamW(torch_param_groups(model, 2**-8, eps=1e-8, weight_decay=0.1)).

    Args:
        module: a model; scaled modules in it keep their rules, everything else gets `lr` itself.
        lr: the learning rate at the base shape.
        optimizer: the rule to follow: `adamw`, `adam` or `sgd`.
        eps, weight_decay: their values at the base shape; None leaves them to the optimizer, which
            is right for weight decay 0 and for networks where eps does not matter.
    """
    plain = []
    for group in param_groups(module, optimizer):
        scaled = {"params": group["params"], "name": group["name"], "lr": lr * group["lr_scale"]}
        if eps is not None:
            scaled["eps"] = eps * group["eps_scale"]
        if weight_decay is not None:
            scaled["weight_decay"] = weight_decay * group["weight_decay_scale"]
        plain.append(scaled)
    return plain
