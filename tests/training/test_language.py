"""Runs of language models: stopped, killed and resumed; the text that they give."""

import csv
import json
import math
import re
import signal
from dataclasses import replace

import pytest
import torch
from language_runs import MOMENTS, SMALL, VERSIONS, killed, tokens_of, train

from depthnet import data
from depthnet.training import language
from depthnet.training.language import Diverged, LanguageTrainer

pytest.importorskip("safetensors")


@pytest.fixture
def tokens(tmp_path):
    return tokens_of(tmp_path)


def result(folder):
    """The weights and the log without times, of a run that has finished."""
    with open(folder / "log.csv") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == list(range(1, SMALL.steps + 1))
    weights = (folder / f"model-{SMALL.steps}.safetensors").read_bytes()
    return weights, [{**line, "seconds": None} for line in lines]


def test_a_model_learns(tokens, tmp_path):
    settings = replace(SMALL, steps=60, mlp="swiglu", positions="learned")
    trainer = train(tokens, tmp_path / "run", settings)
    assert trainer.done
    with open(tmp_path / "run" / "log.csv") as file:
        lines = list(csv.DictReader(file))
    assert float(lines[0]["loss"]) == pytest.approx(math.log(tokens.vocabulary))  # from logits 0
    validations = [line["step"] for line in lines if line["validation_loss"]]
    assert validations == [str(step) for step in range(3, 61, 3)]
    assert trainer.validation_loss == float(lines[-1]["validation_loss"]) < 2.5
    files = {path.name for path in (tmp_path / "run").iterdir()}
    made = {"model-60.safetensors", "training-60.pt", "config.json", "tokenizer.json", "log.csv"}
    assert files == {".lock", *made}


def test_the_learning_rate_rises_and_falls(tokens):
    settings = replace(SMALL, steps=20, warmup=0.25, log2_lr=-9)
    trainer = LanguageTrainer(settings, tokens)
    rates = [trainer.train_step()["learning_rate"] / 2**-9 for _ in range(20)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    falling = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 15)) / 2 for step in range(15)]
    assert rates[5:] == pytest.approx(falling)
    without = LanguageTrainer(replace(settings, warmup=0.0), tokens)
    assert without.train_step()["learning_rate"] == 2**-9


@pytest.mark.parametrize("stops", [(1,), (5, 6, 11)])
def test_a_stopped_run_goes_on_to_the_bit(stops, tokens, tmp_path):
    train(tokens, tmp_path / "whole")
    for step in stops:
        at = []
        stopped = train(
            tokens,
            tmp_path / "stopped",
            progress=lambda progress, at=at: at.append(progress.step),
            stop=lambda at=at, step=step: at[-1] == step,
        )
        assert not stopped.done
        assert stopped.step == step
    assert train(tokens, tmp_path / "stopped").done
    assert result(tmp_path / "stopped") == result(tmp_path / "whole")
    again = train(tokens, tmp_path / "stopped")  # trains nothing
    assert again.done
    assert again.validation_loss is not None
    assert result(tmp_path / "stopped") == result(tmp_path / "whole")


@pytest.mark.parametrize(("moment", "count"), [(moment, 4) for moment in MOMENTS] + [("step", 9)])
def test_a_killed_run_goes_on_to_the_bit(moment, count, tokens, tmp_path, set_threads):
    set_threads(1)
    assert killed(tmp_path, moment, count) == -signal.SIGKILL
    seen = []
    train(tokens, tmp_path / "killed", progress=lambda progress: seen.append(progress.step))
    # The checkpoint before the kill, or that of the very step if it was whole.
    assert seen[0] == count + (moment == "save")
    train(tokens, tmp_path / "whole")
    assert result(tmp_path / "killed") == result(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*.tmp"))
    assert len(list((tmp_path / "killed").glob("model-*"))) == 1


def test_other_settings_are_refused(tokens, tmp_path):
    train(tokens, tmp_path / "run", stop=lambda: True)
    with pytest.raises(ValueError, match="holds a run with other settings") as error:
        train(tokens, tmp_path / "run", replace(SMALL, log2_lr=-7.0, seed=4))
    assert str(error.value).splitlines()[1:] == [
        "  log2_lr: -8.0 there, -7.0 now",
        "  seed: 3 there, 4 now",
    ]
    other = data.tokens(tmp_path / "a.txt", "bpe:256", folder=tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"data: .*'bytes'.* there, .*'bpe:256'.* now"):
        train(other, tmp_path / "run")
    assert train(tokens, tmp_path / "run").done


def test_a_run_that_has_saved_nothing_may_be_another(tokens, tmp_path):
    with pytest.raises(
        Diverged, match=r"the loss is (nan|inf) at step \d+ of 12; a smaller log2_lr"
    ):
        train(tokens, tmp_path / "run", replace(SMALL, log2_lr=60.0))
    with pytest.raises(ValueError, match="run holds no trained model yet: there is no model-STEP"):
        language.load(tmp_path / "run")
    assert train(tokens, tmp_path / "run").done


def test_a_folder_has_one_process(tokens, tmp_path):
    def nested(progress):
        with pytest.raises(ValueError, match="out: another process is training in"):
            train(tokens, tmp_path / "run")

    assert train(tokens, tmp_path / "run", progress=nested).done


def test_broken_checkpoints_are_named(tokens, tmp_path):
    train(tokens, tmp_path / "run", stop=lambda: True)
    for name in ("model-1.safetensors", "training-1.pt", "config.json"):
        path = tmp_path / "run" / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} is broken"):
            train(tokens, tmp_path / "run")
        path.write_bytes(content)
    assert train(tokens, tmp_path / "run").done


