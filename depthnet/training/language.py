"""Training a language model: a run in a folder that goes on where it was stopped, to the bit."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from depthnet._checks import differences, integer, integers, number, optional_import
from depthnet._files import locked, reading, replacing
from depthnet.data.tokens import Codec, Tokens, codec, decode_stream
from depthnet.nn import Transformer
from depthnet.nn.generation import sample
from depthnet.optim import AdamW
from depthnet.training.schedules import schedule

CHECKPOINT_SECONDS = 30.0
BETAS = (0.9, 0.95)
FINAL_RATE = 0.1  # of the learning rate, at the end of its cosine
VALIDATIONS = 20  # in a run
VALIDATION_BATCHES = 16
COLUMNS = ("step", "learning_rate", "loss", "validation_loss", "seconds")


@dataclass(frozen=True)
class LanguageSettings:
    """What is trained, on what and how.

    source, tokenizer: as of data.tokens. width, depth, context, mlp, norm, positions, parametrization:
    as of nn.Transformer. steps, batch: of training, and sequences of `context` tokens a step.
    log2_lr: of the learning rate at the base shape, reached after the part `warmup` of the steps and
    brought down to a tenth by half a cosine. weight_decay: AdamW's, at the base shape. seed: of weights
    and batches. device: a torch device; autocast: whether to compute in bfloat16 there; compile:
    whether to use torch.compile.
    """

    source: str = "text"
    tokenizer: str | None = "bpe:1024"
    width: int = 128
    depth: int = 8
    context: int = 128
    mlp: str = "gelu"
    norm: str = "layer"
    positions: str = "rotary"
    parametrization: str = "completep"
    steps: int = 1000
    batch: int = 16
    log2_lr: float = -8.0
    warmup: float = 0.1
    weight_decay: float = 0.1
    seed: int = 0
    device: str = "cpu"
    autocast: bool = False
    compile: bool = False

    def __post_init__(self):
        integers(self, context=2, steps=1, batch=1, seed=0)
        number("log2_lr", self.log2_lr)
        if not 0 <= number("warmup", self.warmup) < 1:
            raise ValueError(f"warmup must be at least 0 and below 1, got {self.warmup}")

    def model(self, vocabulary: int) -> Transformer:
        """The network, with its initial weights, which are the same on every device."""
        names = ("context", "mlp", "norm", "positions", "parametrization")
        return Transformer(
            vocabulary,
            self.width,
            self.depth,
            **{name: getattr(self, name) for name in names},
            generator=torch.Generator().manual_seed(self.seed),
        ).to(self.device)


class Diverged(ArithmeticError):
    """The loss is not finite."""


@dataclass(frozen=True)
class Progress:
    """loss: of the step at hand. validation_loss: the last one; None before the first.
    tokens_per_second: in training, since this process began."""

    step: int
    loss: float
    validation_loss: float | None
    tokens_per_second: float


class LanguageTrainer:
    """Trains a Transformer on tokens.

    Attributes:
        model, optimizer, scheduler: of the run. step: steps done. seconds: spent in them.
        validation_loss: the last one; None before the first.
    """

    def __init__(self, settings: LanguageSettings, tokens: Tokens):
        self.settings, self.tokens = settings, tokens
        self.model = settings.model(tokens.vocabulary)
        self._forward = torch.compile(self.model) if settings.compile else self.model
        self.optimizer = AdamW(
            self.model, 2**settings.log2_lr, BETAS, weight_decay=settings.weight_decay
        )
        self.scheduler = schedule(
            self.optimizer,
            "cosine",
            settings.steps,
            int(settings.warmup * settings.steps),
            FINAL_RATE,
        )
        self.step, self.seconds = 0, 0.0
        self.validation_loss: float | None = None

    @property
    def done(self) -> bool:
        return self.step == self.settings.steps

    @property
    def _validate_every(self) -> int:
        return -(-self.settings.steps // VALIDATIONS)

    def train_step(self) -> dict[str, Any]:
        """One step, and now and then a validation; the line of the log, with the keys COLUMNS.

        Raises:
            Diverged: the loss before the update is not finite; nothing has been updated.
        """
        start, settings = time.perf_counter(), self.settings
        x, y = self.tokens.batch(settings.seed, self.step, settings.batch, settings.context)
        loss = self._loss(x, y)
        self.optimizer.zero_grad()
        loss.backward()
        found = loss.item()
        if not math.isfinite(found):
            raise Diverged(
                f"the loss is {found} at step {self.step + 1} of {settings.steps}; a smaller log2_lr "
                f"than {settings.log2_lr:g} may help"
            )
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        self.seconds += time.perf_counter() - start
        line = {"step": self.step, "learning_rate": rate, "loss": found, "validation_loss": ""}
        if self.step % self._validate_every == 0 or self.done:
            self.validation_loss = line["validation_loss"] = self._validate()
        return {**line, "seconds": round(self.seconds, 3)}

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        device = torch.device(self.settings.device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.autocast):
            logits = self._forward(x.to(device))
        return functional.cross_entropy(logits.flatten(0, 1).float(), y.to(device).flatten())

    @torch.no_grad()
    def _validate(self) -> float:
        batches = self.tokens.validation(self.settings.batch, self.settings.context)
        losses = [(self._loss(x, y).item(), len(x)) for x, y in islice(batches, VALIDATION_BATCHES)]
        return sum(loss * size for loss, size in losses) / sum(size for _, size in losses)

    def state_dict(self) -> dict[str, Any]:
        """All but the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "validation_loss": self.validation_loss,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.validation_loss = state["validation_loss"]


