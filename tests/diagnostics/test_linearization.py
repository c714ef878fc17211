import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from depthnet import ResNet
from depthnet.diagnostics.fits import power_law
from depthnet.diagnostics.linearization import linearization
from depthnet.diagnostics.stream import residual_stream
from depthnet.optim import AdamW
from depthnet.reproduce.networks import SmoothBlock

WIDTH, SEEDS = 64, 4


def trained(
    depth,
    parametrization="depth_mup",
    activation="abs",
    steps=3,
    lr=2**-7,
    width=WIDTH,
    **options,
):
    """Blocks alone, a few steps of Adam: the model, its blocks' initial weights, inputs."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(SEEDS)]
    model = ResNet(
        16,
        width,
        depth,
        4,
        activation=activation,
        parametrization=parametrization,
        base_width=WIDTH,
        output_std=1.0,
        population=SEEDS,
        generator=generators,
        **options,
    )
    before = model.blocks.weight.detach().clone()
    hidden = [group for group in model.param_groups("adamw") if group["name"] == "hidden"]
    optimizer = AdamW(hidden, lr=lr)
    data = torch.Generator().manual_seed(100)
    x = torch.randn(32, 16, generator=data).to(before.dtype)
    y = torch.randint(4, (32,), generator=data).repeat(SEEDS)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(x).flatten(0, 1), y, reduction="sum").backward()
        optimizer.step()
    return model, before, x


def test_the_identity_is_linear():
    model, before, x = trained(16, activation="identity")
    found = linearization(model, before, x)
    assert (found.remainder == 0).all()
    assert (found.change > 0).all()
    assert (found.relative == 0).all()
    assert (found.products == 0).all()
    np.testing.assert_array_equal(found.linear, found.change[None])


def test_is_the_definition():
    model, before, x = trained(6, activation=(1.0, -0.3), dtype=torch.float64)
    found = linearization(model, before, x)
    assert found.remainder.shape == found.change.shape == (6, SEEDS)

    def phi(h):
        return torch.where(h >= 0, h, 0.3 * h)

    member = 2
    with torch.no_grad():
        stream = model.input(x)[member]
        for layer in range(6):
            weight, start = model.blocks.weight[member, layer], before[member, layer]
            after, h = stream @ weight.T, stream @ start.T
            slope = torch.where(h >= 0, torch.ones_like(h), 0.3 * torch.ones_like(h))
            change = phi(after) - phi(h)
            remainder = change - slope * (stream @ (weight - start).T)
            for z, size in ((change, found.change), (remainder, found.remainder)):
                z = 6 * model.blocks.scale * (z - z.mean(-1, keepdim=True))
                assert size[layer, member] == pytest.approx(
                    float(z.square().mean().sqrt()), rel=1e-9, abs=1e-12
                )
            z = phi(after)
            stream = stream + model.blocks.scale * (z - z.mean(-1, keepdim=True))


def plain_block(weights, x, activate="after", norm=None, gates=None):
    """phi(W_k .. phi(W_1 x)) for phi(h) = max(h, -0.3 h), and the slopes of phi; or with slopes given."""
    z, slopes = x, []

    def phi(z):
        own = 1.3 * (z >= 0).to(z.dtype) - 0.3
        slopes.append(own if gates is None else gates[len(slopes)])
        return z * slopes[-1]

    if norm == "layer":
        z = functional.layer_norm(z, z.shape[-1:])
    for weight in weights:
        z = phi(z @ weight.mT) if activate == "after" else phi(z) @ weight.mT
    return z, slopes


@pytest.mark.parametrize(
    ("block_depth", "options"),
    [(2, {}), (3, {}), (2, {"activate": "before"}), (2, {"norm": "layer", "mean_subtract": False})],
)
def test_of_deeper_blocks_is_the_definition(block_depth, options):
    """By forward-mode differentiation: of all layers, of one layer, and with phi' as it was."""
    model, before, x = trained(
        5, activation=(1.0, 0.3), lr=2**-4, dtype=torch.float64, block_depth=block_depth, **options
    )
    found = linearization(model, before, x)
    assert found.linear.shape == (block_depth, 5, SEEDS)
    assert found.change.shape == found.remainder.shape == found.products.shape == (5, SEEDS)
    shape = {key: value for key, value in options.items() if key != "mean_subtract"}
    member, stream = 1, residual_stream(model, x).x
    for number in range(5):
        layers = slice(number * block_depth, (number + 1) * block_depth)
        after, start = (w[member, layers] for w in (model.blocks.weight.detach(), before))

        def block(weights, at=stream[number, member], gates=None):
            return plain_block(weights, at, gates=gates, **shape)[0]

        _, gates = plain_block(start, stream[number, member], **shape)
        value, linear = torch.func.jvp(block, (start,), (after - start,))
        want = {
            "change": block(after) - value,
            "remainder": block(after) - value - linear,
            "products": block(after, gates=gates) - value - linear,
        }
        for layer in range(block_depth):
            update = torch.zeros_like(start)
            update[layer] = (after - start)[layer]
            want[f"linear {layer}"] = torch.func.jvp(block, (start,), (update,))[1]
        for key, z in want.items():
            name, _, layer = key.partition(" ")
            size = getattr(found, name)[(int(layer), number) if layer else number][member]
            if model.blocks.mean_subtract:
                z = z - z.mean(-1, keepdim=True)
            expected = 5 * model.blocks.scale * float(z.square().mean().sqrt())
            assert size == pytest.approx(expected, rel=1e-9), key
            assert size > 0, key


