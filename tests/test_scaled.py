"""A parametrization applied to models of one's own: roles, rates, multipliers, and that sizes follow."""

import copy
import math
import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import depthnet
from depthnet.diagnostics import coord_check
from depthnet.scaling import Parametrization, param_groups, torch_param_groups

VOCABULARY = 16


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Own(nn.Module):
    """A pre-norm transformer as people write it."""

    def __init__(self, width, depth, heads=None, tied=False, vocabulary=VOCABULARY):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, heads or width // 16) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        else:
            nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Logits(nn.Module):
    """A model of transformers as one from tokens to logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens, use_cache=False).logits


SPECIAL = {"bos_token_id": 0, "eos_token_id": 1}


def llama(width, depth, head_size=16):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // head_size,
        num_key_value_heads=width // head_size,
        intermediate_size=2 * width,
        **SPECIAL,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2(width, depth):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=width,
        n_layer=depth,
        n_head=width // 16,
        n_positions=16,
        **dropout,
        **SPECIAL,
    )
    return transformers.GPT2LMHeadModel(config)


# How a model is built, and where its blocks and branches are.
MODELS = {
    "own": (Own, {"blocks": "layers.*", "branches": ("attention", "mlp")}),
    "llama": (llama, {"blocks": "model.layers.*", "branches": ("self_attn", "mlp")}),
    "gpt2": (gpt2, {"blocks": "transformer.h.*", "branches": ("attn", "mlp")}),
}
scaled_own = partial(depthnet.scale, **MODELS["own"][1])


def tokens(seed=0):
    return torch.randint(VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(seed))


def check(name, parametrization, *, seeds, scaled=True, **shapes):
    """A coordinate check of a model; eps is too small to matter."""
    make, where = MODELS[name]
    base = make(shapes["base_width"], shapes["base_depth"])

    def build(width, depth, seed):
        torch.manual_seed(seed)
        model = make(width, depth)
        if scaled:
            depthnet.scale(model, parametrization, base=base, **where)
        groups = torch_param_groups(model, 2**-10)
        whole = model if name == "own" else Logits(model)
        return whole, torch.optim.AdamW(groups, eps=1e-12, weight_decay=0.0)

    return coord_check(
        build,
        [(tokens(2 * step), tokens(2 * step + 1)) for step in range(2)],
        seeds=seeds,
        steps=2,
        parametrization=parametrization,
        loss=lambda outputs, targets: cross_entropy(outputs.flatten(0, 1), targets.flatten()),
        blocks=("" if name == "own" else "model.") + where["blocks"],
        **shapes,
    )


WIDE = {"widths": (32, 64, 128), "depths": (2,), "base_width": 32, "base_depth": 2}
DEEP = {"widths": (32,), "depths": (4, 8, 16), "base_width": 32, "base_depth": 4}


def test_sizes_follow_the_width():
    found = check("own", "completep", seeds=6, **WIDE)
    assert found.passed, found.words
    assert check("own", "completep", seeds=2, scaled=False, **WIDE).verdicts["width"][0] is False


def test_sizes_follow_the_depth():
    found = check("own", "depth_mup", seeds=6, **DEEP)
    assert found.passed, found.words
    assert check("own", "depth_mup", seeds=2, scaled=False, **DEEP).verdicts["depth"][0] is False


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("shapes", [WIDE, DEEP], ids=["width", "depth"])
def test_sizes_of_models_of_transformers_follow(name, shapes):
    """No slope is off; at these sizes and seeds some are undecided."""
    found = check(name, "depth_mup", seeds=3, **shapes)
    assert not [row for row in found.rows if row["holds"] is False], found.words
    unscaled = check(name, "depth_mup", seeds=3, scaled=False, **shapes)
    assert sum(row["holds"] is False for row in unscaled.rows) >= 5


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("name", ["completep", "depth_mup", "standard"])
def test_rates_are_those_of_the_rules(name, optimizer):
    model = scaled_own(Own(64, 8), name, base=Own(16, 2))
    parametrization = Parametrization.of(name)
    groups = {
        id(param): group for group in model.param_groups(optimizer) for param in group["params"]
    }
    assert groups.keys() == {id(param) for param in model.parameters()}
    for param, role, depth in [
        (model.embedding.weight, "input", 2),
        (model.layers[7].attention.qkv.weight, "hidden", 8),
        (model.layers[3].mlp[2].weight, "hidden", 8),
        (model.layers[3].mlp[2].bias, "bias", 8),
        (model.layers[3].norms[0].weight, "norm", 8),
        (model.norm.weight, "norm", 2),
        (model.head.weight, "output", 2),
    ]:
        rule = parametrization.rule(
            role, fan_in=64, width=64, depth=depth, base_width=16, base_depth=2
        )
        group = groups[id(param)]
        assert math.isclose(group["lr_scale"], rule.lr_scale(optimizer))
        assert math.isclose(group["eps_scale"], rule.eps_scale())
        assert math.isclose(group["weight_decay_scale"], rule.weight_decay_scale(optimizer))
    plain = torch_param_groups(model, 0.5, optimizer=optimizer)
    assert [group["lr"] for group in plain] == [
        0.5 * group["lr_scale"] for group in param_groups(model, optimizer)
    ]


def test_branches_are_multiplied():
    torch.manual_seed(0)
    model, x = Own(16, 8), torch.randn(2, 4, 16)
    attention, mlp = model.layers[5].attention(x), model.layers[5].mlp(x)
    scaled_own(model, "depth_mup", base=Own(16, 2), init=False)
    assert torch.equal(model.layers[5].attention(x), attention * 0.5)
    assert torch.equal(model.layers[5].mlp(x), mlp * 0.5)


@pytest.mark.parametrize("name", list(MODELS))
def test_at_the_base_shape_nothing_changes(name):
    make, where = MODELS[name]
    torch.manual_seed(0)
    model, base = make(32, 2), make(32, 2)
    before, names = copy.deepcopy(model), list(model.state_dict())
    depthnet.scale(model, "completep", base=base, **where)
    assert list(model.state_dict()) == names
    assert all(
        torch.equal(value, before.state_dict()[key]) for key, value in model.state_dict().items()
    )
    whole = (model, before) if name == "own" else (Logits(model), Logits(before))
    outputs = [each(tokens()) for each in whole]
    assert torch.equal(*outputs)
    for group in model.param_groups("adamw"):
        assert group["lr_scale"] == group["eps_scale"] == 1
        assert group["weight_decay_scale"] == (
            0 if "norm" in group["name"] or "bias" in group["name"] else 1
        )


def close(tensor, std):
    """Within 5 standard errors of a normal distribution's standard deviation."""
    return abs(math.log(tensor.std().item() / std)) < 5 * (2 * tensor.numel()) ** -0.5


