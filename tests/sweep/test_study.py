"""Settings of a study: what they mean, and what is refused."""

import json
import math

import pytest

from depthnet import data
from depthnet.sweep import study
from depthnet.sweep.study import Network, Range, SweepSettings, read_file


def test_defaults_are_resolved():
    settings = SweepSettings(depth=(32, 8), width=16)
    assert (settings.base_width, settings.base_depth) == (16, 8)
    assert settings.log2_block_multiplier == (-1.5,)  # 8^-1/2
    assert settings.log2_lr == tuple(map(float, range(-13, -3)))
    assert settings.networks == [
        Network("depth_mup", "abs", 16, 32),
        Network("depth_mup", "abs", 16, 8),
    ]
    assert (settings.sweep, settings.schedule, settings.warmup) == (("all",), "constant", 0)


def test_one_value_is_a_list_of_one_and_a_step_makes_a_grid():
    settings = SweepSettings(
        width=8, depth=2, log2_lr={"low": -3, "high": -2, "step": 0.25}, weight_decay=[0.1, 0]
    )
    assert settings.log2_lr == (-3.0, -2.75, -2.5, -2.25, -2.0)
    assert settings.weight_decay == (0.0, 0.1)


def test_planned_counts_every_combination():
    settings = SweepSettings(
        parametrization=("depth_mup", "ode"), depth=(2, 4), log2_lr=(-9, -8), weight_decay=(0, 1),
        log2_block_multiplier=(-1, 0, 1), seeds=3,
    )  # fmt: skip
    assert settings.planned == 2 * 2 * 2 * 2 * 3 * 3
    search = SweepSettings(depth=(2, 4), sampler="tpe", log2_lr=Range(-9, -4), trials=7, seeds=3)
    assert search.planned == 2 * 7 * 3
    crossed = SweepSettings(
        depth=2, sampler="tpe", log2_lr=Range(-9, -4), weight_decay=(0, 1), trials=7
    )
    assert crossed.planned == 7 * 2 * 2


def test_each_sweep_is_a_network_of_its_own_beside_those_of_other_depths():
    chosen = SweepSettings(depth=(8, 2), sweep=("hidden", "frozen"), output_std=1, log2_lr=-8)
    found = [(network.sweep, network.depth) for network in chosen.networks]
    assert found == [("hidden", 8), ("hidden", 2), ("frozen", 8), ("frozen", 2)]
    assert chosen.planned == 4 * 2
    assert len({network.name for network in chosen.networks}) == 4


def test_a_record_makes_the_settings_again():
    digits = data.load("digits")
    for settings in (
        SweepSettings(activation=("abs", "1,-0.2"), parametrization=("0.75,0.25",)),
        SweepSettings(sampler="tpe", log2_lr=Range(-9, -4), weight_decay=Range(1e-3, 1)),
        SweepSettings(sweep=("all", "frozen"), output_std=1, schedule="linear", warmup=7),
    ):
        record = json.loads(json.dumps(study.record(settings, digits)))
        assert study.from_record(record) == settings
        assert record["versions"]["torch"]
        assert record["source"]["name"] == "digits"


YAML = """
data: digits
parametrization: [depth_mup, "0.75,0.25"]
depth: [2, 4]
log2_lr: {low: -9, high: -7, step: 1}
seeds: 3
"""
TOML = """
data = "digits"
parametrization = ["depth_mup", "0.75,0.25"]
depth = [2, 4]
log2_lr = {low = -9, high = -7, step = 1}
seeds = 3
"""


