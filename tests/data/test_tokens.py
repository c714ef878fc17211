import hashlib
import json
import os
import re
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from depthnet import data
from depthnet.data import loaders
from depthnet.data.tokens import Bytes, decode_stream

TEXT = "def café(x):\n    return x + 1  # naïve\n\n\n" * 200


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def make(source, tokenizer=None, *, folder, **options):
    return data.tokens(source, tokenizer, folder=folder / "tokens", **options)


def test_text_is_the_standard_library(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokens = data.tokens()
    text = loaders.standard_library_text()
    assert tokens.path.parent == tmp_path / "depthnet" / "tokens"
    assert (tokens.vocabulary, len(tokens)) == (128, len(text.text))
    assert tokens.source == {
        **text.source,
        "tokenizer": "bytes",
        "vocabulary": 128,
        "tokens": len(text.text),
    }
    assert tokens.path.read_bytes() == text.text.tobytes()


@pytest.mark.parametrize("tokenizer", [None, "bpe:300"])
def test_tokens_are_the_text(file, tokenizer, tmp_path):
    tokens = make(file, tokenizer, folder=tmp_path)
    stored = np.fromfile(tokens.path, np.uint16 if tokenizer else np.uint8)
    assert len(stored) == len(tokens)
    assert tokens.decode(stored.tolist()) == TEXT
    assert tokens.decode(tokens.encode("naïve fu\n")) == "naïve fu\n"
    assert tokens.encode("a").dtype == torch.int64
    assert tokens.source["sha256"] == hashlib.sha256(tokens.path.read_bytes()).hexdigest()
    assert tokens.source["bytes"] == len(TEXT.encode())
    assert stored.max() < tokens.vocabulary <= (300 if tokenizer else 256)
    if tokenizer:
        assert len(tokens) < len(TEXT.encode()) / 2


def test_the_vocabulary_of_bytes(tmp_path):
    for content, vocabulary in ((b"\x7f" * 10, 128), (b"\x80" * 10, 256)):
        path = tmp_path / f"{vocabulary}.txt"
        path.write_bytes(content)
        assert make(path, folder=tmp_path).vocabulary == vocabulary
    ascii_only = make(tmp_path / "128.txt", folder=tmp_path)
    with pytest.raises(ValueError, match="text must be ASCII"):
        ascii_only.encode("é")


def test_batches(file, tmp_path):
    tokens = make(file, "bpe:300", folder=tmp_path)
    x, y = tokens.batch(1, 2, 16, 10)
    assert (x.shape, y.shape, x.dtype, y.dtype) == ((16, 10), (16, 10), torch.int64, torch.int64)
    assert torch.equal(x[:, 1:], y[:, :-1])
    x2, y2 = tokens.batch(1, 2, 16, 10)
    assert torch.equal(x, x2)
    assert torch.equal(y, y2)
    for other in (tokens.batch(2, 2, 16, 10), tokens.batch(1, 3, 16, 10)):
        assert not torch.equal(x, other[0])


def test_training_and_validation_are_apart_and_all(tmp_path):
    """Tokens 0 .. 99, each once: batches reach all of 0 .. 79 and no other, validation the rest."""
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(100)))
    tokens = make(path, folder=tmp_path, validation=0.2)
    x, y = tokens.batch(0, 0, 2000, 3)
    assert set(x.flatten().tolist()) | set(y.flatten().tolist()) == set(range(80))
    batches = list(tokens.validation(4, 3))
    assert [len(x) for x, _ in batches] == [4, 2]
    assert torch.cat([x for x, _ in batches]).flatten().tolist() == list(range(80, 98))
    assert torch.cat([y for _, y in batches]).flatten().tolist() == list(range(81, 99))
    with pytest.raises(
        ValueError, match="length must be below the number of training tokens, 80, got 80"
    ):
        tokens.batch(0, 0, 1, 80)
    with pytest.raises(ValueError, match="number of validation tokens, 20, got 20"):
        next(tokens.validation(1, 20))