@pytest.mark.parametrize("init", ["measured", "given"])
def test_initial_weights_start_as_the_base_says(init):
    """GPT-2's own are constant in width, and fall with depth where they lead back to the stream."""
    torch.manual_seed(0)
    with torch.device("cpu" if init == "measured" else "meta"):
        base = gpt2(32, 2)
    where = MODELS["gpt2"][1]
    stds = {"*.c_proj.weight": 0.01, "*": 0.02}
    model = depthnet.scale(
        gpt2(128, 8), "depth_mup", base=base, **where, init=True if init == "measured" else stds
    )
    for name, param in model.named_parameters():
        if param.ndim < 2:
            continue
        std = 0.02 if "wte" in name or "wpe" in name else 0.02 / 2
        std = 0.01 / 2 if "c_proj" in name else std
        # What is measured has an error of its own.
        tolerance = 5 * ((2 * param.numel()) ** -0.5 + (2 * param.numel() / 16) ** -0.5)
        assert abs(math.log(param.std().item() / std)) < tolerance, name


def test_output_weights_start_smaller_and_zeros_stay():
    torch.manual_seed(0)
    base, model, zero = Own(16, 2), Own(64, 2), Own(64, 2)
    scaled_own(model, "mup", base=base)
    assert close(model.head.weight, base.head.weight.std().item() / 4)
    assert close(model.embedding.weight, 1.0)
    for each in (base, zero):
        nn.init.zeros_(each.head.weight)
    scaled_own(zero, "mup", base=base)
    assert not zero.head.weight.any()
    assert all((layer.norms[0].weight == 1).all() for layer in zero.layers)
    with pytest.raises(ValueError, match=r"init: head.weight starts as a constant in base"):
        scaled_own(Own(64, 2), "mup", base=base)


