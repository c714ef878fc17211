import copy
import itertools
import math
import pickle

import pytest
import torch
from torch.nn import functional as F

import depthnet
from depthnet import kernels
from depthnet.diagnostics import residual_stream
from depthnet.nn import Transformer
from depthnet.nn.generation import Cache, choose
from depthnet.nn.transformer import rotations
from depthnet.scaling import PRESETS, torch_param_groups

SMALL = {"context": 12, "head_size": 8}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(rows=2, length=7, vocabulary=11, seed=0):
    return torch.randint(vocabulary, (rows, length), generator=generator(seed))


def loud(model):
    """Every parameter random: also those that start as zeros or ones."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.normal_(generator=generator(number)).mul_(0.3)
    return model


def plain(model, tokens):
    """The same mathematics in plain torch, one operation after another."""
    parameters = dict(model.named_parameters())
    batch, length = tokens.shape
    n, d = model.width, model.head_size

    def affine(name, x):
        y = x @ parameters[f"{name}.weight"].mT
        return y + parameters[f"{name}.bias"] if f"{name}.bias" in parameters else y

    def norm(index, x):
        gain, bias = parameters[f"norms.{index}.weight"], parameters.get(f"norms.{index}.bias")
        if model.norms[0].norm == "layer":
            return F.layer_norm(x, (n,), gain, bias, 1e-5)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    def turned(x):  # (batch, length, heads, d): complex numbers are turned by an angle a token
        if model.positions is not None:
            return x
        wide = torch.promote_types(x.dtype, torch.float32)
        pairs = torch.complex(*x.to(wide).chunk(2, -1))
        speeds = 10000 ** -(torch.arange(d // 2, dtype=torch.float64) * 2 / d)
        angles = torch.arange(length, dtype=torch.float64)[:, None, None] * speeds
        pairs = pairs * torch.polar(torch.ones_like(angles), angles).to(pairs.dtype)
        return torch.cat([pairs.real, pairs.imag], -1).to(x.dtype)

    def attention(layer, y):
        q, k, v = affine(f"layers.{layer}.attention.qkv", y).split(n, -1)
        q, k, v = (part.view(batch, length, n // d, d) for part in (q, k, v))
        scores = torch.einsum("bihd,bjhd->bhij", turned(q), turned(k)) * d**-0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        z = torch.einsum("bhij,bjhd->bihd", weights.to(v.dtype), v).reshape(batch, length, n)
        return affine(f"layers.{layer}.attention.output", z)

    def mlp(layer, y):
        h = affine(f"layers.{layer}.mlp.up", y)
        kind = model.layers[layer].mlp.mlp
        if kind == "swiglu":
            gate, h = h.chunk(2, -1)
            h = h * gate * torch.sigmoid(gate)
        else:
            h = h.abs() if kind == "abs" else F.gelu(h)
        return affine(f"layers.{layer}.mlp.down", h)

    x = parameters["embedding.weight"][tokens]
    if model.positions is not None:
        x = x + parameters["positions.weight"][:length]
    m = model.rules["hidden"].multiplier
    for layer in range(model.depth):
        x = x + m * attention(layer, norm(2 * layer, x))
        x = x + m * mlp(layer, norm(2 * layer + 1, x))
    y = norm(2 * model.depth, x)
    if model.head is not None:
        return affine("head", y)
    return y @ parameters["embedding.weight"].mT * (128 / n)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu", "abs"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_forward_and_gradients_are_the_formula(mlp, norm, positions, biases, tied):
    options = {"mlp": mlp, "norm": norm, "positions": positions, "biases": biases, "tied": tied}
    model = loud(Transformer(11, 24, 2, dtype=torch.float64, **SMALL, **options))
    results = []
    for forward in (model, lambda t: plain(model, t)):
        logits = forward(tokens())
        loss = (logits * torch.randn(logits.shape, generator=generator(), dtype=logits.dtype)).sum()
        results.append((logits, torch.autograd.grad(loss, list(model.parameters()))))
    (logits, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(logits, expected)
    for (name, _), got, want in zip(
        model.named_parameters(), gradients, expected_gradients, strict=True
    ):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")
        assert want.any(), name


def test_autocast_is_as_exact_as_plain_torch():
    model = loud(Transformer(11, 32, 8, **SMALL))
    exact = plain(copy.deepcopy(model).double(), tokens())

    def error(logits):
        return (logits - exact).square().mean().sqrt()

    with torch.autocast("cpu", torch.bfloat16):
        got, torchs = model(tokens()), plain(model, tokens())
        F.cross_entropy(got.flatten(0, 1), tokens().flatten()).backward()
    assert got.dtype == torch.bfloat16
    assert error(got) <= 2 * error(torchs)
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("converted", [False, True])
def test_low_precision(dtype, converted):
    model = loud(Transformer(11, 32, 4, dtype=None if converted else dtype, **SMALL)).to(dtype)
    logits = model(tokens())
    exact = plain(copy.deepcopy(model).double(), tokens())
    torchs = plain(model, tokens())
    assert logits.dtype == dtype
    assert (logits - exact).norm() <= 2 * (torchs - exact).norm()


def test_conversions_do_not_round_the_rotations():
    model = Transformer(11, 24, 1, **SMALL)
    before = model.rotation.clone()
    assert torch.equal(model.bfloat16().rotation, before)
    assert torch.equal(model.double().rotation, rotations(12, 8))
    assert torch.equal(model.to("meta").to_empty(device="cpu").float().rotation, before)


def test_initial_weights_have_their_sizes():
    model = Transformer(
        *(300, 256, 3), mlp_width=512, positions="learned", embedding_std=0.5, output_std=0.7
    )
    for name, std in {
        "embedding": 0.5,
        "positions": 0.5,
        "layers.1.attention.qkv": 256**-0.5,
        "layers.1.attention.output": 256**-0.5,
        "layers.1.mlp.up": 256**-0.5,
        "layers.1.mlp.down": 512**-0.5,
        "head": 0.7 / 2,
    }.items():
        # The deviation of N draws is exact to (2 N)^-1/2 of itself, here at most 0.3 %.
        assert model.get_submodule(name).weight.std().item() == pytest.approx(std, rel=0.015)
    assert all(norm.weight.eq(1).all() for norm in model.norms)
    assert not Transformer(11, 24, 2, **SMALL)(tokens()).any()
    assert Transformer(11, 48, 1, mlp="swiglu", **SMALL).layers[0].mlp.down.weight.shape[1] == 128
    assert Transformer(11, 64, 1, mlp="swiglu", **SMALL).layers[0].mlp.down.weight.shape[1] == 176


def test_the_generator_decides_the_weights():
    one, other = (Transformer(11, 24, 2, generator=generator(5), **SMALL) for _ in range(2))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    other.reset_parameters(generator(6))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    empty = Transformer(11, 24, 2, device="meta", **SMALL).to_empty(device="cpu")
    empty.reset_parameters(generator(5))
    assert torch.equal(one(tokens()), empty(tokens()))
    for (name, p), q in zip(one.named_buffers(), empty.buffers(), strict=True):
        assert torch.equal(p, q), name


def test_no_token_sees_the_future():
    model = loud(Transformer(11, 24, 3, **SMALL))
    first = tokens()
    second = first.clone()
    second[:, 5:] = (second[:, 5:] + 1) % 11
    a, b = model(first), model(second)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_rotary_positions_are_relative():
    """Where every token attends to the same distances, logits do not depend on where it stands."""
    model = loud(Transformer(11, 24, 1, dtype=torch.float64, **SMALL))
    qkv = torch.randn(1, 1, 3, 3, 8, dtype=torch.float64).expand(1, 12, 3, 3, 8)
    q, k, _ = kernels.rotary(qkv, model.rotation)
    scores = (q @ k.mT)[0]
    for offset in range(-11, 12):
        diagonal = scores.diagonal(offset, 1, 2)
        torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal))
    sizes = q.norm(dim=-1)
    torch.testing.assert_close(sizes, sizes[..., :1].expand_as(sizes))


def test_param_groups_follow_the_table():
    model = Transformer(11, 256, 32, biases=True, positions="learned", **SMALL)  # r_n = 2, r_L = 4
    groups = {g["name"]: g for g in model.param_groups("adamw")}
    assert list(groups) == ["input", "hidden", "norm", "bias", "final_norm", "output"]
    scales = {
        name: (g["lr_scale"], g["eps_scale"], g["weight_decay_scale"]) for name, g in groups.items()
    }
    assert scales == {
        "input": (1, 1 / 2, 1),
        "hidden": (1 / 2, 1 / 8, 2),
        "norm": (1, 1 / 8, 0),
        "bias": (1, 1 / 8, 0),
        "final_norm": (1, 1 / 2, 0),
        "output": (1 / 2, 1, 2),
    }
    assert model.layers[0].multiplier == pytest.approx(8**-0.5 / 4)
    depth_mup = Transformer(11, 256, 32, parametrization="depth_mup", **SMALL)
    assert depth_mup.layers[0].multiplier == 32**-0.5
    hidden = {g["name"]: g for g in depth_mup.param_groups("adamw")}["hidden"]
    assert (hidden["lr_scale"], hidden["eps_scale"]) == (1 / 4, 1 / 4)
    assert "completep (alpha=1, gamma=0)" in repr(model)


@pytest.mark.parametrize(
    ("norm", "positions", "biases", "tied"),
    list(itertools.product(["layer", "rms"], ["rotary", "learned"], [False, True], [False, True])),
)
def test_every_parameter_is_in_one_group(norm, positions, biases, tied):
    model = Transformer(
        *(11, 24, 2), norm=norm, positions=positions, biases=biases, tied=tied, **SMALL
    )
    groups = model.param_groups("adamw")
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(map(id, model.parameters()))
    roles = {id(p): group["name"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        first, last = name.split(".")[0], name.split(".")[-1]
        role = {"embedding": "input", "positions": "input", "head": "output"}.get(first)
        if first == "layers":
            role = "hidden" if last == "weight" else "bias"
        if first == "norms":
            role = "norm" if last == "weight" else "bias"
            role = "final_norm" if name.startswith("norms.4.") else role
        assert roles[id(p)] == role, name


def test_all_presets_are_the_same_network_at_the_base_shape():
    results = []
    for name in PRESETS:
        model = Transformer(
            *(11, 24, 4), parametrization=name, base_width=24, base_depth=4, generator=generator(),
            **SMALL,
        )  # fmt: skip
        optimizer = depthnet.optim.AdamW(model, lr=2**-6)
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(tokens()).flatten(0, 1), tokens(seed=1).flatten())
            loss.backward()
            optimizer.step()
        results.append(loss.item())
    assert len(set(results)) == 1


def test_it_learns():
    """To repeat a sequence of period 3, which only attention can."""
    model = Transformer(8, 32, 2, context=24, head_size=16, base_width=32, generator=generator())
    optimizer = depthnet.optim.AdamW(model, lr=2**-6)
    for step in range(150):
        text = tokens(16, 3, 8, seed=step).repeat(1, 8)
        loss = F.cross_entropy(model(text[:, 3:-1]).flatten(0, 1), text[:, 4:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    text = tokens(16, 3, 8, seed=999).repeat(1, 8)
    right = model.generate(text[:, :9], 12, temperature=0.0)[:, 9:] == text[:, 9:21]
    assert right.double().mean() > 0.9  # by chance 1/8


def test_attention_scale():
    def scale(parametrization, **options):
        model = Transformer(11, 256, 1, parametrization=parametrization, **options)
        return model.layers[0].attention.scale

    for preset in PRESETS:
        assert scale(preset, head_size=64) == 64**-0.5
    assert scale("completep", head_size=64, base_head_size=16) == 4 / 64
    assert scale("standard", head_size=64, base_head_size=16) == 1 / 8


def test_tied_logits():
    model = Transformer(11, 256, 1, tied=True, base_width=64, embedding_std=0.1, **SMALL)
    features = model.features(tokens())
    torch.testing.assert_close(model(tokens()), features @ model.embedding.weight.mT / 4)
    standard = Transformer(
        11, 256, 1, tied=True, base_width=64, parametrization="standard", **SMALL
    )
    features = standard.features(tokens())
    torch.testing.assert_close(standard(tokens()), features @ standard.embedding.weight.mT)
    assert not any(g["name"] == "output" for g in model.param_groups("adamw"))


def test_depth_zero():
    model = loud(Transformer(11, 24, 0, **SMALL))
    torch.testing.assert_close(model(tokens()), plain(model, tokens()))
    assert [g["name"] for g in model.param_groups("adamw")] == ["input", "final_norm", "output"]
    assert model.generate(tokens(), 3).shape == (2, 10)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("tied", [False, True])
def test_generated_tokens_are_those_of_full_computation(positions, tied):
    model = loud(Transformer(11, 24, 3, positions=positions, tied=tied, **SMALL))
    prompt = tokens(3, 4)
    expected = prompt
    for _ in range(8):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(prompt, 8, temperature=0), expected)
    assert torch.equal(model.generate(prompt, 8, top_k=1), expected)
    assert torch.equal(model.generate(prompt, 0), prompt)
    assert len(set(map(tuple, expected.tolist()))) == 3


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_cache_may_be_fed_in_parts(positions):
    model = loud(Transformer(11, 24, 2, positions=positions, dtype=torch.float64, **SMALL))
    whole = model(tokens(2, 10))
    cache = Cache(10)
    with torch.no_grad():
        parts = [model(part, cache) for part in tokens(2, 10).split([3, 4, 1, 2], 1)]
    assert cache.length == 10
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    with pytest.raises(
        ValueError, match="tokens must fit the context of 10 tokens, got 1 after 10"
    ):
        model(tokens(2, 1), cache)


def test_generation_under_autocast_and_before_training():
    model = loud(Transformer(11, 24, 2, **SMALL))
    with torch.autocast("cpu", torch.bfloat16):
        text = model.generate(tokens(2, 4), 5, generator=generator())
    assert ((text >= 0) & (text < 11)).all()
    model(text).sum().backward()


def test_draws_follow_the_softmax():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0]).expand(40000, 4)
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 2)):
        drawn = choose(logits, temperature, top_k, generator())
        expected = logits[0] / temperature
        if top_k:
            expected = torch.where(logits[0] >= 2.0, expected, -math.inf)
        # Five standard deviations of a frequency, at most (4 N)^-1/2.
        frequencies = torch.bincount(drawn, minlength=4) / len(drawn)
        assert (frequencies - expected.softmax(0)).abs().max() < 5 / (4 * len(drawn)) ** 0.5
    assert choose(logits[:2] * 1e4, 1e-3, None, generator()).tolist() == [1, 1]


def test_generation_is_a_function_of_its_generator():
    model = loud(Transformer(11, 24, 2, **SMALL))
    one, same, other = (
        model.generate(tokens(), 5, temperature=3.0, generator=generator(s)) for s in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_state_dict_copy_and_pickle():
    model = loud(Transformer(11, 24, 2, biases=True, **SMALL))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["layers.1.attention.qkv.weight"] == (72, 24)
    assert shapes["layers.1.mlp.up.bias"] == (96,)
    assert shapes["norms.4.weight"] == (24,)
    assert "rotation" not in shapes
    other = Transformer(11, 24, 2, biases=True, **SMALL)
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens()), model(tokens()))
        for group, original in zip(
            twin.param_groups("adamw"), model.param_groups("adamw"), strict=True
        ):
            assert {**group, "params": 0} == {**original, "params": 0}
            assert len(group["params"]) == len(original["params"])


def test_bare_parameters_are_refused():
    model = Transformer(11, 256, 2, **SMALL)
    for scaled in (model, pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="bare parameters of a Transformer were given"):
            depthnet.optim.AdamW(scaled.parameters(), lr=0.1)
    groups = {g["name"]: g["lr"] for g in torch_param_groups(model, 0.5)}
    assert (groups["hidden"], groups["input"]) == (0.25, 0.5)


@pytest.mark.parametrize("options", [{}, {"norm": "rms", "mlp": "swiglu", "positions": "learned"}])
def test_compiles_into_one_graph(options):
    model = loud(Transformer(11, 24, 2, dtype=torch.float64, **SMALL, **options))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for shape in ((2, 7), (3, 12)):  # the second time with dynamic shapes
        results = []
        for forward in (model, compiled):
            logits = forward(tokens(*shape))
            loss = logits.square().sum()
            results.append((logits, torch.autograd.grad(loss, list(model.parameters()))))
        torch.testing.assert_close(*results)


def test_the_stream_and_its_gradient_are_seen_by_hooks():
    model = loud(Transformer(11, 24, 3, dtype=torch.float64, **SMALL))
    stream = residual_stream(model, tokens(), lambda y: y.square().sum(), blocks="layers.*")
    assert stream.x.shape == (4, 2, 7, 24)
    assert torch.equal(stream.x[0], model.embedding(tokens()))
    torch.testing.assert_close(stream.outputs, model(tokens()))
    for layer in range(4):  # from there on, the rest of the network alone
        x = stream.x[layer].clone().requires_grad_()
        y = x
        for index in range(layer, 3):
            y, _ = model.layers[index](
                y, None, model.norms[2 * index : 2 * index + 3], model.rotation[:7]
            )
        logits = model.head(model.norms[-1](y))
        torch.testing.assert_close(logits, stream.outputs)
        (gradient,) = torch.autograd.grad(logits.square().sum(), x)
        torch.testing.assert_close(gradient, stream.dx[layer])


def test_a_hook_may_change_the_stream():
    model = loud(Transformer(11, 24, 3, **SMALL))
    with model.layers[1].register_forward_hook(lambda layer, given, result: given[:2]):
        skipped = model(tokens())
    shallow = Transformer(11, 24, 2, **SMALL)
    with torch.no_grad():
        for name, parameter in shallow.named_parameters():
            at = {
                "layers.1": "layers.2",
                "norms.2": "norms.4",
                "norms.3": "norms.5",
                "norms.4": "norms.6",
            }
            start = ".".join(name.split(".")[:2])
            parameter.copy_(model.get_parameter(name.replace(start, at.get(start, start))))
    for layer in shallow.layers:
        layer.multiplier = model.layers[0].multiplier
    torch.testing.assert_close(skipped, shallow(tokens()))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"vocabulary": 0}, ValueError, "vocabulary must be at least 1"),
        ({"width": 20}, ValueError, "width must be a multiple of head_size, 8, got 20"),
        ({"depth": -1}, ValueError, "depth must be at least 0"),
        ({"depth": 2.5}, TypeError, "depth must be an integer"),
        ({"context": 0}, ValueError, "context must be at least 1"),
        ({"head_size": 3}, ValueError, "head_size must be even for rotary positions, got 3"),
        ({"mlp": "gelo"}, ValueError, "mlp='gelo'.*did you mean 'gelu'"),
        ({"norm": "batch"}, ValueError, "norm='batch' is not one of layer, rms"),
        ({"positions": "rotory"}, ValueError, "did you mean 'rotary'"),
        ({"mlp_width": 0}, ValueError, "mlp_width must be at least 1"),
        ({"parametrization": "complete"}, ValueError, "did you mean 'completep'"),
        ({"tied": True, "output_std": 0.1}, ValueError, "output_std is without effect if tied"),
        ({"embedding_std": -1.0}, ValueError, "embedding_std must not be negative"),
        ({"output_std": -1.0}, ValueError, "output_std must not be negative"),
        ({"block_multiplier": math.nan}, ValueError, "block_multiplier must be a finite number"),
        ({"base_head_size": 0}, ValueError, "base_head_size must be at least 1"),
    ],
)
def test_bad_arguments(change, error, words):
    with pytest.raises(error, match=words):
        Transformer(**{"vocabulary": 11, "width": 24, "depth": 2, **SMALL, **change})


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([[1, 2]], TypeError, "must be a tensor, got list"),
        (torch.zeros(2, 3), TypeError, "must be int64, got torch.float32"),
        (tokens()[0], ValueError, r"must have the shape \(B, T\) with T at least 1, got \(7,\)"),
        (tokens()[:, :0], ValueError, r"must have the shape .* got \(2, 0\)"),
        (tokens(2, 13), ValueError, "must fit the context of 12 tokens, got 13"),
        (torch.tensor([[1, 11]]), ValueError, "must be in the vocabulary, 0 to 10, got 11"),
        (torch.tensor([[1, -1]]), ValueError, "must be in the vocabulary, 0 to 10, got -1"),
    ],
)
def test_bad_tokens(given, error, words):
    model = Transformer(11, 24, 2, **SMALL)
    with pytest.raises(error, match="tokens " + words):
        model(given)
    with pytest.raises(error, match="prompt " + words):
        model.generate(given, 0)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"new_tokens": 6}, ValueError, "fit the context of 12 tokens, got 7 . 6"),
        ({"new_tokens": -1}, ValueError, "new_tokens must be at least 0"),
        ({"temperature": -0.5}, ValueError, "temperature must not be negative, got -0.5"),
        ({"temperature": math.nan}, ValueError, "temperature must be a finite number"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1"),
        ({"top_k": 12}, ValueError, "top_k must be at most the vocabulary, 11, got 12"),
    ],
)
def test_bad_arguments_of_generate(options, error, words):
    model = Transformer(11, 24, 2, **SMALL)
    with pytest.raises(error, match=words):
        model.generate(tokens(), **{"new_tokens": 1, **options})
