import gzip
import pickle
import platform
import struct

import numpy as np
import pytest
import torch

from depthnet import data


def test_text_is_the_standard_library():
    text = data.load("text")
    assert (text.in_features, text.active_features, text.out_features) == (1024, 8, 128)
    assert text.source["python"] == platform.python_version()
    assert text.source["bytes"] == len(text.text) > 1_000_000
    assert text.source == data.load("text").source
    x, y = text.batch(seed=0, step=3, size=50)
    assert (x.shape, y.shape) == ((50, 8), (50,))
    window = bytes([*(x - 128 * torch.arange(8))[0].tolist(), y[0].item()])
    assert window in text.text.tobytes()


def test_batches_are_a_function_of_seed_and_step():
    for name in ("text", "digits"):
        source = data.load(name)
        (x, y), (x2, y2) = source.batch(1, 2, 16), source.batch(1, 2, 16)
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
        for other in (source.batch(2, 2, 16), source.batch(1, 3, 16)):
            assert not torch.equal(x, other[0])


def test_digits():
    digits = data.load("digits")
    assert digits.x.shape == (1438, 64)
    assert digits.x_test.shape == (359, 64)
    assert digits.out_features == 10
    assert abs(digits.x.mean()) < 1e-5
    assert digits.x.std().item() == pytest.approx(1, abs=1e-3)


def test_text_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(128)) * 10)
    assert data.load(str(path)).out_features == 128
    path.write_text("prêt-à-porter " * 100)
    assert data.load(str(path)).out_features == 256
    path.write_text("short")
    with pytest.raises(ValueError, match=r"a\.txt has 5 bytes; 1000 are the least"):
        data.load(str(path))
    with pytest.raises(ValueError, match=r"there is no file .*b\.txt"):
        data.load(str(tmp_path / "b.txt"))


def test_npz(tmp_path):
    path = tmp_path / "a.npz"
    rng = np.random.default_rng(0)
    np.savez(path, x=rng.normal(3, 2, (20, 2, 3)), y=np.arange(20) % 4)
    arrays = data.load(str(path))
    assert (arrays.in_features, arrays.out_features, len(arrays.x_test)) == (6, 4, 0)
    for broken, words in (
        ({"x": np.ones((3, 2))}, "lacks the array y"),
        ({"x": np.ones((3, 2)), "y": np.arange(2)}, "N real inputs and N integer labels"),
        ({"x": np.ones((3, 2)), "y": np.ones(3)}, "N real inputs and N integer labels"),
        (
            {"x": np.full((3, 2), np.nan), "y": np.arange(3)},
            "inputs that are finite in float32, and labels from 0",
        ),
        (
            {"x": np.ones((3, 2)), "y": np.arange(3) - 1},
            "inputs that are finite in float32, and labels from 0",
        ),
        ({"x": np.ones((3, 0)), "y": np.arange(3)}, "inputs that are finite in float32"),
        ({"x": np.full((3, 2), 1e300), "y": np.arange(3)}, "inputs that are finite in float32"),
        ({"x": np.ones((3, 2)), "y": np.zeros(3, int)}, "two classes at least"),
        ({"x": np.ones((3, 2)), "y": np.arange(3) * 10**7}, "has the label 20000000"),
        ({"x": np.ones((3, 2)) * 1j, "y": np.arange(3)}, "N real inputs"),
        ({"x": np.array(["a", "b"]), "y": np.arange(2)}, "N real inputs"),
        ({"x": np.array(1.0), "y": np.array(1)}, "N real inputs"),
        (
            {"x": np.ones((3, 2)), "y": np.arange(3), "x_test": np.ones((1, 5)), "y_test": [1]},
            "x_test",
        ),
    ):
        np.savez(path, **broken)
        with pytest.raises(ValueError, match=words):
            data.load(str(path))
    np.savez(path, x=np.ones((3, 2)), y=np.arange(3))
    whole = path.read_bytes()
    for content in (b"no archive", b"", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a readable \.npz file"):
            data.load(str(path))
    with pytest.raises(ValueError, match=r"is not a readable \.npz file"):
        data.load(str(path))


def cifar_files(folder):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {
            b"data": rng.integers(256, size=(4, 3072), dtype=np.uint8),
            b"labels": [0, 1, 2, 9],
            b"batch_label": b"made for a test",
        }
        with open(folder / name, "wb") as file:
            pickle.dump(batch, file, protocol=2)


def test_cifar10(tmp_path):
    cifar_files(tmp_path / "cifar-10-batches-py")
    for folder in (tmp_path, tmp_path / "cifar-10-batches-py"):
        cifar = data.load("cifar10", folder)
        assert cifar.x.shape == (20, 3072)
        assert cifar.x_test.shape == (4, 3072)
        assert cifar.out_features == 10
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(
        ValueError, match=r"data_dir: .*data_batch_3 is not a readable CIFAR-10 batch"
    ):
        data.load("cifar10", tmp_path)


def test_cifar10_files_run_no_code(tmp_path):
    cifar_files(tmp_path)

    class Malicious:
        def __reduce__(self):
            return (print, ("this ran",))

    with open(tmp_path / "data_batch_1", "wb") as file:
        pickle.dump(Malicious(), file)
    with pytest.raises(ValueError, match=r"it asks for builtins\.print"):
        data.load("cifar10", tmp_path)


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist(tmp_path, zipped):
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 10)):
        for kind, array in (
            ("images-idx3", rng.integers(256, size=(count, 28, 28), dtype=np.uint8)),
            ("labels-idx1", (np.arange(count) % 10).astype(np.uint8)),
        ):
            path = tmp_path / f"{part}-{kind}-ubyte{'.gz' * zipped}"
            path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    mnist = data.load("mnist", tmp_path)
    assert mnist.x.shape == (30, 784)
    assert mnist.x_test.shape == (10, 784)
    assert mnist.y[:3].tolist() == [0, 1, 2]
    path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"data(_dir)?: .*t10k-labels-idx1"):
        data.load("mnist", tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="has no file t10k-labels-idx1-ubyte"):
        data.load("mnist", tmp_path)


def test_names_and_folders_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"data='digit'.*did you mean 'digits'"):
        data.load("digit")
    with pytest.raises(ValueError, match="data_dir: cifar10 is read from a folder"):
        data.load("cifar10")
    with pytest.raises(ValueError, match="data_dir: there is no folder"):
        data.load("mnist", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="data_dir: data=text reads no folder"):
        data.load("text", tmp_path)
