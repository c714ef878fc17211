"""What the README shows is true."""

import re
from pathlib import Path

import pytest
import torch

from depthnet.scaling import PRESETS
from depthnet.sweep.study import SweepSettings, read_file

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_learns():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope = {}
    torch.manual_seed(0)
    exec(code, scope)
    assert scope["loss"].item() < 0.1


@pytest.mark.parametrize(
    "document",
    [
        "docs/theory.md",
        "docs/diagnostics.md",
        "docs/sweeps.md",
        "docs/tuning.md",
        "docs/scaling_your_model.md",
        "docs/language_models.md",
        "docs/transformers.md",
    ],
)
def test_examples_in_the_docs_run(document):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert blocks
    for code in blocks:
        exec(code, {})


def test_the_study_file_in_the_docs_is_one(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/sweeps.md").read_text(), re.DOTALL)
    (tmp_path / "study.yaml").write_text(text)
    assert SweepSettings(**read_file(tmp_path / "study.yaml")).planned == 2 * 2 * 3 * 9 * 3 * 2


@pytest.mark.parametrize("document", ["README.md", "docs/parametrizations.md"])
def test_presets_are_listed_with_their_exponents(document):
    numbers = {"0": 0.0, "1/2": 0.5, "1": 1.0}
    rows = re.findall(
        r"^\| (`.*?) \| (\S+) \| (\S+) \|", (ROOT / document).read_text(), re.MULTILINE
    )
    found = {
        name: (numbers[alpha], numbers[gamma])
        for names, alpha, gamma in rows
        if alpha in numbers
        for name in re.findall(r"`(\w+)`", names)
    }
    assert found == {name: (preset.alpha, preset.gamma) for name, preset in PRESETS.items()}


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_linked_exist(document):
    for target in re.findall(r"\]\((?!https)([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target