def test_a_folder(tmp_path):
    root = tmp_path / "root"
    for name, content in (
        ("b.txt", b"second"),
        ("a/c.txt", b"first,"),
        ("a/image.png", b"\x89PNG\0\0"),
        ("empty", b""),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    tokens = make(root, folder=tmp_path)
    assert tokens.path.read_bytes() == b"first,second"
    found = {key: tokens.source[key] for key in ("name", "files", "skipped", "bytes")}
    assert found == {"name": "root", "files": 3, "skipped": 1, "bytes": 12}
    subwords = make(root, "bpe:256", folder=tmp_path)  # which reads the files twice
    assert subwords.source["skipped"] == 1


def test_files_are_made_once(file, tmp_path):
    first = make(file, "bpe:300", folder=tmp_path)
    made, read = first.path.stat(), file.stat()
    # Of the same size and age, but other text: the source is not read again.
    file.write_text(TEXT.replace("x", "y"), encoding="utf-8")
    os.utime(file, ns=(read.st_atime_ns, read.st_mtime_ns))
    again = make(file, "bpe:300", folder=tmp_path)
    assert (again.path, again.path.stat().st_ino) == (first.path, made.st_ino)
    assert again.source == first.source
    assert make(file, "bpe:299", folder=tmp_path).path != first.path
    assert make(file, folder=tmp_path).path != first.path
    os.utime(file)
    assert make(file, "bpe:300", folder=tmp_path).path != first.path


def test_equal_content_gives_equal_tokens(file, tmp_path):
    """Whenever it is made: the training of a BPE has no chance in it."""
    one = make(file, "bpe:300", folder=tmp_path / "one")
    os.utime(file, (0, 0))
    two = make(file, "bpe:300", folder=tmp_path / "two")
    assert one.path.name != two.path.name
    assert one.path.read_bytes() == two.path.read_bytes()
    assert one.source == two.source


@pytest.mark.parametrize("damage", ["truncated", "changed", "no record", "half a record", "older"])
def test_damaged_files_are_made_anew(damage, file, tmp_path):
    path = make(file, folder=tmp_path).path
    content, record = path.read_bytes(), path.with_suffix(".json")
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "changed":
        path.write_bytes(content[:-1] + b"?")
    elif damage == "no record":
        record.unlink()
    elif damage == "half a record":
        record.write_text(record.read_text()[:50])
    else:
        record.write_text(json.dumps({**json.loads(record.read_text()), "format": 0}))
    with pytest.raises(ValueError, match="are not a whole file of tokens"):
        data.tokens(path)
    assert make(file, folder=tmp_path).path == path
    assert path.read_bytes() == content
    assert len(data.tokens(path)) == len(content)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/mem, which cannot be read")
def test_nothing_is_left_of_a_write_that_fails(file, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.txt").write_bytes(b"abc")
    (root / "b.txt").symlink_to("/proc/self/mem")
    with pytest.raises(ValueError, match=r"source: .*b\.txt cannot be read \(\[Errno 5\]"):
        make(root, folder=tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_a_file_of_tokens(file, tmp_path):
    made = make(file, "bpe:300", folder=tmp_path)
    opened = data.tokens(made.path, validation=0)
    assert opened.source == made.source
    assert torch.equal(opened.encode(TEXT), made.encode(TEXT))
    with pytest.raises(ValueError, match=r"tokenizer: .* has its own; got 'bpe:300'"):
        data.tokens(made.path, "bpe:300")


def test_a_tokenizer_of_ones_own(file, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<?>": 0, "return": 7}, "<?>"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.enable_truncation(2)
    own.enable_padding(length=5)
    path = tmp_path / "tokenizer.json"
    own.save(str(path))
    tokens = make(file, path, folder=tmp_path)
    assert tokens.vocabulary == 8
    assert tokens.source["tokenizer"] == "tokenizer.json"
    assert tokens.encode("x return return x").tolist() == [0, 7, 7, 0]
    assert np.fromfile(tokens.path, np.uint8).tolist().count(7) == TEXT.count("return")


def test_bytes_need_no_memory_of_the_files_size(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"0123456789abcdef" * 2**19)  # 8 MiB
    tracemalloc.start()
    tokens = make(path, folder=tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tokens) == 2**23
    assert peak < 2**20


@given(st.binary(max_size=40), st.binary(max_size=5))
def test_streams_of_bytes_are_the_text(content, more):
    """Of any bytes, UTF-8 or not, after a text of any kind."""
    decode = Bytes(256).decode
    assert "".join(decode_stream(decode, content)) == content.decode(errors="replace")
    before = more.decode(errors="ignore")
    whole = decode([*before.encode(), *content])
    assert before + "".join(decode_stream(decode, content, before.encode())) == whole


def test_streams_show_whole_characters_at_once(file, tmp_path):
    pieces = list(decode_stream(Bytes(256).decode, "aé€😀".encode()))
    assert pieces == ["a", "é", "€", "😀", ""]
    tokens = make(file, "bpe:300", folder=tmp_path)
    ids = tokens.encode("naïve 😀 café").tolist()
    for cut in range(len(ids)):
        before = tokens.decode(ids[:cut])
        if not before.endswith("\ufffd"):
            streamed = decode_stream(tokens.codec.decode, ids[cut:], ids[:cut])
            assert before + "".join(streamed) == "naïve 😀 café"


def test_errors(file, tmp_path):
    for arguments, options, words in (
        (["nothing"], {}, "source: there is no file or folder nothing"),
        ([file, "bpe:100"], {}, "bpe:N needs a number N of at least 256, got 'bpe:100'"),
        ([file, "bpe:x"], {}, "bpe:N needs a number"),
        ([file, file], {}, "tokenizer must be None, 'bpe:N' or the path of a tokenizer.json"),
        ([file, "gpt2"], {}, "gpt2 cannot be read"),
        ([file], {"validation": 1}, "validation must be at least 0 and below 1, got 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            make(*arguments, folder=tmp_path, **options)
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"source: empty\.txt has no text"):
        make(tmp_path / "empty.txt", folder=tmp_path)
    with pytest.raises(ValueError, match=r"folder: .* cannot be written"):
        data.tokens(file, folder=file / "inside")


def test_the_missing_package_is_named(file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'depthnet\[language\]'"):
        make(file, "bpe:300", folder=tmp_path)
    assert make(file, folder=tmp_path).vocabulary == 256
