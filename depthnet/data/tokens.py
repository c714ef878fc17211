"""Text as a memory-mapped file of tokens."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from depthnet._checks import integer, number, optional_import
from depthnet._files import replacing
from depthnet.data.dataset import batch_indices
from depthnet.data.loaders import standard_library_text

FORMAT = 1  # of the files that are written; part of their names
SUFFIX = ".tokens"
PIECE = 2**16  # bytes of text that are encoded at once by one thread
PIECES = 16  # that are encoded side by side: a token takes some 100 bytes on the way
DIGEST_BYTES = 2**28  # up to this size a file of tokens is checked byte for byte when it is opened


def tokens(
    source: str | Path = "text",
    tokenizer: str | Path | None = None,
    *,
    folder: str | Path | None = None,
    validation: float = 0.05,
) -> Tokens:
    """The tokens of a text, from a file that is made once and then memory-mapped.

    The file is made again when its source's paths, sizes or times of change are others, or when it is
    damaged.

    Args:
        source: `text`, the Python standard library's sources on this machine (ASCII); a text file; a
            folder, of which all text files are taken, in order of their paths (binary files, those
            with a zero in their first 8000 bytes, are skipped and counted); or a file of tokens.
        tokenizer: None for bytes, a vocabulary of 128 if all are ASCII and of 256 else; `bpe:N`, a
            byte-level BPE of N tokens at most that is trained on the source; or the path of a
            tokenizer.json of the package tokenizers.  None for a file of tokens, which has its own.
        folder: for the files; None is depthnet/tokens in XDG_CACHE_HOME or ~/.cache.
        validation: the part of the tokens, the last ones, that training leaves out.

    Raises:
        ValueError: an argument is not as described, or a file cannot be read or written.
        ImportError: tokenizers is missing; the message names depthnet's extra that brings it.
    """
    if not 0 <= number("validation", validation) < 1:
        raise ValueError(f"validation must be at least 0 and below 1, got {validation}")
    path = Path(source).expanduser()
    if path.suffix == SUFFIX:
        if tokenizer is not None:
            raise ValueError(f"tokenizer: {path} has its own; got {str(tokenizer)!r}")
        if (record := _read_record(path)) is None:
            raise ValueError(f"source: {path} and {path.with_suffix('.json').name} are not a whole "
                             "file of tokens")  # fmt: skip
        return Tokens(path, record, validation)
    text, coding = _text(source), _coding(tokenizer)
    key = hashlib.sha256(json.dumps([FORMAT, text.state, coding.state]).encode()).hexdigest()
    path = _folder(folder) / f"{Path(text.source['name']).stem}-{key[:16]}{SUFFIX}"
    record = _read_record(path)
    if record is None:
        record = _write(path, text, coding)
    return Tokens(path, record, validation)


class Tokens:
    """Tokens, the last of which are kept for validation; made by `tokens`.

    Attributes:
        path: of the file. codec: what makes tokens of text and text of tokens.
        source: where they come from; it is recorded with every result.
    """

    def __init__(self, path: Path, record: dict[str, Any], validation: float):
        self.path, self.source = path, record["source"]
        self.codec = codec(self.source["vocabulary"], record["tokenizer"])
        self._all = np.memmap(path, record["dtype"], mode="r")
        training = len(self._all) - int(validation * len(self._all))
        self._training, self._validation = self._all[:training], self._all[training:]

    @property
    def vocabulary(self) -> int:
        """The number of different tokens that there can be."""
        return self.codec.vocabulary

    def __len__(self) -> int:
        """The number of tokens, training and validation."""
        return len(self._all)

    def batch(self, seed: int, step: int, size: int, length: int) -> tuple[Tensor, Tensor]:
        """Training batch number `step` of the stream `seed`: x, y int64 (size, length); y is x one
        token later."""
        self._check_length(length, len(self._training), "training")
        starts = batch_indices(seed, step, size, len(self._training) - length)
        return _windows(self._training, starts, length)

    def validation(self, size: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The tokens for validation in order, as batches x, y int64 (size, length); the last has fewer
        lines, and what does not fill a line is left out."""
        integer("size", size, 1)
        self._check_length(length, len(self._validation), "validation")
        starts = np.arange(0, len(self._validation) - length, length)
        for first in range(0, len(starts), size):
            yield _windows(self._validation, starts[first : first + size], length)

    def encode(self, text: str) -> Tensor:
        """The tokens of a text, int64 (N,).

        Raises:
            ValueError: the vocabulary is ASCII and the text is not.
        """
        return torch.from_numpy(self.codec.encode(text).astype(np.int64))

    def decode(self, ids: Tensor | Iterable[int]) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.codec.decode([int(token) for token in ids])

    def _check_length(self, length: int, available: int, part: str) -> None:
        if integer("length", length, 1) >= available:
            raise ValueError(
                f"length must be below the number of {part} tokens, {available}, got {length}"
            )


