"""Groups with scales, models with rules, vectors of rates; which arguments are refused, and how."""

import copy
import pickle

import pytest
import torch
from optim.steps import NAMES, parameters, small_model, train, trained

import depthnet
from depthnet import ResNet, kernels
from depthnet.scaling import torch_param_groups


def test_learning_rate_for_each_member(backend):
    model = ResNet(4, 8, 3, 2, population=3, output_std=1.0)
    before = copy.deepcopy(model.state_dict())
    optimizer = depthnet.optim.SGD(model, lr=torch.tensor([0.0, 0.5, 1.0]))
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0, 1.0]
    model(torch.randn(3, 5, 4)).square().sum().backward()
    optimizer.step()
    for group in optimizer.param_groups:
        scale = group["lr_scale"]
        (param,) = group["params"]
        name = {"input": "input", "hidden": "blocks", "output": "output"}[group["name"]] + ".weight"
        for member in range(3):
            moved = before[name][member] - scale[member].float() * param.grad[member]
            torch.testing.assert_close(param[member].detach(), moved)


@pytest.mark.parametrize(("ours", "rule"), [("AdamW", "adamw"), ("Adam", "adam"), ("SGD", "sgd")])
def test_plain_groups_for_torch_train_the_same(ours, rule):
    options = {"lr": 2**-7, "weight_decay": 0.1}
    model, twin = small_model(), small_model()
    first = getattr(depthnet.optim, ours)(model, **options)
    eps = {} if rule == "sgd" else {"eps": 1e-8}
    groups = torch_param_groups(twin, 2**-7, optimizer=rule, weight_decay=0.1, **eps)
    second = getattr(torch.optim, ours)(groups, lr=0.0)
    for a, b in zip(trained(model, first), trained(twin, second), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_model_inside_another_keeps_its_rules():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), small_model().float(), torch.nn.Linear(3, 2))
    groups = {g["name"]: g for g in depthnet.optim.AdamW(model, lr=0.1).param_groups}
    assert list(groups) == ["1.input", "1.hidden", "1.output", "other"]
    assert groups["other"]["lr_scale"] == 1
    assert groups["1.hidden"]["lr_scale"] == pytest.approx(4 * (20 / 8) ** -0.5)
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_bare_parameters_of_a_scaled_model_are_refused(name):
    make = getattr(depthnet.optim, name)
    model = small_model()
    pickled = pickle.loads(pickle.dumps(model))
    for twin in (model, copy.deepcopy(model), pickled, torch.nn.Sequential(model)):
        message = rf"bare parameters of a ResNet.*depthnet\.optim\.{name}\(model, \.\.\.\)"
        with pytest.raises(ValueError, match=message):
            make(twin.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="bare parameters"):
            make([{"params": list(twin.parameters())}], lr=0.1)
        with pytest.raises(ValueError, match="bare parameters"):
            make(twin.named_parameters(), lr=0.1)
        with pytest.raises(ValueError, match="bare parameters"):
            make([{"params": twin.named_parameters()}], lr=0.1)
    make(ResNet(4, 8, 3, 2, parametrization="standard").parameters(), lr=0.1)  # scales nothing
    make(ResNet(4, 128, 8, 2).parameters(), lr=0.1)  # the base shape
    make(torch.nn.Linear(2, 2).parameters(), lr=0.1)


def test_a_group_that_is_refused_is_not_added():
    optimizer = depthnet.optim.AdamW([torch.zeros(2, requires_grad=True)])
    refused = {"params": [torch.zeros(3, requires_grad=True)], "lr_scale": [1, 2]}
    with pytest.raises(ValueError, match="lr_scale"):
        optimizer.add_param_group(refused)
    assert len(optimizer.param_groups) == 1


def test_groups_of_another_rule_are_refused():
    with pytest.raises(ValueError, match="the group 'input' follows the rule 'sgd'"):
        depthnet.optim.AdamW(small_model().param_groups("sgd"))


