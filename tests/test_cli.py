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