def _windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    window = tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)
    return tuple(torch.from_numpy(np.ascontiguousarray(part))
                 for part in (window[:, :-1], window[:, 1:]))  # fmt: skip


# ---- text and tokens ----


@dataclass(frozen=True)
class Bytes:
    """Bytes as tokens. vocabulary: 128 (ASCII) or 256."""

    vocabulary: int

    def encode(self, text: str) -> np.ndarray:
        if self.vocabulary == 128 and not text.isascii():
            raise ValueError(f"text must be ASCII, as what the model was trained on, got {text!r}")
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def to_json(self) -> None:
        return None


class Subwords:
    """The tokens of a tokenizers.Tokenizer."""

    def __init__(self, tokenizer):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocabulary = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> np.ndarray:
        return next(self.encode_all([text]))

    def encode_all(self, texts: list[str]) -> Iterator[np.ndarray]:
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield np.array(encoding.ids, np.uint32)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def to_json(self) -> dict[str, Any]:
        return json.loads(self._tokenizer.to_str())


Codec = Bytes | Subwords


def codec(vocabulary: int, tokenizer: dict[str, Any] | None) -> Codec:
    """The codec that was `to_json` once; None is Bytes."""
    if tokenizer is None:
        return Bytes(vocabulary)
    return Subwords(_tokenizers().Tokenizer.from_str(json.dumps(tokenizer)))


def decode_stream(
    decode: Callable[[list[int]], str], ids: Iterable[int], after: Iterable[int] = ()
) -> Iterator[str]:
    """The text of tokens that follow others, in pieces, each as soon as its last character is complete;
    at the end what is left, which may be nothing."""
    shown, pending = list(after), []  # decoders may treat the start of a text in a way of its own
    before = decode(shown)
    for token in ids:
        pending.append(token)
        text = decode([*shown, *pending])
        if not text.endswith("\ufffd"):
            yield text[len(before) :]
            shown, pending = pending, []
            before = decode(shown)
    yield decode([*shown, *pending])[len(before) :]


def _tokenizers():
    return optional_import("tokenizers", "language", "a tokenizer")


# ---- sources ----


@dataclass(frozen=True)
class _Text:
    """source: what is recorded of it. state: tells, as JSON, whether it has changed.
    pieces: its bytes, in pieces of at most PIECE; at the end it completes `source`."""

    source: dict[str, Any]
    state: Any
    pieces: Callable[[], Iterator[bytes]]


def _text(source: str | Path) -> _Text:
    if source == "text":
        library = standard_library_text()
        content = memoryview(library.text)
        return _Text(
            library.source,
            library.source["sha256"],
            lambda: (bytes(content[at : at + PIECE]) for at in range(0, len(content), PIECE)),
        )
    path = Path(source).expanduser().resolve()
    if path.is_file():
        return _files({"name": path.name}, path, [path])
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return _files({"name": path.name, "files": len(files)}, path, files)
    raise ValueError(f"source: there is no file or folder {source}, and it is not 'text'")


def _files(source: dict[str, Any], root: Path, files: list[Path]) -> _Text:
    def pieces() -> Iterator[bytes]:
        size = skipped = 0
        for path in files:
            try:
                with open(path, "rb") as file:
                    if root != path and b"\0" in file.read(8000):
                        skipped += 1
                        continue
                    file.seek(0)
                    while piece := file.read(PIECE):
                        size += len(piece)
                        yield piece
            except OSError as error:
                raise ValueError(f"source: {path} cannot be read ({error})") from error
        source["bytes"] = size
        if root not in files:
            source.update(files=len(files) - skipped, skipped=skipped)

    try:
        state = [
            [str(path), (stat := path.stat()).st_size, stat.st_mtime_ns] for path in (root, *files)
        ]
    except OSError as error:
        raise ValueError(f"source: {root} cannot be read ({error})") from error
    return _Text(source, state, pieces)


