"""A whole training step, forward, backward and optimizer, as one CUDA graph."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_map_only,
    tree_unflatten,
)

from depthnet._checks import integer


def capture(step_fn: Callable, warmup: int = 3) -> CapturedStep:
    """A function that does what `step_fn` does, on a GPU as one CUDA graph.

    Every call is one step, in the order of the calls, as if `step_fn` were called itself: the first
    `warmup` calls are (on a stream of their own), the next one captures the graph and replays it, and all
    others copy their inputs into the graph's and replay it.  Without a CUDA tensor among its inputs a
    call is a plain call of `step_fn`, so that one script runs on every device.

    Args:
        step_fn: a training step, with `zero_grad`, `backward` and the optimizer's `step` inside.  Its
            inputs and outputs are tensors of any shapes and dtypes, and plain values, also nested in
            tuples, lists and dictionaries.
        warmup: how many calls are plain, at least 1; more if GradScaler skips them all.
            DistributedDataParallel needs 11.

    Raises:
        TypeError, ValueError: `warmup` is not such a number.
    """
    return CapturedStep(step_fn, integer("warmup", warmup, 1))


class CapturedStep:
    """What `capture` returns: a callable with the inputs and outputs of its `step_fn`.

    A replay returns new tensors, which do not require gradients; outputs that are no tensors are the
    captured call's.

    Raises:
        TypeError, ValueError: an input is not on the GPU of the others, requires a gradient, or differs
            from the captured call's in structure, shape, dtype, device or, unless a tensor, in value.
        RuntimeError: the step cannot be captured; or an optimizer's number, which is part of the graph,
            has changed since, or its state has been replaced.
    """

    def __init__(self, step_fn: Callable, warmup: int):
        self._step_fn, self._warmup = step_fn, warmup
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *args, **kwargs):
        inputs, structure = tree_flatten((args, dict(sorted(kwargs.items()))))
        if self._graph is None:
            device = next((value.device for value in inputs if _on_gpu(value)), None)
            if device is None:
                return self._step_fn(*args, **kwargs)
            _check_capturable(inputs, structure, device)
            if self._stream is None:
                self._stream = torch.cuda.Stream(device)
            if self._warmup > 0:
                return self._warm_up(torch.cuda.current_stream(device), args, kwargs)
            self._capture(inputs, structure)
        self._check(inputs, structure)
        for static, value in zip(self._inputs, inputs, strict=True):
            if isinstance(value, Tensor):
                static.copy_(value, non_blocking=True)
        self._graph.replay()
        return tree_map_only(Tensor, Tensor.clone, self._outputs)

    def _warm_up(self, current: torch.cuda.Stream, args: tuple, kwargs: dict):
        """A plain call, on the stream of the capture: autograd runs gradients where it first saw them."""
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _optimizer_steps() as steps:
            outputs = self._step_fn(*args, **kwargs)
        current.wait_stream(self._stream)
        # A capture needs the optimizers' states.
        if not any(getattr(step.optimizer, "state_pending", False) for step in steps):
            self._warmup -= 1
        return outputs

    def _capture(self, inputs: list, structure: TreeSpec) -> None:
        static = tree_map_only(Tensor, Tensor.clone, inputs)
        args, kwargs = tree_unflatten(static, structure)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._stream.device)
        torch.cuda.empty_cache()  # the graph has its own memory, and cannot use what warm-up has left
        with torch.cuda.stream(self._stream), _optimizer_steps() as steps:
            # Other threads, which pin memory for data loaders, may do what a capture must not.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                outputs = self._step_fn(*args, **kwargs)
                graph.capture_end()
            except BaseException as error:
                with suppress(RuntimeError):  # of a capture that is invalid already
                    graph.capture_end()
                if isinstance(error, RuntimeError):
                    raise RuntimeError(_why_not_captured(error)) from error
                raise
        # Without the graph of autograd, whose memory is not needed again.
        self._outputs = tree_map_only(Tensor, Tensor.detach, outputs)
        self._inputs, self._structure, self._steps = static, structure, steps
        self._graph = graph

    def _check(self, inputs: list, structure: TreeSpec) -> None:
        """Raise if a replay would not be what a call of `step_fn` is."""
        if structure != self._structure:
            raise TypeError(
                f"(args, kwargs) must be structured as in the captured call, "
                f"{_outline(self._structure)}, got {_outline(structure)}"
            )
        for index, (static, value) in enumerate(zip(self._inputs, inputs, strict=True)):
            if _fixed(value) != _fixed(static):
                raise ValueError(
                    f"{_name(structure, index)} must be as in the captured call, {_described(static)}, "
                    f"got {_described(value)}"
                )
        for step in self._steps:
            step.check()


class _OptimizerStep:
    """What a captured step of an optimizer has read from it: its state, and all numbers of its groups."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer, self.state = optimizer, optimizer.state
        self.groups = self._read_groups()

    def _read_groups(self) -> list[dict]:
        return [
            # A tensor on the GPU is read by the replay, any other once, by the capture.
            {
                key: value.tolist() if isinstance(value, Tensor) and not _on_gpu(value) else value
                for key, value in group.items()
                if key not in ("params", "param_names")
            }
            for group in self.optimizer.param_groups
        ]

    def check(self) -> None:
        name, groups = type(self.optimizer).__name__, self._read_groups()
        if self.optimizer.state is not self.state or len(groups) != len(self.groups):
            raise RuntimeError(
                f"{name} has another state, or other groups, than when its step was captured; capture "
                "the step anew after load_state_dict and add_param_group"
            )
        for index, (group, captured) in enumerate(zip(groups, self.groups, strict=True)):
            for key, value in captured.items():
                new = group.get(key)
                if new is value or (not _on_gpu(new) and not _on_gpu(value) and new == value):
                    continue
                raise RuntimeError(
                    f"{name}.param_groups[{index}][{key!r}] was {value} when the step was captured, and "
                    f"is {new} now; numbers and tensors on the CPU are part of the graph: capture the "
                    "step anew, or, to change lr between steps, make it a 0-dim tensor on the GPU that "
                    "changes in place, as torch's schedulers do"
                )