def test_a_groups_generator_of_parameters_is_used_up_once():
    linear = torch.nn.Linear(2, 2)
    optimizer = depthnet.optim.AdamW([{"params": linear.parameters()}], lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_groups_take_what_the_optimizer_was_made_with_unless_they_say_otherwise():
    first, second = parameters(shapes=[(2,), (3,)])
    groups = [{"params": first}, {"params": second, "lr": 0.5, "amsgrad": True, "maximize": True}]
    optimizer = depthnet.optim.Adam(groups, lr=0.1, weight_decay=0.2)
    keys = ("lr", "weight_decay", "amsgrad", "maximize")
    assert [tuple(group[key] for key in keys) for group in optimizer.param_groups] == [
        (0.1, 0.2, False, False),
        (0.5, 0.2, True, True),
    ]


# ---- arguments ----


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and not negative, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr must be finite"),
        ({"lr": "fast"}, TypeError, "lr must be a number or a vector of numbers, got 'fast'"),
        ({"lr": torch.ones(3)}, ValueError, r"lr_scale .* \(3,\) does not fit .* \(2, 5\)"),
        ({"lr": torch.tensor(-0.1)}, ValueError, "lr must be finite and not negative"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must be at least 0 and below 1, got 1.0"),
        (
            {"betas": (0.9, -0.1)},
            ValueError,
            r"betas\[1\] must be at least 0 and below 1, got -0.1",
        ),
        ({"betas": (0.9,)}, ValueError, r"betas must be two numbers, got \(0.9,\)"),
        ({"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1.0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be finite and not negative"),
        ({"weight_decay": [0.1, 0.2]}, TypeError, "weight_decay must be a number"),
        ({"eps": [0.1, 0.2]}, TypeError, "eps must be a number.*eps_scale may be a vector"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be None or positive.*got 0.0"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be None or positive.*got -1.0"),
        ({"max_grad_norm": torch.inf}, ValueError, "max_grad_norm must be .*finite, got inf"),
        ({"max_grad_norm": torch.nan}, ValueError, "max_grad_norm must be .*finite, got nan"),
        ({"differentiable": True}, ValueError, "differentiable=True is not supported"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        depthnet.optim.AdamW([torch.zeros(2, 5, requires_grad=True)], **arguments)


def test_bad_arguments_of_sgd():
    param = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="nesterov needs a positive momentum"):
        depthnet.optim.SGD([param], nesterov=True)
    with pytest.raises(ValueError, match="nesterov needs a positive momentum and no dampening"):
        depthnet.optim.SGD([param], nesterov=True, momentum=0.9, dampening=0.1)
    with pytest.raises(ValueError, match="momentum must not be negative"):
        depthnet.optim.SGD([param], momentum=-0.1)
    with pytest.raises(TypeError, match="params must be real"):
        depthnet.optim.SGD([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])


@pytest.mark.parametrize("name", NAMES)
def test_differentiable_steps_are_refused_in_groups(name):
    group = {"params": [torch.zeros(2, requires_grad=True)], "differentiable": True}
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        getattr(depthnet.optim, name)([group])


@pytest.mark.parametrize("name", NAMES)
def test_torchs_choices_of_an_implementation_change_nothing(name):
    results = []
    for options in ({}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}):
        params = parameters()
        train(getattr(depthnet.optim, name)(params, lr=0.1, **options), params, 3)
        results.append(params)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_capturable_is_accepted_and_changes_nothing_on_the_cpu():
    results = []
    for capturable in (False, True):
        params = parameters()
        train(depthnet.optim.AdamW(params, lr=0.1, capturable=capturable), params, 3)
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bad_arguments_of_the_step_operators():
    p = [torch.zeros(2, 3)]
    rates = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.0, "betas": (0.9, 0.99)}
    step = [torch.zeros(())]
    kernels.adamw_step_(p, p, p, p, step, **rates)
    kernels.adamw_step_([], [], [], [], [], **rates)
    with pytest.raises(ValueError, match="grads must have 1 tensors, as params has, got 0"):
        kernels.adamw_step_(p, [], p, p, step, **rates)
    with pytest.raises(
        ValueError, match=r"exp_avgs\[0\] must have the shape .* \(2, 3\), got \(3\)"
    ):
        kernels.adamw_step_(p, p, [torch.zeros(3)], p, step, **rates)
    with pytest.raises(ValueError, match=r"max_exp_avg_sqs\[0\] must have the shape"):
        kernels.adamw_step_(p, p, p, p, step, max_exp_avg_sqs=[torch.zeros(3)], **rates)
    with pytest.raises(ValueError, match="lr must be a number or a 1-dim tensor of 2 entries"):
        kernels.adamw_step_(p, p, p, p, step, **{**rates, "lr": torch.ones(3)}, leading=[1])
    with pytest.raises(ValueError, match=r"leading\[0\] must be 0 to 2"):
        kernels.sgd_step_(p, p, lr=0.1, leading=[3])
    with pytest.raises(TypeError, match=r"params\[0\] must be one of float32"):
        kernels.sgd_step_([torch.zeros(2, dtype=torch.int32)], [torch.zeros(2)], lr=0.1)
    with pytest.raises(ValueError, match="steps must be 1 tensors of one element"):
        kernels.adamw_step_(p, p, p, p, [], **rates)


@pytest.mark.parametrize("options", [{}, {"decoupled": False}, {"maximize": True}], ids=str)
def test_the_step_operators_are_the_optimizers_steps(backend, options):
    """With amsgrad, and for each slice a rate of its own."""
    ours, theirs = (parameters(torch.float64, [(2, 5), (7,)]) for _ in range(2))
    lr = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    states = [[torch.zeros_like(p) for p in ours] for _ in range(3)]
    steps = [torch.zeros(()) for _ in ours]
    names = {"decoupled": "decoupled_weight_decay", "maximize": "maximize"}
    made = {"amsgrad": True, "decoupled_weight_decay": True}
    made |= {names[key]: value for key, value in options.items()}
    groups = [{"params": theirs[0], "lr_scale": lr[:2]}, {"params": theirs[1], "lr_scale": 0.3}]
    optimizer = depthnet.optim.Adam(groups, lr=1.0, weight_decay=0.1, **made)
    for step in range(3):
        train(optimizer, theirs, 1, first=step)
        grads = [p.grad for p in theirs]
        kernels.adamw_step_(
            *(ours, grads, states[0], states[1], steps),
            max_exp_avg_sqs=states[2],
            lr=lr,
            eps=1e-8,
            weight_decay=0.1,
            betas=(0.9, 0.999),
            leading=[1, 0],
            **options,
        )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [step.item() for step in steps] == [3, 3]
