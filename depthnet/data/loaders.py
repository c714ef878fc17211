"""Real data, none of it downloaded."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import platform
import sysconfig
import zipfile
import zlib
from pathlib import Path

import numpy as np

from depthnet._checks import one_of, optional_import
from depthnet.data.dataset import Arrays, Dataset, NextByte

NAMES = ("text", "digits", "cifar10", "mnist")


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """A data set by name, or from a file.

    Args:
        name: `text`, the next byte of the Python standard library's sources on this machine (ASCII);
            `digits`, scikit-learn's handwritten digits; `cifar10`, `mnist`, their standard files in
            `data_dir`; or a path: `.npz` with arrays x and y (and x_test, y_test, if there are any),
            `.txt` with any text.
        data_dir: the folder of cifar10's or mnist's files.

    Raises:
        ValueError: the name is unknown, or the files are missing or not what they should be.
        ImportError: a package is missing; the message names depthnet's extra that brings it.
    """
    path = Path(name)
    if path.suffix in (".npz", ".txt"):
        if not path.is_file():
            raise ValueError(f"data: there is no file {name}")
        return npz(path) if path.suffix == ".npz" else text_file(path)
    one_of("data", name, [*NAMES, "PATH.npz", "PATH.txt"])
    if name in ("cifar10", "mnist"):
        if data_dir is None:
            raise ValueError(f"data_dir: {name} is read from a folder of its files; name it")
        folder = Path(data_dir).expanduser()
        if not folder.is_dir():
            raise ValueError(f"data_dir: there is no folder {folder}")
        return cifar10(folder) if name == "cifar10" else mnist(folder)
    if data_dir is not None:
        raise ValueError(f"data_dir: data={name} reads no folder")
    return standard_library_text() if name == "text" else digits()


def standard_library_text() -> NextByte:
    """The sources of the Python standard library, without its tests, in order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not skipped.intersection(path.relative_to(root).parts[:-1])
    )
    raw = np.frombuffer(b"".join(path.read_bytes() for path in files), np.uint8)
    if len(raw) < 100_000:
        raise ValueError(
            f"data: the standard library at {root} has only {len(raw)} bytes of sources (a zipped or "
            "stripped Python?); give a PATH.txt instead"
        )
    return _next_byte(raw[raw < 128], {"name": "text", "python": platform.python_version()})


def text_file(path: Path) -> NextByte:
    raw = np.frombuffer(_read(path), np.uint8)
    if len(raw) < 1000:
        raise ValueError(f"data: {path} has {len(raw)} bytes; 1000 are the least to train on")
    return _next_byte(raw, {"name": path.name})


def _next_byte(text: np.ndarray, source: dict) -> NextByte:
    digest = hashlib.sha256(text.tobytes()).hexdigest()
    symbols = 128 if text.max() < 128 else 256
    return NextByte(text, symbols, source={**source, "bytes": len(text), "sha256": digest})


def digits() -> Arrays:
    """1797 images of 8 x 8; every fifth is in the test set."""
    bunch = optional_import("sklearn.datasets", "data", "data=digits").load_digits()
    test = np.arange(len(bunch.data)) % 5 == 4
    return Arrays.standardised(
        bunch.data[~test],
        bunch.target[~test],
        bunch.data[test],
        bunch.target[test],
        {"name": "digits"},
    )


class _ArraysOnly(pickle.Unpickler):
    """An unpickler for the files of CIFAR-10, which hold dictionaries of numpy arrays."""

    allowed = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def cifar10(folder: Path) -> Arrays:
    """The `python version` of CIFAR-10: data_batch_1 .. data_batch_5 and test_batch."""
    if (folder / "cifar-10-batches-py").is_dir():
        folder = folder / "cifar-10-batches-py"

    def read(name):
        try:
            with open(folder / name, "rb") as file:
                content = _ArraysOnly(file, encoding="bytes").load()
            x, y = np.asarray(content[b"data"]), np.asarray(content[b"labels"])
        except (OSError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
            raise ValueError(
                f"data_dir: {folder / name} is not a readable CIFAR-10 batch ({error})"
            ) from error
        if x.ndim != 2 or x.shape[1] != 3072 or len(x) != len(y):
            raise ValueError(
                f"data_dir: {folder / name} should hold (N, 3072) data and N labels, got {x.shape} "
                f"and {y.shape}"
            )
        return x, y

    batches = [read(f"data_batch_{number}") for number in range(1, 6)]
    x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return Arrays.standardised(x, y, *read("test_batch"), {"name": "cifar10", "images": len(x)})


def mnist(folder: Path) -> Arrays:
    """The IDX files of MNIST (or Fashion-MNIST), plain or gzipped."""

    def read(name, dimensions):
        found = [folder / f"{name}{end}" for end in ("", ".gz")]
        path = next((path for path in found if path.is_file()), None)
        if path is None:
            raise ValueError(f"data_dir: {folder} has no file {name} (or {name}.gz)")
        raw = _read(path)
        header = 4 + 4 * dimensions
        if len(raw) >= header and raw[:4] == bytes([0, 0, 8, dimensions]):
            shape = np.frombuffer(raw[4:header], ">u4").astype(np.int64)
            if len(raw) == header + shape.prod():
                return np.frombuffer(raw[header:], np.uint8).reshape(shape)
        raise ValueError(f"data_dir: {path} is not an IDX file of {dimensions} dimensions")

    x, x_test = (read(f"{part}-images-idx3-ubyte", 3) for part in ("train", "t10k"))
    y, y_test = (read(f"{part}-labels-idx1-ubyte", 1) for part in ("train", "t10k"))
    if len(x) != len(y) or len(x_test) != len(y_test):
        raise ValueError(f"data_dir: images and labels in {folder} differ in number")
    return Arrays.standardised(x, y, x_test, y_test, {"name": "mnist", "images": len(x)})


def npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"data: {path} is not a readable .npz file of arrays ({error})") from error
    missing = {"x", "y"} - set(arrays)
    if missing:
        raise ValueError(f"data: {path} lacks the array {' and '.join(sorted(missing))}")
    x, y = np.atleast_1d(arrays["x"]), np.atleast_1d(arrays["y"])
    x_test, y_test = arrays.get("x_test", x[:0]), arrays.get("y_test", y[:0])
    for a, b, names in ((x, y, "x and y"), (x_test, y_test, "x_test and y_test")):
        fits = a.ndim >= 2 and a.shape[1:] == x.shape[1:] and a.dtype.kind in "buif"
        if not fits or b.ndim != 1 or len(a) != len(b) or b.dtype.kind not in "iu":
            raise ValueError(
                f"data: {names} in {path} should be N real inputs and N integer labels, got "
                f"{a.shape} {a.dtype} and {b.shape} {b.dtype}"
            )
    with np.errstate(over="ignore"):
        finite = all(np.isfinite(a.astype(np.float32)).all() for a in (x, x_test))
    labels = np.concatenate([y, y_test])
    if not finite or x.size == 0 or labels.min() < 0 or not len(np.unique(labels)) >= 2:
        raise ValueError(
            f"data: {path} should hold inputs that are finite in float32, and labels from 0, of two "
            "classes at least"
        )
    if labels.max() >= 65_536:
        raise ValueError(f"data: {path} has the label {labels.max()}; 65535 is the greatest")
    return Arrays.standardised(x, y, x_test, y_test, {"name": path.name, "rows": len(x)})


def _read(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return file.read()
    except (OSError, EOFError) as error:
        raise ValueError(f"data: {path} cannot be read ({error})") from error