def test_weights_stay_without_init():
    model = Own(64, 8)
    before = copy.deepcopy(model.state_dict())
    scaled_own(model, "completep", base=Own(16, 2), init=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_head_that_shares_the_embedding_is_multiplied():
    model, x = Own(64, 2, tied=True), torch.randn(3, 64)
    logits = x @ model.embedding.weight.T
    scaled_own(model, "completep", base=Own(16, 2, tied=True), init=False)
    assert torch.equal(model.head(x), logits / 4)
    (group,) = [
        group
        for group in model.param_groups("adamw")
        if any(p is model.head.weight for p in group["params"])
    ]
    assert (group["lr_scale"], group["eps_scale"], group["weight_decay_scale"]) == (1, 0.25, 1)
    assert group["name"] == "tied.x4"
    unscaled = scaled_own(Own(64, 2, tied=True), "standard", base=Own(16, 2, tied=True))
    assert torch.equal(unscaled.head(x), x @ unscaled.embedding.weight.T)


def test_logits_of_growing_heads_fall_like_their_size():
    model = depthnet.scale(
        llama(64, 3, 32), "completep", base=llama(32, 2, 8), **MODELS["llama"][1]
    )
    for layer in model.model.layers:
        assert math.isclose(layer.self_attn.scaling, 8**-0.5 * 8 / 32)
    standard = depthnet.scale(
        llama(64, 2, 32), "standard", base=llama(32, 2, 8), **MODELS["llama"][1]
    )
    assert standard.model.layers[0].self_attn.scaling == 32**-0.5


def test_growing_heads_that_cannot_be_scaled_are_an_error():
    with pytest.raises(ValueError, match=r"layers.0.attention \(Attention\).*both have 2 heads"):
        scaled_own(Own(64, 2, heads=2), "completep", base=Own(32, 2, heads=2))
    layer = partial(nn.TransformerEncoderLayer, nhead=2)
    with pytest.raises(ValueError, match=r"self_attn \(MultiheadAttention\).*sizes are 32 and 16"):
        depthnet.scale(layer(64), "mup", base=layer(32))


def copies(model):
    return {
        "itself": model,
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
    }


def test_copies_are_scaled_and_bare_parameters_refused():
    model = scaled_own(Own(32, 8), "completep", base=Own(16, 2))
    outputs = model(tokens())
    made = copies(model)
    del model
    for name, each in made.items():
        assert torch.equal(each(tokens()), outputs), name
        groups = each.param_groups("adamw")
        assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in each.parameters()}
        with pytest.raises(ValueError, match="bare parameters of a Own"):
            depthnet.optim.AdamW(each.parameters(), lr=0.1)
        optimizer = depthnet.optim.AdamW(each, lr=0.1)
        assert [group["name"] for group in optimizer.param_groups] == [g["name"] for g in groups]


def test_part_of_a_model_may_be_scaled():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.language = scaled_own(Own(32, 2), "completep", base=Own(16, 2))
            self.other = nn.Linear(3, 3)

    model = Whole()
    groups = {group["name"]: group for group in param_groups(model, "adamw")}
    assert groups["language.blocks.hidden.x2"]["lr_scale"] == 0.5
    assert groups["other"]["lr_scale"] == 1