def test_products_are_all_that_is_not_linear_of_the_identity():
    found = linearization(*trained(8, activation="identity", block_depth=2))
    np.testing.assert_array_equal(found.remainder, found.products)
    assert (found.products > 0).all()
    np.testing.assert_array_equal(found.network_products, found.network_relative)


def test_is_linear_where_no_preactivation_changes_its_sign():
    model, before, x = trained(4, steps=0)
    with torch.no_grad():
        model.blocks.weight.mul_(1.5)
    found = linearization(model, before, x)
    assert (found.remainder == 0).all()
    assert (found.change > 0).all()


@pytest.mark.parametrize("parametrization", ["depth_mup", (0.75, 0.25), "ode"])
def test_falls_with_depth_unless_updates_keep_their_size(parametrization):
    depths, remainders, relative = (16, 64, 256), [], []
    for depth in depths:
        found = linearization(*trained(depth, parametrization))
        remainders.append(found.network_remainder)
        relative.append(found.network_relative)
    # Updates of pre-activations are of size u = L^-gamma.  Signs change with probability u, by a remainder
    # of size u: its root mean square is u^3/2, against u of the change.
    alpha, gamma = {"depth_mup": (0.5, 0.5), "ode": (1.0, 0.0)}.get(
        parametrization, parametrization
    )
    slope = power_law(depths, np.transpose(remainders))
    relative_slope = power_law(depths, np.transpose(relative))
    # 0.05 is less than half of what tells the three apart, 1/8; it leaves room for u^2 beside u, as u is
    # not small at depth 16, and for the noise of four seeds, whose intervals are 0.01 wide.
    assert slope.value == pytest.approx(1 - alpha - 1.5 * gamma, abs=0.05)
    assert relative_slope.value == pytest.approx(-gamma / 2, abs=0.05)
    assert (relative_slope.high < 0) == (gamma > 0)


@pytest.mark.parametrize("parametrization", ["depth_mup", (0.75, 0.25), "ode"])
def test_products_of_updates_fall_with_depth_unless_updates_keep_their_size(parametrization):
    depths = (16, 64)
    found = [linearization(*trained(depth, parametrization, block_depth=2)) for depth in depths]
    relative = power_law(depths, np.transpose([each.network_relative for each in found]))
    products = power_law(depths, np.transpose([each.network_products for each in found]))
    gamma = {"depth_mup": 0.5, "ode": 0.0}.get(parametrization, 0.25)
    # The product of two updates of size u = L^-gamma, against u; infinitely wide networks have another
    # factor u, as what the first layer sends is then at right angles to what the second one learned from.
    # 0.1 is less than half of what tells the parametrizations apart, 1/4.
    assert -2 * gamma - 0.1 < products.value < -gamma + 0.1
    assert (products.high < 0) == (gamma > 0)
    assert relative.value == pytest.approx(-gamma / 2, abs=0.05)  # kinks, as with one layer a block
    for layer in range(2):
        sizes = np.transpose([np.sqrt(np.square(each.linear[layer]).mean(0)) for each in found])
        assert power_law(depths, sizes).value == pytest.approx(0, abs=0.1)


def test_products_fall_with_width():
    """What a second layer learned from is random to what the first one learned: n^-1/2 of it is alike."""
    widths, options = (32, 128), {"activation": "identity", "block_depth": 2, "steps": 2}
    found = [linearization(*trained(32, width=width, **options)) for width in widths]
    products = power_law(widths, np.transpose([each.network_products for each in found]))
    # Less steep where a part that does not fall with width, L^-1/2 by what updates changed, is seen.
    assert products.value == pytest.approx(-0.5, abs=0.15)


def test_blocks_of_any_module_are_linearized_alike():
    """The same network, as a ResNet and as plain modules with forward-mode derivatives."""
    model, before, x = trained(depth=6, lr=2**-5, dtype=torch.float64)
    member = ResNet(16, WIDTH, 6, 4, base_width=WIDTH, dtype=torch.float64)
    for name in ("input", "blocks", "output"):
        getattr(member, name).weight.data = getattr(model, name).weight.data[0]
    want = linearization(member, before[0], x)

    def plain(weights):
        blocks = [SmoothBlock(w.clone(), member.blocks.scale, torch.abs) for w in weights]
        return nn.Sequential(member.input, nn.Sequential(*blocks), member.output)

    now = plain(member.blocks.weight.detach())
    start = plain(before[0]).state_dict()
    for blocks in ("1.*", list(now[1])):
        found = linearization(now, start, x, blocks=blocks)
        np.testing.assert_allclose(found.change, want.change, rtol=1e-9)
        np.testing.assert_allclose(found.remainder, want.remainder, rtol=1e-9)
        assert found.linear is found.products is found.network_products is None
    with pytest.raises(ValueError, match="weights_before must be an earlier model"):
        linearization(now, plain(before[0])[1].state_dict(), x, blocks="1.*")


def test_bad_input_is_named():
    model = ResNet(4, 8, 3, 2)
    with pytest.raises(TypeError, match="blocks must name the residual blocks of a Linear"):
        linearization(torch.nn.Linear(4, 4), torch.zeros(1), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"weights_before must be \(3, 8, 8\)"):
        linearization(model, torch.zeros(2, 8, 8), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"weights_before must be \(6, 8, 8\)"):
        linearization(ResNet(4, 8, 3, 2, block_depth=2), torch.zeros(3, 8, 8), torch.zeros(2, 4))