@pytest.mark.parametrize(("suffix", "text"), [("yaml", YAML), ("yml", YAML), ("toml", TOML)])
def test_files(tmp_path, suffix, text):
    path = tmp_path / f"mine.{suffix}"
    path.write_text(text)
    settings = SweepSettings(**read_file(path))
    assert settings == SweepSettings(
        name="mine", data="digits", parametrization=("depth_mup", "0.75,0.25"), depth=(2, 4),
        log2_lr=(-9, -8, -7), seeds=3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "depths: [2]", "the key='depths' is not one of .*did you mean 'depth'"),
        ("a.toml", "lr = 3", "the key='lr' is not one of"),
        ("a.yaml", "- 1", "must hold settings"),
        ("a.yaml", "", "must hold settings"),
        ("a.yaml", "depth: [", "cannot be parsed"),
        ("a.toml", "depth = [", "cannot be parsed"),
        ("a.json", "{}", "must be a .yaml, .yml or .toml file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        read_file(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a/b"}, "name must be letters"),
        ({"name": 3}, "name must be letters"),
        ({"depth": ()}, "depth must have at least one value"),
        ({"depth": (4, 4)}, "depth must be different"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"depth": 2.5}, "depth must be an integer"),
        ({"width": "wide"}, "width must be an integer"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"steps": 4}, "steps must be at least 5"),
        ({"base_depth": 0}, "base_depth must be at least 1"),
        ({"parametrization": "depthmup"}, "did you mean 'depth_mup'"),
        ({"parametrization": 3}, "parametrization must be a name"),
        ({"activation": "rellu"}, "did you mean 'relu'"),
        ({"activation": "1,b"}, "activation must be a name or slopes"),
        ({"activation": "1,2,3"}, "activation must be a name or slopes"),
        ({"log2_lr": ()}, "log2_lr must have at least one value"),
        ({"log2_lr": (-9, -9)}, "log2_lr must be different"),
        ({"log2_lr": (-9, math.nan)}, "log2_lr must be a finite number"),
        ({"log2_lr": (-99,)}, "log2_lr must be from -60 to 60"),
        ({"log2_lr": {"low": -9}}, "log2_lr must be a list, or have low, high and step"),
        ({"log2_lr": {"low": -9, "high": -4, "stop": 1}}, "log2_lr must be a list, or have"),
        ({"log2_lr": {"low": -9, "high": -4, "step": 0}}, "a positive step"),
        ({"log2_lr": {"low": -9, "high": -4, "step": 2}}, "whole steps apart"),
        ({"log2_lr": {"low": -9, "high": "x", "step": 2}}, "log2_lr.high must be a finite number"),
        ({"log2_lr": {"low": -9, "high": -4}}, "log2_lr needs a step"),
        ({"log2_lr": Range(-4, -9), "sampler": "tpe"}, "log2_lr must have low below high"),
        ({"sampler": "tpe"}, "no setting is a range"),
        ({"sampler": "random"}, "sampler='random' is not one of grid, tpe"),
        ({"sweep": "some"}, "sweep='some' is not one of all, hidden, frozen"),
        ({"sweep": ("all", "hiden")}, "sweep='hiden' is not one of .* did you mean 'hidden'"),
        ({"sweep": ("all", "hidden", "all")}, "sweep must be different"),
        ({"sweep": ()}, "sweep must have at least one value"),
        ({"sweep": ("all", "frozen")}, "output_std must be positive with sweep frozen"),
        ({"output_std": -0.1}, "output_std must not be negative"),
        ({"output_std": math.inf}, "output_std must be a finite number"),
        ({"output_std": "1"}, "output_std must be a finite number"),
        ({"outer_log2_lr": 61}, "outer_log2_lr must be from -60 to 60"),
        ({"outer_log2_lr": math.nan}, "outer_log2_lr must be a finite number"),
        ({"schedule": "cosin"}, "schedule='cosin' is not one of .* did you mean 'cosine'"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"warmup": 1.5}, "warmup must be an integer"),
        ({"warmup": 300}, "warmup must be less than steps, 300, got 300"),
        ({"weight_decay": -1}, "weight_decay must be from 0"),
        ({"memory": "3"}, "memory must be a size"),
        ({"memory": "0GiB"}, "memory must be a size"),
        ({"memory": 2}, "memory must be a size"),
        ({"device": "quantum"}, "device: 'quantum' cannot be used"),
        ({"device": "meta"}, "device: 'meta' cannot be used"),
    ],
)
def test_what_is_refused(changes, words):
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        SweepSettings(**changes)
    assert "\n" not in str(caught.value)


def test_sizes_in_bytes():
    assert study.memory_bytes("2GiB") == 2 * 2**30
    assert study.memory_bytes("1.5 MB") == 1_500_000
