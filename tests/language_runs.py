"""Runs of small language models, and processes of them that are killed at any moment."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from workers import CONTEXT

from depthnet import data
from depthnet.training import language
from depthnet.training.language import LanguageSettings, LanguageTrainer

SMALL = LanguageSettings(
    tokenizer=None, width=64, depth=1, context=16, batch=4, steps=12, norm="rms", seed=3
)
VERSIONS = {"torch": torch.__version__}

# A process is killed after a call of these, or before one.
MOMENTS = {
    "step": (LanguageTrainer, "train_step"),
    "half a save": (torch, "save"),
    "between its files": (language._Folder, "_write_weights"),
    "save": (language._Folder, "save"),
}
BEFORE = ("between its files",)


def tokens_of(folder: Path, tokenizer: str | None = None) -> data.Tokens:
    path = folder / "a.txt"
    if not path.exists():
        path.write_text("".join(f"def f{i % 7}(x):\n    return x + {i}\n\n" for i in range(300)))
    return data.tokens(path, tokenizer, folder=folder / "tokens")


def train(tokens: data.Tokens, out: Path, settings=SMALL, **options) -> LanguageTrainer:
    return language.train(settings, tokens, out, versions=VERSIONS, **options)


def killed(folder: Path, moment: str, count: int) -> int | None:
    """The exit status of a process that trains in `folder`/killed, with a checkpoint after every step,
    and kills itself at the count-th of a moment."""
    process = CONTEXT.Process(target=_train_and_die, args=(folder, moment, count))
    process.start()
    process.join(120)
    return process.exitcode


def _train_and_die(folder: Path, moment: str, count: int) -> None:
    torch.set_num_threads(1)
    language.CHECKPOINT_SECONDS = 0.0
    owner, name = MOMENTS[moment]
    original, calls = getattr(owner, name), 0

    def dying(*arguments, **keywords):
        nonlocal calls
        calls += 1
        result = None if moment in BEFORE and calls == count else original(*arguments, **keywords)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)
    train(tokens_of(folder), folder / "killed")
