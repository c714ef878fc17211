"""The operators under torch.library's own checks and under torch.compile."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from depthnet import kernels

OPS = torch.ops.depthnet


def stack_arguments(lead, depth, every, save, dtype=torch.float32):
    n = 12
    x = torch.randn(lead, 3, n, dtype=dtype, requires_grad=save)
    weight = (torch.randn(lead, depth, n, n, dtype=dtype) / 4).requires_grad_(save)
    scales = torch.rand(lead, dtype=torch.float64) if lead > 1 else None
    return x, weight, 0.3, scales, 1.0, 1.0, True, every, save


@pytest.mark.parametrize("lead", [1, 3])
@pytest.mark.parametrize("save", [True, False])
def test_opcheck_scaled_residual(backend, lead, save):
    x, h = (torch.randn(lead, 3, 12, requires_grad=save) for _ in range(2))
    scales = torch.rand(lead, dtype=torch.float64) if lead > 1 else None
    arguments = (x, h, 0.3, scales, 1.0, 1.0, True, save)
    torch.library.opcheck(OPS.scaled_residual, arguments)
    if save:
        y, signs = OPS.scaled_residual(*arguments)
        backward = (y.detach(), signs, 0.3, scales, 1.0, 1.0, True)
        torch.library.opcheck(OPS.scaled_residual_backward, backward)


@pytest.mark.parametrize("lead", [1, 3])
@pytest.mark.parametrize("depth", [0, 1, 5])
@pytest.mark.parametrize("every", [0, 2])
def test_opcheck_residual_stack(backend, lead, depth, every):
    for save in (True, False):
        arguments = stack_arguments(lead, depth, every, save)
        torch.library.opcheck(OPS.residual_stack, arguments)
    arguments = stack_arguments(lead, depth, every, True)
    with torch.no_grad():
        y, *saved = OPS.residual_stack(*arguments)
    weight = arguments[1].detach()
    for weight_grad in (True, False):
        backward = (y, weight, *saved, *arguments[2:7], every, weight_grad)
        torch.library.opcheck(OPS.residual_stack_backward, backward)


@pytest.mark.parametrize("block", [(2, "", False), (2, "layer", False), (1, "", True)])
@pytest.mark.parametrize("every", [0, 2])
def test_opcheck_stack_of_other_blocks(backend, block, every):
    for save in (True, False):
        arguments = (*stack_arguments(3, 6, every, save), *block)
        torch.library.opcheck(OPS.residual_stack, arguments)
    with torch.no_grad():
        y, *saved = OPS.residual_stack(*stack_arguments(3, 6, every, True), *block)
    weight = arguments[1].detach()
    backward = (y, weight, *saved, *arguments[2:7], every, True, *block)
    torch.library.opcheck(OPS.residual_stack_backward, backward)


def test_opcheck_non_contiguous(backend):
    x, h = (torch.randn(1, 8, 4).mT.requires_grad_() for _ in range(2))
    torch.library.opcheck(OPS.scaled_residual, (x, h, 0.3, None, 1.0, 1.0, True, True))
    for depth in (0, 3):
        weight = torch.randn(1, depth, 8, 8).mT.requires_grad_()
        arguments = (x, weight, 0.3, None, 1.0, 1.0, True, 0, True)
        torch.library.opcheck(OPS.residual_stack, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_with_strided_tensors_autocast_and_changing_multipliers(compiler):
    x, weight = torch.randn(8, 4).mT, torch.randn(3, 8, 8) / 3

    def stack(x, weight, scale):
        with torch.autocast("cpu", torch.bfloat16):
            y = kernels.residual_stack(x, weight, scale)
        return kernels.scaled_residual(y, x, scale) * x

    compiled = torch.compile(stack, fullgraph=True, backend=compiler)
    for scale in (0.1, 0.2, 0.3):
        torch.testing.assert_close(compiled(x, weight, scale), stack(x, weight, scale))


def test_opcheck_half_precision():
    for dtype in (torch.bfloat16, torch.float16):
        for every in (0, 2):
            torch.library.opcheck(OPS.residual_stack, stack_arguments(1, 3, every, True, dtype))


def test_opcheck_optimizer_steps(backend):
    def tensors():
        return [torch.rand(2, 3), torch.rand(5)]

    rates = [torch.rand(3, dtype=torch.float64) for _ in range(3)]
    moments = tensors(), tensors()
    for greatest in ([], tensors()):  # without and with amsgrad
        steps = [torch.zeros(()), torch.ones(())]
        adam = (tensors(), tensors(), *moments, greatest, steps, *rates, [1, 0], 0.9, 0.99)
        torch.library.opcheck(OPS.adamw_step_, (*adam, True, False))
    sgd = (tensors(), tensors(), tensors(), *rates[:2], [1, 0], 0.9, 0.0, True, False, True)
    torch.library.opcheck(OPS.sgd_step_, sgd)


def test_fake_tensors_have_the_real_shapes():
    with FakeTensorMode():
        x, weight = torch.empty(2, 4, 10), torch.empty(2, 3, 10, 10, requires_grad=True)
        assert kernels.scaled_residual(x, x, torch.empty(2)).shape == x.shape
        y = kernels.residual_stack(x, weight, 0.1)
        assert y.shape == x.shape
        y.sum().backward()
        assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("every", [None, 2])
def test_compiled_stack_equals_eager(backend, every):
    x, weight = torch.randn(4, 12), (torch.randn(5, 12, 12) / 4).requires_grad_()

    def loss(x, weight):
        h = torch.tanh(x)
        y = kernels.residual_stack(h, weight, 0.3, checkpoint_every=every)
        return kernels.scaled_residual(y, x, 0.5, activation="relu").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(x, weight), weight)
    (actual,) = torch.autograd.grad(compiled(x, weight), weight)
    torch.testing.assert_close(actual, expected)


def test_members_multipliers_under_compile():
    x, weight, scale = (
        torch.randn(2, 4, 12),
        torch.randn(2, 3, 12, 12) / 4,
        torch.tensor([0.1, 0.2]),
    )
    compiled = torch.compile(kernels.residual_stack, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, scale), kernels.residual_stack(x, weight, scale))