# ---- how they are encoded ----


@dataclass(frozen=True)
class _Coding:
    """name: for people. state: tells, as JSON, which tokens come out.
    codec: makes the codec, of a source where it is trained; None for bytes."""

    name: str
    state: Any
    codec: Callable[[_Text], Subwords] | None


def _coding(tokenizer: str | Path | None) -> _Coding:
    if tokenizer is None:
        return _Coding("bytes", "bytes", None)
    kind, _, size = str(tokenizer).partition(":")
    if kind == "bpe":
        if not size.isdecimal() or int(size) < 256:
            raise ValueError(
                f"tokenizer: bpe:N needs a number N of at least 256, got {tokenizer!r}"
            )
        return _Coding(str(tokenizer), ["bpe", int(size)], lambda text: _train_bpe(text, int(size)))
    path = Path(tokenizer).expanduser()
    try:
        content = path.read_text(encoding="utf-8")
        found = Subwords(_tokenizers().Tokenizer.from_str(content))
    except ImportError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception
        raise ValueError(
            f"tokenizer must be None, 'bpe:N' or the path of a tokenizer.json; {tokenizer} cannot be "
            f"read ({error})"
        ) from error
    return _Coding(path.name, hashlib.sha256(content.encode()).hexdigest(), lambda text: found)


def _train_bpe(text: _Text, size: int) -> Subwords:
    package = _tokenizers()
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = package.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(text.pieces()), trainer)
    return Subwords(tokenizer)


def _lines(pieces: Iterator[bytes]) -> Iterator[str]:
    """The pieces as text, cut at ends of lines where there are any, so that few words are cut."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    for piece in pieces:
        text = rest + decoder.decode(piece)
        end = text.rfind("\n") + 1 or len(text)
        yield text[:end]
        rest = text[end:]
    yield rest + decoder.decode(b"", final=True)


# ---- files ----


def _folder(folder: str | Path | None) -> Path:
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "depthnet", "tokens")
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"folder: {folder} cannot be written ({error})") from error
    return folder


def _write(path: Path, text: _Text, coding: _Coding) -> dict[str, Any]:
    """Write the tokens, then the record, which makes the two files whole."""
    digest, count, greatest = hashlib.sha256(), 0, 0
    subwords = coding.codec(text) if coding.codec else None
    dtype = np.min_scalar_type(subwords.vocabulary - 1) if subwords else np.dtype(np.uint8)
    with replacing(path, "folder") as temporary, open(temporary, "wb") as file:
        for ids in _encode(text, subwords):
            if len(ids):
                count, greatest = count + len(ids), max(greatest, int(ids.max()))
                content = ids.astype(dtype, copy=False).tobytes()
                digest.update(content)
                file.write(content)
        if not count:
            raise ValueError(f"source: {text.source['name']} has no text")
    made = subwords or Bytes(128 if greatest < 128 else 256)
    record = {
        "format": FORMAT,
        "dtype": dtype.name,
        "source": {
            **text.source,
            "tokenizer": coding.name,
            "vocabulary": made.vocabulary,
            "tokens": count,
            "sha256": digest.hexdigest(),
        },
        "tokenizer": made.to_json(),
    }
    with replacing(path.with_suffix(".json"), "folder") as temporary:
        temporary.write_text(json.dumps(record), encoding="utf-8")
    return record


def _encode(text: _Text, subwords: Subwords | None) -> Iterator[np.ndarray]:
    if subwords is None:
        yield from (np.frombuffer(piece, np.uint8) for piece in text.pieces())
        return
    lines = _lines(text.pieces())
    while some := list(islice(lines, PIECES)):
        yield from subwords.encode_all(some)


def _read_record(path: Path) -> dict[str, Any] | None:
    """The record beside a file of tokens; None if the two are not whole."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        source, size = record["source"], path.stat().st_size
        whole = record["format"] == FORMAT
        whole = whole and size == source["tokens"] * np.dtype(record["dtype"]).itemsize
        if whole and size <= DIGEST_BYTES:
            content = np.memmap(path, np.uint8, mode="r")
            whole = hashlib.sha256(content).hexdigest() == source["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None