def test_it_compiles_as_one_graph():
    model = scaled_own(Own(32, 8, tied=True), "completep", base=Own(16, 2, tied=True))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tokens()), model(tokens()))
    groups = param_groups(compiled, "adamw")
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
def test_torchs_encoder_is_scaled_in_training_and_in_evaluation():
    def encoder(width, depth):
        layer = nn.TransformerEncoderLayer(
            width, width // 16, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        return nn.TransformerEncoder(layer, depth)

    torch.manual_seed(0)
    model = encoder(32, 8)
    where = {"blocks": "layers.*", "branches": ("self_attn", "linear2")}
    depthnet.scale(model, "completep", base=encoder(16, 2), **where)
    roles = {name: scaled.kind for name, scaled in model.param_groups.parameters.items()}
    assert roles["layers.4.self_attn.in_proj_weight"] == "blocks.hidden"
    assert roles["layers.4.self_attn.in_proj_bias"] == "blocks.bias"
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        training, evaluation = model(x), model.eval()(x)
    torch.testing.assert_close(evaluation, training)


class Dense(nn.Module):
    """A layer that says itself which dimension is which."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(in_features, out_features))


class Convolutions(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3)
        self.deep = nn.Conv2d(width, 2 * width, 3)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, groups=2 * width)
        self.up = nn.ConvTranspose2d(2 * width, 3, 2)
        self.dense = Dense(width, 5)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.square = nn.Parameter(torch.randn(width, width))
        self.temperature = nn.Parameter(torch.ones(()))


def test_roles_of_convolutions_and_bare_parameters():
    found = depthnet.scale(Convolutions(32), "mup", base=Convolutions(8)).param_groups.parameters
    assert {name: scaled.group for name, scaled in found.items() if "bias" not in name} == {
        "first.weight": "input.x4",
        "deep.weight": "hidden.x4",
        "depthwise.weight": "input.x4",
        "up.weight": "output.x4",
        "dense.weight": "output.x4",
        "token": "bias.x4",
        "square": "hidden.x4",
        "temperature": "bias.x1",
    }


class Bare(nn.Module):
    def __init__(self, rows, columns):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns))


@pytest.mark.parametrize(
    ("options", "role", "ratio"),
    [
        ({"roles": {"w*": "input"}}, "input", 4),
        ({"roles": {"w*": "output"}}, "output", 4),
        ({"transposed": "weight"}, "input", 4),
    ],
)
def test_what_shapes_cannot_tell_is_said(options, role, ratio):
    with pytest.raises(
        ValueError, match=r"weight of shape \(6, 8\), \(6, 2\) in base: which .* roles="
    ):
        depthnet.scale(Bare(6, 8), "mup", base=Bare(6, 2))
    found = depthnet.scale(Bare(6, 8), "mup", base=Bare(6, 2), **options).param_groups.parameters
    assert (found["weight"].role, found["weight"].width) == (role, (8, 2))


def test_fan_in_of_transposed_weights():
    base = Bare(2, 3)
    for options, width in [({}, (12, 3)), ({"transposed": ["weight"]}, (8, 2))]:
        model = depthnet.scale(Bare(8, 12), "mup", base=base, **options)
        assert model.param_groups.parameters["weight"].width == width
    with pytest.raises(ValueError, match="weight of shape"):
        depthnet.scale(Bare(8, 24), "mup", base=base)
    model = depthnet.scale(Bare(8, 24), "mup", base=base, transposed=["weight"])
    assert model.param_groups.parameters["weight"].group == "hidden.x4"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"base": None}, TypeError, "base must be a torch.nn.Module, got NoneType"),
        ({"parametrization": "complete"}, ValueError, "did you mean 'completep'"),
        (
            {"base": Own(16, 2, vocabulary=8)},
            ValueError,
            r"embedding.weight .*the same vocabulary",
        ),
        ({"blocks": "layer.*"}, ValueError, r"blocks: 'layer.\*' finds no module in the Own"),
        ({"blocks": None}, ValueError, r"layers.2.norms.0.weight is not in base"),
        ({"blocks": 3}, TypeError, "blocks must be patterns of names, got 3"),
        ({"branches": ()}, ValueError, r"branches must name .* multiplied by 0.25"),
        ({"branches": ("mlp", "mlp.2")}, ValueError, "layers.0.mlp.2 is in layers.0.mlp"),
        ({"branches": "ffn"}, ValueError, "branches: 'ffn' finds no module in the Block"),
        ({"roles": {"head.weight": "readout"}}, ValueError, r"roles\['head.weight'\]='readout'"),
        ({"roles": {"no": "input"}}, ValueError, "roles: no parameter is called 'no'"),
        ({"init": "yes"}, ValueError, "init of .* must be a finite number, got 'yes'"),
        ({"init": {"*.mlp.*": 0.02}}, ValueError, "init: no pattern fits embedding.weight"),
        (
            {"base": Own(16, 2).to("meta")},
            ValueError,
            "init: embedding.weight of base .* init=0.02",
        ),
    ],
)
def test_errors_name_what_is_wrong_and_change_nothing(change, error, words):
    model = Own(32, 8)
    before = copy.deepcopy(model.state_dict())
    settings = {"parametrization": "completep", "base": Own(16, 2), **MODELS["own"][1], **change}
    with pytest.raises(error, match=words):
        depthnet.scale(model, **settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "param_groups")
    assert not any(module._forward_hooks for module in model.modules())


def test_other_inputs_and_outputs_than_the_bases_are_an_error():
    def network(width, classes):
        blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        return nn.ModuleDict({"blocks": blocks, "head": nn.Linear(width, classes)})

    with pytest.raises(
        ValueError, match=r"head.weight would be hidden, but grows by \[2.0, 10.0\]"
    ):
        depthnet.scale(network(32, 100), "mup", base=network(16, 10), blocks="blocks.*")
    roles = {"head.weight": "output"}
    model = depthnet.scale(
        network(32, 100), "mup", base=network(16, 10), blocks="blocks.*", roles=roles
    )
    assert model.param_groups.parameters["head.weight"].group == "output.x2"


def test_scaling_twice_is_an_error():
    model = scaled_own(Own(32, 2), "completep", base=Own(16, 2))
    with pytest.raises(ValueError, match=r"module: it \(Own\) has param_groups"):
        scaled_own(model, "completep", base=Own(16, 2))
    inner = nn.ModuleDict({"net": depthnet.ResNet(4, 8, 2, 3)})
    with pytest.raises(ValueError, match=r"module: net \(ResNet\) has param_groups"):
        depthnet.scale(inner, "mup", base=inner)


def test_one_tensor_in_different_roles_is_an_error():
    def shared(width):
        model = nn.ModuleDict({"a": nn.Linear(width, width), "b": nn.Linear(width, width)})
        model["a"].bias = model["b"].bias
        model["c"] = nn.LayerNorm(width)
        model["c"].weight = model["b"].bias
        return model

    with pytest.raises(ValueError, match=r"a.bias and b.bias and c.weight are one tensor"):
        depthnet.scale(shared(32), "mup", base=shared(16))


def test_parameters_that_came_later_are_an_error():
    model = scaled_own(Own(32, 2), "completep", base=Own(16, 2))
    model.later = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"later.weight was not a parameter of the model when"):
        model.param_groups("adamw")


def test_it_is_printed_as_a_table():
    model = scaled_own(Own(32, 8, tied=True), "completep", base=Own(16, 2, tied=True))
    lines = repr(model.param_groups).splitlines()
    assert lines[0].startswith("completep (alpha=1, gamma=0)")
    (row,) = [line.split() for line in lines if "mlp.2.weight" in line]
    assert row[:5] == ["layers.*.mlp.2.weight", "blocks.hidden", "128", "/", "64"]
    assert row[6:] == ["0.5", "0.125", "2"]  # lr, eps, weight decay
    assert lines[-3:] == [
        "output of layers.*.attention x 0.25",
        "output of layers.*.mlp x 0.25",
        "output of head x 0.5",
    ]


def test_the_example_of_the_docs_with_transformers_runs():
    pytest.importorskip("transformers", reason="transformers is not installed")
    text = (Path(__file__).parents[1] / "docs/scaling_your_model.md").read_text()
    (code,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    scope = {}
    exec(code, scope)
    assert math.isfinite(scope["loss"].item())


@pytest.mark.filterwarnings("ignore::depthnet.tuning.TuningWarning")
def test_the_network_of_the_docs_can_be_tuned():
    text = (Path(__file__).parents[1] / "docs/scaling_your_model.md").read_text()
    scope = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], scope)

    def build(width, depth):
        model = scope["Network"](width, depth)
        where = {"blocks": "layers.*", "branches": "mlp"}
        return depthnet.scale(model, "depth_mup", base=scope["base"], **where)

    found = depthnet.tune(
        build, "digits", width=32, depth=2, log2_lr=(-9, -7), seeds=2, steps=5, check_depths=()
    )
    assert found.parametrization.name == "depth_mup"
    assert found.block_depth == 2
