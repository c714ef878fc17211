"""Which backend runs an operator, and how an operator is registered with torch.library.

An operator has one implementation for every device, which asks the backends in turn.  What is saved for
the backward pass has the same layout in every backend.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from depthnet._checks import one_of
from depthnet.kernels import cpu, cuda, reference, triton

# In the order in which `auto` tries them.
BACKENDS = {"cpu": cpu, "cuda": cuda, "triton": triton, "reference": reference}

_choice = one_of(
    "DEPTHNET_BACKEND", os.environ.get("DEPTHNET_BACKEND", "auto"), ["auto", *BACKENDS]
)


@contextmanager
def use_backend(name: str):
    """Run the operators inside the `with` block on one backend, by its name, or on `auto`.

    The choice is the process's, like torch.backends' flags, so that the autograd engine's threads see
    it.  DEPTHNET_BACKEND sets it at import.  A named backend that cannot run an operator raises a
    RuntimeError with every backend's reasons; `auto` takes the first that can.

    Raises:
        ValueError: there is no backend of that name.
    """
    global _choice
    previous, _choice = _choice, one_of("backend", name, ["auto", *BACKENDS])
    try:
        yield
    finally:
        _choice = previous


def choice() -> str:
    """The backend that operators run on now: a name, or `auto`."""
    return _choice


class BackendStatus(NamedTuple):
    """One backend: whether it can run on this machine, why not, and what it is made of."""

    name: str
    active: bool
    reasons: list[str]
    details: str


def backends() -> list[BackendStatus]:
    """Every backend, in the order in which `auto` tries them."""
    status = []
    for name, backend in BACKENDS.items():
        reasons = backend.missing()
        status.append(
            BackendStatus(name, not reasons, reasons, "" if reasons else backend.details())
        )
    return status


def select(op: str, *tensors: Tensor, native_reasons: Sequence[str] = ()):
    """The module of the backend that runs `op` on these tensors.

    `native_reasons` say why only the reference can.
    """

    def unsupported(name: str) -> list[str]:
        own = BACKENDS[name].unsupported(op, *tensors)
        return own if name == "reference" else [*own, *native_reasons]

    for name in BACKENDS if _choice == "auto" else [_choice]:
        if not unsupported(name):
            return BACKENDS[name]
    reasons = "".join(
        f"\n  {name}: {'; '.join(unsupported(name)) or 'can run it'}" for name in BACKENDS
    )
    raise RuntimeError(f"backend {_choice!r} was asked for and cannot run {op}:{reasons}")


def runs_native(op: str, *tensors: Tensor) -> bool:
    """Whether a native kernel takes the place of what torch has for `op`."""
    return _choice in ("auto", "cpu") and not cpu.unsupported(op, *tensors)


_library = torch.library.Library("depthnet", "DEF")


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device, which may be one that has none."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class _Eager(NamedTuple):
    """An operator for plain tensors that nothing watches, past torch.library."""

    run: Callable
    differentiable: Callable | None  # the same, with its gradient


_eager: dict[str, _Eager] = {}


def register(schema: str, implementation, fake) -> None:
    """Define an operator with one implementation for all devices, and its fake kernel."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def contiguous(output):  # as the fakes promise
        if isinstance(output, tuple):
            return tuple(tensor.contiguous() for tensor in output)
        return output if output is None else output.contiguous()

    def run(first, *args):
        # In which dtype each step is computed is the operator's own matter, also inside autocast.
        tensor = first if isinstance(first, Tensor) else first[0]
        if autocast_enabled(tensor):
            with torch.autocast(tensor.device.type, enabled=False):
                return contiguous(implementation(first, *args))
        return contiguous(implementation(first, *args))

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"depthnet::{name}", fake, lib=_library)
    _eager[name] = _Eager(run, None)


def register_autograd(op: str, backward, setup_context) -> None:
    """The gradient of `op`, which has itself none if it is an operator of its own, `op`_backward."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"depthnet.kernels.{op} cannot be differentiated twice")

    torch.library.register_autograd(
        f"depthnet::{op}", backward, setup_context=setup_context, lib=_library
    )
    if f"{op}_backward" in _eager:
        torch.library.register_autograd(f"depthnet::{op}_backward", refuse, lib=_library)
    run = _eager[op].run

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            output = run(*args)
            setup_context(ctx, args, output)
            return output

    Function.backward = staticmethod(backward)
    _eager[op] = _Eager(run, Function.apply)


def call(op: str, *args):
    """Run an operator; past torch.library, which costs more than a short kernel, where nobody looks on."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()  # fake tensors, make_fx, FLOP counters
        or torch._C._functorch.peek_interpreter_stack() is not None  # vmap, grad
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    ):
        return getattr(torch.ops.depthnet, op)(*args)
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        return _eager[op].run(*args)
    function = _eager[op].differentiable or getattr(torch.ops.depthnet, op)
    return function(*args)
