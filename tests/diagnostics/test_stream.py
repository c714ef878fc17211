"""The residual stream: the same numbers as the model's own forward and backward passes."""

import pytest
import torch
from torch import nn

from depthnet import ResNet
from depthnet.diagnostics import residual_stream


def resnet(**options):
    generator = torch.Generator().manual_seed(0)
    return ResNet(5, 16, 4, 3, output_std=1.0, generator=generator, **options).double()


def test_stream_of_a_resnet():
    model, x = resnet(), torch.randn(7, 5, dtype=torch.float64)
    stream = residual_stream(model, x, lambda f: f.square().sum())
    assert stream.depth == 4
    assert stream.x.shape == stream.dx.shape == (5, 7, 16)
    assert stream.h.shape == stream.dh.shape == (4, 7, 16)
    torch.testing.assert_close(stream.outputs, model(x))
    torch.testing.assert_close(stream.x[-1], model.blocks(model.input(x)))
    model(x).square().sum().backward()
    # dLoss/dW_l = dh_l^T x_{l-1}.
    torch.testing.assert_close(stream.dh.mT @ stream.x[:-1], model.blocks.weight.grad)
    torch.testing.assert_close(stream.dx[0].T @ x, model.input.weight.grad)
    assert not stream.x.requires_grad
    assert residual_stream(model, x).dx is None


@pytest.mark.parametrize(
    "block",
    [
        {"block_depth": 2},
        {"block_depth": 2, "norm": "layer"},
        {"norm": "rms"},
        {"block_depth": 3, "activate": "before"},
    ],
    ids=str,
)
def test_stream_of_other_blocks(block):
    model, x = resnet(**block), torch.randn(7, 5, dtype=torch.float64)
    stream = residual_stream(model, x, lambda f: f.square().sum())
    layers = block.get("block_depth", 1)
    assert stream.x.shape == (5, 7, 16)
    assert stream.h.shape == stream.dh.shape == (4 * layers, 7, 16)
    torch.testing.assert_close(stream.outputs, model(x))
    model(x).square().sum().backward()
    torch.testing.assert_close(stream.dx[0].T @ x, model.input.weight.grad)


def test_members_of_a_population_are_single_networks():
    model, x = resnet(population=2), torch.randn(7, 5, dtype=torch.float64)
    stream = residual_stream(model, x, lambda f: f.square().sum())
    for member in range(2):
        single = resnet()
        for name in ("input", "blocks", "output"):
            getattr(single, name).weight.data = getattr(model, name).weight.data[member]
        own = residual_stream(single, x, lambda f: f.square().sum())
        for name in ("x", "h", "dx", "dh"):
            torch.testing.assert_close(getattr(stream, name)[:, member], getattr(own, name))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.inner(x).relu()


def test_stream_of_any_module_through_hooks():
    model = nn.Sequential(nn.Linear(3, 8), nn.Sequential(Block(), Block()), nn.Linear(8, 2))
    x = torch.randn(6, 3)
    for blocks in ("1.*", list(model[1])):
        stream = residual_stream(model, x, lambda f: f.sum(), blocks=blocks)
        assert stream.x.shape == stream.dx.shape == (3, 6, 8)
        assert stream.h is stream.dh is None
        torch.testing.assert_close(stream.x[0], model[0](x))
        torch.testing.assert_close(model[2](stream.x[-1]), stream.outputs)
        torch.testing.assert_close(stream.dx[-1], model[2].weight.sum(0).expand(6, 8))
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_reach_the_first_layer_of_frozen_networks():
    model, x = resnet(), torch.randn(7, 5, dtype=torch.float64)
    plain = nn.Sequential(nn.Linear(3, 8), nn.Sequential(Block(), Block()), nn.Linear(8, 2))
    y = torch.randn(6, 3)
    for network, inputs, blocks in ((model, x, None), (plain, y, "1.*")):
        free = residual_stream(network, inputs, lambda f: f.square().sum(), blocks=blocks)
        network.requires_grad_(False)
        frozen = residual_stream(network, inputs, lambda f: f.square().sum(), blocks=blocks)
        torch.testing.assert_close(frozen.dx, free.dx)
    assert not x.requires_grad
    assert not y.requires_grad


def test_a_resnet_through_hooks_would_have_one_block():
    model, x = resnet(), torch.randn(2, 5, dtype=torch.float64)
    stream = residual_stream(model, x, blocks="blocks")
    torch.testing.assert_close(stream.x[1], residual_stream(model, x).x[-1])


def test_errors():
    model = nn.Sequential(nn.Linear(3, 8), nn.Sequential(Block(), Block()), nn.Linear(8, 2))
    x = torch.randn(6, 3)
    with pytest.raises(TypeError, match="blocks must name the residual blocks of a Sequential"):
        residual_stream(model, x)
    with pytest.raises(ValueError, match=r"blocks='layers\.\*' finds no module"):
        residual_stream(model, x, blocks="layers.*")
    with pytest.raises(ValueError, match="blocks must keep the shape of the stream"):
        residual_stream(model, x, blocks=[model[0], model[1]])
    keyword = nn.Module()
    keyword.block, keyword.forward = Block(), lambda x: keyword.block(x=x)
    with pytest.raises(ValueError, match="first positional argument; the Block was called with"):
        residual_stream(keyword, torch.randn(6, 8), blocks="block")
    with pytest.raises(ValueError, match="run once each, in the order given: 2 were given, 2 ran"):
        residual_stream(model, x, blocks=[model[1][1], model[1][0]])
    assert not any(module._forward_hooks for module in model.modules())
