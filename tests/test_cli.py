import subprocess
import sys
from dataclasses import asdict

import pytest

from depthnet import cli
from depthnet.diagnostics.phase_diagram import PhaseSettings


def test_classify(capsys):
    assert cli.main(["classify", "0.5", "0.5"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "alpha=0.5, gamma=0.5 (depth_mup): feature learning with maximal feature diversity"
        in printed
    )
    assert "feature diversity exponent 0.5" in printed
    assert cli.main(["classify", "-1", "0"]) == 0
    assert "unstable at initialization" in capsys.readouterr().out
    assert cli.main(["classify", "nan", "0"]) == 2
    assert "alpha must be a finite number" in capsys.readouterr().err


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for word in ("depthnet", "torch", "cpu", "reference", "active", "matplotlib"):
        assert word in printed


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("rich", ["classify", "0.5", "0.5"], "cli"),
        ("matplotlib", ["transfer"], "plot"),
        ("sklearn", ["transfer", "--data", "digits"], "data"),
        (
            "scipy",
            [
                "coord-check",
                "--data",
                "text",
                "--widths",
                "8",
                "16",
                "--depths",
                "8",
                "--steps",
                "1",
            ],
            "stats",
        ),
    ],
)
def test_a_missing_extra_is_named(module, arguments, extra, tmp_path):
    if arguments[0] != "classify":
        arguments = [*arguments, "--out", str(tmp_path)]
    code = f"""
import sys
sys.modules[{module!r}] = None  # an import of it now fails
from depthnet.cli import main
sys.exit(main({arguments!r}))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2, result.stderr
    assert f"pip install 'depthnet[{extra}]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_diversity(tmp_path, capsys):
    arguments = (
        "diversity --parametrizations depth_mup -0.5,1.5 --depths 64 32 --width 16 --steps 2 "
        f"--seeds 2 --data digits --out {tmp_path}"
    ).split()
    assert cli.main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "(0.5,0.5): κ = 1/2 ± 0.05 in training" in printed
    assert "cos ΔW" in printed
    rows = (tmp_path / "results.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 * 2  # parametrizations, depths, times
    assert {path.suffix for path in tmp_path.glob("*.*")} >= {".csv", ".json", ".png"}
    jobs = [path.stat().st_mtime_ns for path in (tmp_path / "jobs").iterdir()]
    assert cli.main(arguments) == 0  # nothing is trained again
    assert jobs == [path.stat().st_mtime_ns for path in (tmp_path / "jobs").iterdir()]
    assert (tmp_path / "results.csv").read_text().splitlines() == rows
    capsys.readouterr()
    assert cli.main(["diversity", "--depths", "16"]) == 2
    assert "depths must be at least 32, got 16" in capsys.readouterr().err


def test_phase_diagram(tmp_path, capsys):
    arguments = (
        "phase-diagram --alphas 0 0.5 --gammas -0.5 0 --spacing 0.5 --depths 8 32 --width 16 "
        f"--seeds 2 --steps 1 --batch 8 --out {tmp_path}"
    ).split()
    assert cli.main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "unstable at initialization 2 2 2" in printed  # cells in theory, measured, in both
    assert "of 4" in printed
    rows = (tmp_path / "results.csv").read_text().splitlines()
    assert len(rows) == 1 + 4
    assert rows[0].startswith("alpha,gamma,theory,measured,agrees,stream,stream_low,stream_high")
    assert {path.suffix for path in tmp_path.glob("*.*")} >= {".csv", ".json", ".png"}
    defaults = vars(cli._parser().parse_args(["phase-diagram"]))
    for name, value in asdict(PhaseSettings()).items():
        assert defaults[name] == (list(value) if isinstance(value, tuple) else value), name
    assert cli.main(["phase-diagram", "--seeds", "1"]) == 2
    assert "seeds must be at least 2, got 1" in capsys.readouterr().err


def test_coord_check(tmp_path, capsys):
    arguments = ["coord-check", "--widths", "64", "--depths", "16", "32", "64", "128"]
    arguments += ["--base-width", "64", "--steps", "1"]
    assert cli.main([*arguments, "--out", str(tmp_path / "right")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "farthest is" in printed
    rows = (tmp_path / "right" / "results.csv").read_text().splitlines()
    assert rows[0] == "axis,quantity,step,slope,low,high,predicted,holds"
    assert {path.suffix for path in (tmp_path / "right").glob("*.*")} >= {".csv", ".json", ".png"}
    jobs = (tmp_path / "right" / "jobs").iterdir()
    assert {path.name for path in jobs} == {f"n64-L{depth}.npz" for depth in (16, 32, 64, 128)}
    broken = [*arguments, "--parametrization", "standard", "--out", str(tmp_path / "broken")]
    assert cli.main(broken) == 1  # a check that is not passed fails a build
    assert "cannot pass" in capsys.readouterr().out
    assert cli.main(["coord-check", "--depths", "8", "8"]) == 2
    assert "depths must be different from each other" in capsys.readouterr().err
