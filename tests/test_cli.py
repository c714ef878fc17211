import subprocess
import sys

import pytest

from depthnet import cli


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
    ],
)
def test_a_missing_extra_is_named(module, arguments, extra, tmp_path):
    if arguments[0] == "transfer":
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
        "diversity --parametrizations depth_mup -0.5,1.5 --depths 64 32 --width 16 --steps 3 "
        f"--seeds 2 --data digits --out {tmp_path}"
    ).split()
    assert cli.main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "(0.5, 0.5): κ = 1/2 ± 0.05 in training" in printed
    assert "remainder / change" in printed
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
