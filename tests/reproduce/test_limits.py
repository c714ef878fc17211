"""The studies of limits at a reduced size: they run, resume, and their verdicts follow from their rows."""

import csv
import json

import numpy as np
import pytest

from depthnet.reproduce.initialization import FirstStep, Initialization
from depthnet.reproduce.linear import Fig8, Fig9
from depthnet.reproduce.prediction import Prediction
from depthnet.reproduce.study import run
from depthnet.reproduce.training import Training
from depthnet.theory import limits

SMALL = {
    "fig8": Fig8(depth=4, widths=(16, 64, 256), seeds=4, steps=3, batch=2),
    "fig9": Fig9(depths=(4, 8, 16), steps=3),
    "init": Initialization(width=256, depth=8, seeds=2, pairs=8),
    "first-step": FirstStep(width=64, depth=8, seeds=4, group=2),
    "trajectory": Training(width=32, depths=(2, 4), seeds=4, group=2),
    "theory": Prediction(depth=6, steps=3, batch=2),
}


@pytest.mark.parametrize("study", SMALL.values(), ids=SMALL)
def test_studies_write_what_they_find(study, tmp_path, monkeypatch):
    # How accurate limits are is tested in tests/theory; at these depths they take seconds less.
    monkeypatch.setattr(limits, "LIMIT_DEPTHS", (4, 8, 16))
    findings = run(study, tmp_path)
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(findings.rows) > 0
    for row, found in zip(rows, findings.rows, strict=True):
        assert {key: str(value) for key, value in found.items()} == row
        assert all(np.isfinite(value) for value in found.values() if isinstance(value, float))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [verdict["words"] for verdict in summary["verdicts"]] == [
        v.words for v in findings.verdicts
    ]
    assert (tmp_path / f"{study.name}.png").stat().st_size > 10_000
    assert all(len(line) == len(findings.header) for line in findings.lines)
    # A second run trains nothing and finds the same.
    assert run(study, tmp_path).rows == findings.rows


def test_fig8_measures_the_exponent_of_the_error(tmp_path):
    """Means of n independent numbers: an error of n^-1/2; three widths, four seeds."""
    (verdict,) = run(SMALL["fig8"], tmp_path).verdicts
    assert verdict.holds
    exponent = float(verdict.words.split("n^")[1].split()[0])
    assert abs(exponent + 0.5) < 0.25


def test_fig9_measures_the_exponent_of_the_error(tmp_path):
    findings = run(SMALL["fig9"], tmp_path)
    (verdict,) = findings.verdicts
    exponent = float(verdict.words.split("L^")[1].split(",")[0])
    assert -1.25 < exponent < -0.5  # -1 as L grows; these depths are 4 to 16
    assert verdict.holds == (abs(exponent + 1) < 0.25)


def test_verdicts_can_fail():
    """Fed with networks that do not follow the theory, the studies say so."""
    study = Initialization(width=8, depth=8, seeds=2, pairs=8, activations=("abs",))
    wrong = {
        f"abs-s{seed}": {"forward": np.ones((9, 5)), "gradient": np.ones((9, 5))}
        for seed in range(2)
    }
    (verdict,) = study.findings(wrong).verdicts
    assert verdict.holds is False
    study = FirstStep(width=8, depth=8, seeds=4, group=2, activations=("abs",))
    noise = np.random.default_rng(0).normal(size=(2, 9, 2, 2)) * 1e-3
    wrong = {
        f"abs-s{s}": {"change": np.array([0.0, 0.001]) + s, "kernel": noise + s} for s in (0, 2)
    }
    (verdict,) = study.findings(wrong).verdicts
    assert verdict.holds is False


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        (Fig8, {"seeds": 1}, "seeds must be at least 2, got 1"),
        (Fig8, {"widths": (64, 0)}, "widths must be at least 1, got 0"),
        (Fig9, {"depths": (2, 4)}, "depths must be at least 4, got 2"),
        (Fig9, {"steps": 1}, "steps must be at least 2"),
        (Initialization, {"activations": ("rleu",)}, "did you mean 'relu'"),
        (Initialization, {"pairs": 2}, "pairs must be at least 4"),
        (FirstStep, {"group": 0}, "group must be at least 1"),
        (Training, {"activations": ("tan",)}, "did you mean 'tanh'"),
        (Training, {"lr": float("nan")}, "lr must be a finite number"),
    ],
)
def test_bad_settings(kind, setting, message):
    with pytest.raises(ValueError, match=message):
        kind(**setting)


def test_theory_is_for_dense_data_and_known_settings():
    with pytest.raises(ValueError, match="dense vectors, got 'text'"):
        Prediction(data="text")
    with pytest.raises(ValueError, match="known for identity only, got 'abs'"):
        Prediction(alpha=1.0, gamma=0.0)
    with pytest.raises(ValueError, match="did you mean 'abs'"):
        Prediction(activation="abss")
