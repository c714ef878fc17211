"""depthnet train and depthnet generate."""

import os
import signal
from dataclasses import asdict

import pytest

from depthnet import cli
from depthnet.training.language import LanguageSettings, LanguageTrainer

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train a small model in tmp_path/run, with more options."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "1000")
    text = tmp_path / "a.txt"
    text.write_text("".join(f"def f{i % 7}(x):\n    return 'é' * {i}\n\n" for i in range(300)))
    arguments = f"train {text} --tokenizer bpe:300 --width 64 --depth 1 --context 16 --steps 20"
    arguments += f" --batch 2 --device cpu --out {tmp_path / 'run'}"

    def train(*more):
        return cli.main([*arguments.split(), *more])

    return train


def test_train_and_generate(run, tmp_path, capsys):
    assert run() == 0
    printed = capsys.readouterr().out
    assert "tokens of a.txt, a vocabulary of 300 (bpe:300)" in printed
    assert "step 20: loss" in printed
    assert f"Try: depthnet generate {tmp_path / 'run'}" in printed
    generate = ["generate", str(tmp_path / "run"), "--prompt", "def é", "--tokens", "50"]
    texts = []
    for seed in "001":
        assert cli.main([*generate, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("def é")
    assert len(texts[0]) > 50


def test_ctrl_c_stops_it_and_the_same_command_goes_on(run, tmp_path, capsys, monkeypatch):
    original = LanguageTrainer.train_step

    def interrupted(trainer):
        line = original(trainer)
        if trainer.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return line

    with monkeypatch.context() as context:
        context.setattr(LanguageTrainer, "train_step", interrupted)
        assert run() == 130
    assert f"stopped; the same command goes on from {tmp_path / 'run'}" in capsys.readouterr().err
    assert (tmp_path / "run" / "model-7.safetensors").exists()
    assert run("--seed", "1") == 2
    assert "seed: 0 there, 1 now" in capsys.readouterr().err
    assert run() == 0
    weights = (tmp_path / "run" / "model-20.safetensors").read_bytes()
    assert run("--out", str(tmp_path / "whole")) == 0
    assert (tmp_path / "whole" / "model-20.safetensors").read_bytes() == weights


def test_a_run_that_diverges_says_so(run, capsys):
    assert run("--log2-lr", "60") == 1
    assert "diverged: the loss is" in capsys.readouterr().err


def test_bytes_and_files_of_tokens(run, tmp_path, capsys):
    assert run("--tokenizer", "bytes") == 0
    assert "a vocabulary of 256 (bytes)" in capsys.readouterr().out
    (path,) = (tmp_path / "depthnet" / "tokens").glob("*.tokens")
    small = ["--width", "64", "--depth", "0", "--context", "8", "--steps", "1", "--device", "cpu"]
    assert cli.main(["train", str(path), *small, "--out", str(tmp_path / "tokens")]) == 0
    assert "tokens of a.txt, a vocabulary of 256 (bytes)" in capsys.readouterr().out


def test_defaults_are_those_of_the_settings():
    options = vars(cli._parser().parse_args(["train"]))
    for name, value in asdict(LanguageSettings()).items():
        assert options[name] == ("auto" if name == "device" else value), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nowhere"], "there is no file or folder nowhere, and it is not 'text'"),
        (["train", "--steps", "0"], "steps must be at least 1, got 0"),
        (["train", "--mlp", "geglu", "text.txt"], "there is no file or folder text.txt"),
        (["generate", "nowhere"], "nowhere holds no trained model: there is no config.json"),
    ],
)
def test_errors(arguments, words, capsys):
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_wrong_options_of_a_model(run, capsys):
    for more, words in (
        (["--width", "100"], "width must be a multiple of head_size, 64, got 100"),
        (["--mlp", "geglu"], "mlp='geglu' is not one of gelu, swiglu, abs; did you mean 'gelu'?"),
        (["--context", "100000"], "length must be below the number of"),
    ):
        assert run(*more) == 2
        assert words in capsys.readouterr().err
