"""Studies end to end: identities, divergence, stopping, killing, resuming."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import depthnet
from depthnet import cli, data
from depthnet.sweep import transfer
from depthnet.sweep.store import Store

SMALL = ["--width", "16", "--steps", "10", "--batch", "8", "--log2-lr", "-9", "-6", "--seeds", "2"]

ONE_JOB = ["transfer", *SMALL, "--depths", "4", "--parametrizations", "ode"]


def settings(**changes):
    small = {"width": 16, "steps": 10, "batch": 8, "log2_lr": (-9.0, -6.0), "depths": (4, 16)}
    return transfer.TransferSettings(**{**small, **changes})


def run(tmp_path, chosen, **options):
    source = data.load(chosen.data, chosen.data_dir)
    store = Store(tmp_path, transfer.record(chosen, source))
    return list(transfer.run(chosen, store, source, **options))


def test_half_zero_is_depth_mup_displaced_by_an_octave_at_four_times_the_base_depth(tmp_path):
    results = run(tmp_path, settings(parametrizations=("depth_mup", "half_zero")))
    losses = {(r.job.parametrization.name, r.job.depth): r.losses for r in results}
    assert np.array_equal(losses["depth_mup", 4], losses["half_zero", 4])
    for seed in (0, 1):  # 4 learning rates each: half_zero's first three are depth_mup's last three
        start = 4 * seed
        shifted = losses["depth_mup", 16][:, start + 1 : start + 4]
        # To rounding: a vendor's batched GEMM may round by the place in the batch.
        np.testing.assert_allclose(
            losses["half_zero", 16][:, start : start + 3], shifted, rtol=1e-5
        )
    assert losses["depth_mup", 16].std(1).max() > 0


def test_a_member_is_a_network_trained_alone(tmp_path):
    chosen = settings(parametrizations=("depth_mup",), depths=(4,))
    (result,) = run(tmp_path, chosen)
    source = data.load("text")
    member = 6  # log2_lr = -7, seed 1
    model = depthnet.ResNet(
        *(source.in_features, 16, 4, source.out_features),
        active_features=8,
        base_width=16,
        base_depth=4,
        generator=torch.Generator().manual_seed(1),
    )
    groups = model.param_groups("adamw")
    for group in groups:
        group["lr"] = 2**-7
    optimizer = depthnet.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    for step in range(10):
        x, y = source.batch(1, step, 8)
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert (result.job.log2_lr[member], result.job.seed[member]) == (-7, 1)
    np.testing.assert_allclose(result.losses[:, member], losses, rtol=1e-4)


def test_sweep_all_moves_every_learning_rate(tmp_path):
    for sweep, same in (("hidden", True), ("all", False)):
        chosen = settings(sweep=sweep, parametrizations=("mup",), depths=(4,))
        population = transfer.trainer(chosen, transfer.jobs(chosen)[0], data.load("text"))
        population.train_step()
        weight = population.model.output.weight.detach()  # moved by the first step alone
        assert torch.equal(weight[0], weight[1]) is same


def test_other_data_and_activations(tmp_path):
    chosen = settings(
        data="digits", activation="relu", parametrizations=("0.75,0.25",), depths=(4,)
    )
    (result,) = run(tmp_path, chosen)
    assert np.isfinite(result.losses).all()


def test_finished_work_is_not_repeated(tmp_path, monkeypatch):
    chosen = settings(parametrizations=("ode",))
    first = run(tmp_path, chosen)
    monkeypatch.setattr(transfer, "trainer", None)  # a second training would fail
    again = run(tmp_path, chosen)
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.losses, b.losses)
        assert a.seconds == b.seconds


def test_stopping_between_steps_and_going_on(tmp_path):
    chosen = settings(parametrizations=("ode",))
    expected = run(tmp_path / "straight", chosen)
    results = None
    while results is None:  # three steps at a time
        steps = iter(range(3))
        try:
            results = run(tmp_path / "stopped", chosen, stop=lambda: next(steps, None) is None)  # noqa: B023
        except transfer.Interrupted:
            assert (tmp_path / "stopped" / "checkpoint.pt").exists()
    for a, b in zip(expected, results, strict=True):
        assert np.array_equal(a.losses, b.losses)
    assert not (tmp_path / "stopped" / "checkpoint.pt").exists()


def command(out, *more):
    arguments = ["transfer", *SMALL, "--depths", "4", "8", "--parametrizations", "depth_mup", "ode"]
    return [sys.executable, "-m", "depthnet.cli", *arguments, "--out", str(out), *more]


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_study_ends_with_the_same_results(tmp_path, signal_number):
    # One thread each: how torch splits a sum over threads is not ours to fix.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    more = ["--steps", "400"]
    subprocess.run(
        command(tmp_path / "straight", *more), check=True, env=environment, capture_output=True
    )
    expected = (tmp_path / "straight" / "results.csv").read_bytes()
    random.seed(0)
    for _ in range(3):
        process = subprocess.Popen(
            command(tmp_path / "killed", *more),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert b"populations" in process.stdout.readline()  # imports are over, training begins
        time.sleep(random.uniform(0.0, 2.0))
        process.send_signal(signal_number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode in (-signal_number, 130, 0), stderr.decode()
        if process.returncode == 130:
            assert b"stopped" in stderr
    subprocess.run(
        command(tmp_path / "killed", *more), check=True, env=environment, capture_output=True
    )
    assert (tmp_path / "killed" / "results.csv").read_bytes() == expected


# ---- the command ----


def test_the_files_of_a_study(tmp_path, capsys):
    arguments = ["transfer", *SMALL, "--depths", "4", "8", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    out = tmp_path / "out"
    lines = (out / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 2 * 4 * 2 * 3
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["parametrizations"]) == ["depth_mup", "half_zero", "ode", "standard"]
    record = summary["parametrizations"]["depth_mup"]
    assert (record["alpha"], record["gamma"]) == (0.5, 0.5)
    last = record["slices"]["last fifth"]
    assert last["steps"] == [8, 10]
    assert set(last["depths"]) == {"4", "8"}
    assert last["depths"]["4"]["regret"] == 0
    assert set(summary["seconds"]) == {"data", "forward", "backward", "optimizer"}
    assert summary["settings"]["source"]["python"]
    assert (out / "transfer.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    printed = capsys.readouterr().out
    assert "depth_mup" in printed
    assert "(0.5, 0.5)" in printed
    assert "Wrote results.csv, summary.json, transfer.png" in printed


def test_everything_diverging_is_drawn_and_told(tmp_path, capsys):
    arguments = ["transfer", "--width", "16", "--steps", "10", "--batch", "8", "--seeds", "1"]
    arguments += ["--log2-lr", "50", "52", "--sweep", "all", "--depths", "4", "8"]
    assert cli.main([*arguments, "--parametrizations", "standard", "--out", str(tmp_path)]) == 0
    assert "every learning rate diverges at depth 4, 8" in " ".join(capsys.readouterr().out.split())
    rows = (tmp_path / "results.csv").read_text().splitlines()[1:]
    assert all(row.endswith("inf,1") for row in rows)
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)


def test_another_study_in_the_same_folder_is_refused(tmp_path, capsys):
    chosen = [*ONE_JOB, "--out", str(tmp_path)]
    assert cli.main(chosen) == 0
    assert cli.main([*chosen, "--steps", "20"]) == 2
    error = capsys.readouterr().err
    assert "holds a study with other settings" in error
    assert "steps: 10 there, 20 now" in error


def test_jobs_without_their_settings_are_refused(tmp_path, capsys):
    chosen = [*ONE_JOB, "--out", str(tmp_path)]
    assert cli.main(chosen) == 0
    settings_file = tmp_path / "settings.json"
    for content in (None, "[1]", "{"):
        settings_file.unlink() if content is None else settings_file.write_text(content)
        assert cli.main(chosen) == 2
        assert "settings.json is not its settings" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["empty", "truncated", "garbage", "other"])
def test_broken_files_are_named(tmp_path, capsys, content):
    chosen = [*ONE_JOB, "--out", str(tmp_path)]
    assert cli.main(chosen) == 0
    path = tmp_path / "jobs" / "ode-L4.npz"
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "truncated": whole[:200], "garbage": b"x" * 500}.get(content, b"")
    )
    if content == "other":
        np.savez(path, losses=np.zeros((3, 3)))
    assert cli.main(chosen) == 2
    error = capsys.readouterr().err
    assert "ode-L4" in error
    assert "remove it" in error
    path.unlink()
    (tmp_path / "checkpoint.pt").write_bytes(b"broken")
    assert cli.main(chosen) == 2
    assert "checkpoint.pt is broken" in capsys.readouterr().err
    (tmp_path / "checkpoint.pt").unlink()
    assert cli.main(chosen) == 0


def test_a_start_that_trained_nothing_does_not_block_the_folder(tmp_path):
    source = data.load("text")
    Store(tmp_path, transfer.record(settings(width=8), source))
    assert len(run(tmp_path, settings(parametrizations=("ode",), depths=(4,)))) == 1


def test_changed_data_are_noticed(tmp_path, capsys):
    path = tmp_path / "d.npz"
    chosen = [*ONE_JOB, "--data", str(path), "--out", str(tmp_path / "out")]
    rng = np.random.default_rng(0)
    np.savez(path, x=rng.normal(size=(20, 3)), y=np.arange(20) % 2)
    assert cli.main(chosen) == 0
    np.savez(path, x=rng.normal(size=(20, 3)), y=np.arange(20) % 2)
    assert cli.main(chosen) == 2
    assert "source:" in capsys.readouterr().err


def test_odd_names_and_negative_exponents(tmp_path, capsys):
    text = tmp_path / "a[bold]$x^y^z$.txt"
    text.write_text("to be or not to be " * 100)
    out = tmp_path / "o[/b]"
    chosen = ["transfer", *SMALL, "--depths", "4", "--parametrizations", "-0.5,1.5", "0.5,0.5"]
    assert cli.main([*chosen, "--data", str(text), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "-0.5,1.5" in printed
    assert "a[bold]" in printed
    assert (out / "transfer.png").exists()


def test_two_runs_at_once_are_refused(tmp_path):
    chosen = settings()
    source = data.load("text")
    with pytest.raises(ValueError, match="another process is running the study"):
        _first, _second = (Store(tmp_path, transfer.record(chosen, source)) for _ in range(2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--depths", "0"], "depths must be at least 1, got 0"),
        (["--depths", "-4"], "depths must be at least 1, got -4"),
        (["--depths", "4", "4"], "depths must be different"),
        (["--width", "0"], "width must be at least 1"),
        (["--steps", "3"], "steps must be at least 5"),
        (["--base-depth", "5"], "base_depth must be one of depths"),
        (["--parametrizations", "depthmup"], "did you mean 'depth_mup'"),
        (["--activation", "rellu"], "did you mean 'relu'"),
        (["--log2-lr", "-4", "-13"], "log2_lr must be two numbers, the lower first"),
        (["--data", "cifar10"], "data_dir: cifar10 is read from a folder"),
        (["--data", "mnist", "--data-dir", "/nowhere"], "data_dir: there is no folder /nowhere"),
        (["--log2-lr", "-9", "-8.5"], "log2_lr must be whole steps of 1/1 apart"),
        (["--device", "meta"], "device: 'meta' cannot be used"),
        (["--parametrizations", "2000,0", "--width", "8"], "depthnet transfer:"),
        (["--device", "quantum"], "device: 'quantum' cannot be used"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(tmp_path, capsys, arguments, words):
    assert cli.main(["transfer", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1


def test_an_out_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "deeper", "/proc/nowhere"):
        assert cli.main(["transfer", "--out", str(out)]) == 2
        assert f"out: {out} cannot be written" in capsys.readouterr().err


def test_argparse_errors_exit_with_2():
    for arguments in (
        ["transfer", "--depths", "four"],
        ["transfer", "--sweep", "some"],
        ["fly"],
        [],
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