def train(
    settings: LanguageSettings,
    tokens: Tokens,
    out: str | Path,
    *,
    versions: dict[str, str],
    progress: Callable[[Progress], Any] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> LanguageTrainer:
    """Train what is not yet trained of the run in the folder `out`.

    A run that was stopped, or killed, goes on from its last checkpoint when it is started again with
    the same settings, and ends with the same weights, to the bit, on the same machine with as many
    threads.

    Args:
        versions: of the software that results depend on; they are recorded with the settings.
        progress: called after every step.
        stop: asked after every step; if true, the state is saved and a trainer that is not `done`
            returned.

    Raises:
        ValueError: the folder cannot be written, holds a run with other settings (the differences are
            shown), or another process is training it.
        Diverged: the loss is not finite.
    """
    record = {**asdict(settings), "data": tokens.source, "versions": versions}
    with _Folder(Path(out)) as folder:
        folder.begin(record, tokens.codec)
        trainer = LanguageTrainer(settings, tokens)
        folder.load(trainer)
        began, spent, last_save = trainer.step, trainer.seconds, time.monotonic()
        with folder.log(trainer.step) as log:
            while not trainer.done:
                line = trainer.train_step()
                log(line)
                count = (trainer.step - began) * settings.batch * settings.context
                speed = count / (trainer.seconds - spent)
                progress(Progress(trainer.step, line["loss"], trainer.validation_loss, speed))
                stopping = not trainer.done and stop()
                if stopping or trainer.done or time.monotonic() - last_save > CHECKPOINT_SECONDS:
                    folder.save(trainer)
                    last_save = time.monotonic()
                if stopping:
                    break
    return trainer


def load(folder: str | Path, device: str = "cpu") -> tuple[Transformer, Codec]:
    """The model of a run, as of its last checkpoint, and its codec.

    Raises:
        ValueError: the folder holds no run, or one that has saved nothing yet.
        ImportError: safetensors or tokenizers is missing.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"{folder} holds no trained model: there is no config.json")
    if (step := _last_step(path)) is None:
        raise ValueError(f"{folder} holds no trained model yet: there is no model-STEP.safetensors")
    with reading(path / "config.json"):
        record = json.loads((path / "config.json").read_text(encoding="utf-8"))
        vocabulary = record.pop("data")["vocabulary"]
        del record["versions"]
        settings = LanguageSettings(**{**record, "device": device})
    with reading(path / "tokenizer.json"):
        text = (path / "tokenizer.json").read_text(encoding="utf-8")
        found = codec(vocabulary, json.loads(text))
    model = settings.model(vocabulary)
    _load_weights(model, path, step)
    return model.eval(), found


def continuation(
    model: Transformer,
    codec: Codec,
    prompt: str,
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """The text that follows a prompt, in pieces as soon as they are drawn; at least one, maybe empty.

    Where the context is full, the model goes on from the last half of it.

    Args:
        tokens: how many are drawn. temperature, top_k: as of Transformer.generate.

    Raises:
        ValueError: an argument is not as described, or the prompt is empty or cannot be encoded.
    """
    ids = codec.encode(prompt).tolist()
    if not ids:
        raise ValueError("prompt must not be empty")
    device = next(model.parameters()).device
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "generator": torch.Generator(device).manual_seed(seed),
    }

    def drawn() -> Iterator[int]:
        seen, left = ids, integer("tokens", tokens, 0)
        while left:
            if len(seen) >= model.context:
                seen = seen[-(model.context // 2) :]
            count = min(left, model.context - len(seen))
            for token in sample(model, torch.tensor([seen], device=device), count, **options):
                seen = [*seen, token.item()]
                yield seen[-1]
            left -= count

    return decode_stream(codec.decode, drawn(), after=ids)


class _Folder:
    """The folder of a run: config.json, tokenizer.json, log.csv and the last checkpoint.

    A checkpoint is training-STEP.pt and model-STEP.safetensors, of which the latter is written last.
    """

    def __init__(self, path: Path):
        self.path = path
        _safetensors()
        self._lock = locked(path, "training")

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *exception) -> None:
        self._lock.close()

    def begin(self, record: dict[str, Any], codec: Codec) -> None:
        """Refuse another run's folder; write what a model is rebuilt from."""
        record = json.loads(json.dumps(record))
        config = self.path / "config.json"
        if _last_step(self.path) is not None:
            with reading(config):
                there = json.loads(config.read_text(encoding="utf-8"))
            if found := differences(there, record):
                raise ValueError(
                    f"out: {self.path} holds a run with other settings; name another folder or remove "
                    f"it:{found}"
                )
            return
        for path, content in (
            (self.path / "tokenizer.json", codec.to_json()),
            (config, record),
        ):
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def save(self, trainer: LanguageTrainer) -> None:
        step = trainer.step
        with replacing(self.path / f"training-{step}.pt") as temporary:
            torch.save(trainer.state_dict(), temporary)
        self._write_weights(trainer.model, step)
        for kind in ("model", "training"):
            for path in self.path.glob(f"{kind}-*"):
                if path.stem != f"{kind}-{step}":
                    path.unlink(missing_ok=True)

    def _write_weights(self, model: Transformer, step: int) -> None:
        with replacing(self.path / f"model-{step}.safetensors") as temporary:
            temporary.write_bytes(_safetensors().save(model.state_dict()))

    def load(self, trainer: LanguageTrainer) -> None:
        """Go on from the last checkpoint, if there is one."""
        for left in self.path.glob(".*.tmp"):  # by a process that was killed as it saved
            left.unlink(missing_ok=True)
        if (step := _last_step(self.path)) is None:
            return
        _load_weights(trainer.model, self.path, step)
        path = self.path / f"training-{step}.pt"
        with reading(path):
            trainer.load_state_dict(
                torch.load(path, map_location=trainer.settings.device, weights_only=True)
            )

    @contextmanager
    def log(self, steps: int):
        """Yield a function that adds a line to log.csv, after those of the first `steps` steps."""
        path = self.path / "log.csv"
        there = path.read_text(encoding="utf-8").splitlines()[1 : steps + 1] if steps else []
        with replacing(path) as temporary:
            lines = "".join(f"{line}\n" for line in (",".join(COLUMNS), *there))
            temporary.write_text(lines, encoding="utf-8", newline="\n")
        with open(path, "a", encoding="utf-8", newline="", buffering=1) as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            yield writer.writerow


def _last_step(folder: Path) -> int | None:
    """The step of the last whole checkpoint of a folder."""
    steps = [path.stem.partition("-")[2] for path in folder.glob("model-*.safetensors")]
    return max((int(step) for step in steps if step.isdecimal()), default=None)


def _load_weights(model: Transformer, folder: Path, step: int) -> None:
    path = folder / f"model-{step}.safetensors"
    safetensors, device = _safetensors(), next(model.parameters()).device
    with reading(path):
        model.load_state_dict(safetensors.load_file(path, device=str(device)))


def _safetensors():
    return optional_import("safetensors.torch", "language", "keeping a model")