@contextmanager
def _optimizer_steps() -> Iterator[list[_OptimizerStep]]:
    """Collects the optimizers' steps inside the `with` block."""
    steps = []
    hook = register_optimizer_step_post_hook(
        lambda optimizer, args, kwargs: steps.append(_OptimizerStep(optimizer))
    )
    try:
        yield steps
    finally:
        hook.remove()


def _on_gpu(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


def _check_capturable(inputs: list, structure: TreeSpec, device: torch.device) -> None:
    for index, value in enumerate(inputs):
        if not isinstance(value, Tensor):
            continue
        if value.device != device:
            raise ValueError(
                f"{_name(structure, index)} must be on {device}, as the other inputs, got "
                f"{_described(value)}; move it there before the call"
            )
        if value.requires_grad:
            raise ValueError(
                f"{_name(structure, index)} must not require a gradient, which would be that of the "
                "graph's copy"
            )


def _fixed(value: object) -> object:
    """What of an input is part of the graph."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device, value.requires_grad
    return type(value), value


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    gradient = " that requires a gradient" if value.requires_grad else ""
    return f"a {value.dtype} of shape {tuple(value.shape)} on {value.device}{gradient}"


def _name(structure: TreeSpec, index: int) -> str:
    """An input as in the call: args[0], kwargs['x'][1]."""
    paths, _ = tree_flatten_with_path(tree_unflatten(range(structure.num_leaves), structure))
    (which, *rest), _ = paths[index]
    return ("args", "kwargs")[which.idx] + keystr(rest)


def _outline(structure: TreeSpec) -> str:
    return repr(tree_unflatten(["*"] * structure.num_leaves, structure)).replace("'*'", "*")


def _why_not_captured(error: RuntimeError) -> str:
    # The first frame is the call of step_fn, the next one is its own.
    where = traceback.extract_tb(error.__traceback__)[1:2]
    line = "".join(f", line {frame.lineno} of {frame.filename}: {frame.line}" for frame in where)
    return (
        f"the step could not be captured as a CUDA graph{line}\n{error}\n"
        "A captured step must not look at values of tensors on the GPU (.item(), .cpu(), print, if), make "
        "tensors whose shape depends on values (nonzero, masks), move tensors from the CPU, or let a loss "
        "of a step outside, with its gradients' graph, live on."
    )