@pytest.mark.parametrize("tokenizer", [None, "bpe:300"])
def test_a_loaded_model_is_the_trained_one(tokenizer, tmp_path):
    tokens = tokens_of(tmp_path, tokenizer)
    settings = replace(SMALL, tokenizer=tokenizer, parametrization="0.75,0.25", mlp="abs")
    trainer = train(tokens, tmp_path / "run", settings)
    model, codec = language.load(tmp_path / "run")
    x, _ = tokens.batch(0, 0, 2, 16)
    assert torch.equal(model(x), trainer.model(x))
    assert codec.encode("def f").tolist() == tokens.encode("def f").tolist()
    assert str(model.parametrization) == str(trainer.model.parametrization)


def test_continuations(tokens, tmp_path):
    train(tokens, tmp_path / "run")
    model, codec = language.load(tmp_path / "run")
    prompt = tokens.encode("def f")
    greedy = model.generate(prompt[None], 11, temperature=0.0)[0]
    text = "".join(language.continuation(model, codec, "def f", 11, temperature=0.0))
    assert "def f" + text == tokens.decode(greedy)
    drawn = [
        "".join(language.continuation(model, codec, "def f", 100, top_k=5, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 100  # bytes of ASCII, far more than the context of 16
    assert len("".join(language.continuation(model, codec, "x" * 50, 3))) == 3
    assert list(language.continuation(model, codec, "x", 0)) == [""]
    for arguments, options, words in (
        (("", 3), {}, "prompt must not be empty"),
        (("é", 3), {}, "text must be ASCII"),
        (("x", -1), {}, "tokens must be at least 0, got -1"),
        (("x", 1), {"top_k": 500}, "top_k must be at most the vocabulary"),
    ):
        with pytest.raises(ValueError, match=words):
            next(language.continuation(model, codec, *arguments, **options))


def test_a_continuation_past_the_context_sees_its_last_half(tokens, tmp_path):
    train(tokens, tmp_path / "run")
    model, codec = language.load(tmp_path / "run")
    text = "".join(language.continuation(model, codec, "def f", 20, temperature=0.0))
    seen = tokens.encode("def f" + text)
    first = model.generate(seen[None, :5], 11, temperature=0.0)[0]
    assert torch.equal(first, seen[:16])
    then = model.generate(seen[None, 8:16], 8, temperature=0.0)[0]
    assert torch.equal(then, seen[8:24])


def test_the_record_holds_settings_data_and_versions(tokens, tmp_path):
    train(tokens, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["data"] == tokens.source
    assert record["versions"] == VERSIONS
    assert (record["norm"], record["seed"], record["width"]) == ("rms", 3, 64)


def test_errors(tmp_path):
    with pytest.raises(
        ValueError, match=r"nowhere holds no trained model: there is no config\.json"
    ):
        language.load(tmp_path / "nowhere")
    for changes, words in (
        ({"context": 1}, "context must be at least 2, got 1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"warmup": 1.0}, "warmup must be at least 0 and below 1, got 1.0"),
        ({"log2_lr": math.inf}, "log2_lr must be a finite number, got inf"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(SMALL, **changes)


@pytest.mark.parametrize("changes", [{"autocast": True}, {"compile": True, "depth": 0}])
def test_faster_arithmetic_is_nearly_the_same(changes, tokens):
    """Three steps, in units of the rounding of the products: bfloat16's, else float32's.

    The network that is compiled has no layers, since compiling one takes a minute.
    """
    rounding = 2**-8 if "autocast" in changes else 2**-23
    settings = replace(SMALL, **changes)
    other = LanguageTrainer(settings, tokens)
    plain = LanguageTrainer(replace(settings, autocast=False, compile=False), tokens)
    for _ in range(3):
        loss = plain.train_step()["loss"]
        assert other.train_step()["loss"] == pytest.approx(loss, rel=16 * rounding)
    assert other.validation_loss == pytest.approx(plain.validation_loss, rel=16 * rounding)
