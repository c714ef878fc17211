"""Sweeps that are killed, stopped, cut off from their storage, or run beside each other: every trial is
trained, is there once, and is bit for bit the same as in an undisturbed run."""

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import optuna
import pytest
from workers import WorkerProcess

from depthnet import data
from depthnet.sweep import plan
from depthnet.sweep.ledger import Ledger, connect
from depthnet.sweep.study import SweepSettings, read_file, record
from depthnet.sweep.worker import Worker

MEMBERS = 6  # of each of the two jobs of STUDY
STUDY = {
    "width": 8,
    "depth": [2, 4],
    "log2_lr": [-9, -7, -5],
    "seeds": 2,
    "steps": 100,
    "batch": 8,
}
SEARCH = {
    "width": 8,
    "depth": [2, 4],
    "log2_lr": {"low": -10, "high": -4},
    "weight_decay": {"low": 0, "high": 0.1},
    "sampler": "tpe",
    "trials": 12,
    "round": 4,
    "seeds": 1,
    "steps": 50,
    "batch": 8,
}


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A small text that is read in a moment."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ("one", "thing", "comes", "after", "another", "and", "it", "is", "like", "the", "last")
    path.write_text(" ".join(random.Random(0).choices(words, k=2000)))
    return path


def study_file(folder, text, study=STUDY, **changes):
    path = Path(folder) / "study.yaml"
    settings = {"data": str(text), **study, **changes}
    path.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    return path


def sqlite(out):
    return f"sqlite:///{out}/study.db"


def trials(url):
    """The trials of a study named `study`; each is in Optuna's study just once."""
    rows = optuna.load_study(storage=connect(url), study_name="study").trials
    places = [(row.user_attrs["trial"]["job"], row.user_attrs["trial"]["index"]) for row in rows]
    assert len(set(places)) == len(places)
    assert all(row.state.is_finished() for row in rows)
    assert [row.number for row in rows] == list(range(len(rows)))
    found = Ledger(url, "study", None).trials()
    assert len(found) == len(rows)
    return found


def assert_same(found, wanted):
    assert [(t.network, t.member) for t in found] == [(t.network, t.member) for t in wanted]
    assert [t.diverged_at for t in found] == [t.diverged_at for t in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.losses.tobytes() == other.losses.tobytes(), (one.network, one.member)


@pytest.fixture(scope="session")
def undisturbed(text, tmp_path_factory):
    """The trials of STUDY, run from beginning to end."""
    return _undisturbed(text, tmp_path_factory, STUDY)


@pytest.fixture(scope="session")
def undisturbed_search(text, tmp_path_factory):
    return _undisturbed(text, tmp_path_factory, SEARCH)


def _undisturbed(text, tmp_path_factory, study):
    folder = tmp_path_factory.mktemp("undisturbed")
    worker = WorkerProcess(
        study_file(folder, text, study), "--out", folder / "out", log=folder / "log"
    )
    assert worker.wait() == 0, worker.printed
    return trials(sqlite(folder / "out"))


@pytest.fixture
def study(tmp_path, text):
    return study_file(tmp_path, text)


@pytest.fixture
def start(tmp_path, study):
    """Start a worker of the study; folders and logs are named by `out`."""
    processes = []

    def start(out="out", storage=None, study=study, **changes):
        places = ["--out", tmp_path / out, *(["--storage", storage] if storage else [])]
        log = tmp_path / f"log{len(processes)}"
        processes.append(WorkerProcess(study, *places, log=log, **changes))
        return processes[-1]

    yield start
    for worker in processes:
        worker.process.kill()


def one_line(printed, beginning):
    """What a command said last, which is one sentence and no traceback."""
    assert "Traceback" not in printed, printed
    last = printed.rstrip().splitlines()[-1]
    assert last.startswith(beginning), printed
    return last


def holders(url):
    """The workers that claimed something."""
    ledger = Ledger(url, "study", None)
    return {entry["worker"] for entry in ledger._entries() if "worker" in entry}


# ---- killed ----


@pytest.mark.parametrize(
    "at",
    [("create", 1), ("append", 1), ("step", 1), ("step", STUDY["steps"]), ("half a save", 2),
     ("save", 2), ("write", 4), ("write", MEMBERS + 2)],
    ids=lambda at: "-".join(map(str, at)),
)  # fmt: skip
def test_resume_after_a_kill(at, start, undisturbed, tmp_path):
    killed = start(at=(*at, signal.SIGKILL))
    assert killed.wait() == -signal.SIGKILL
    again = start()
    assert again.wait() == 0, again.printed
    assert_same(trials(sqlite(tmp_path / "out")), undisturbed)
    for folder in ("checkpoints", "workers"):
        assert not list((tmp_path / "out" / folder).iterdir())


def test_resume_after_kills_at_ten_random_points(start, undisturbed, tmp_path):
    chance = random.Random(0)
    for _ in range(10):
        worker = start(at=("step", chance.randint(1, 15), signal.SIGSTOP), checkpoints=0.001)
        worker.until_stopped()
        worker.signal(signal.SIGCONT)
        time.sleep(chance.uniform(0, 0.01))  # between steps, in one, or in a checkpoint
        worker.signal(signal.SIGKILL)
        assert worker.wait() == -signal.SIGKILL
    worker = start()
    assert worker.wait() == 0, worker.printed
    assert len(holders(sqlite(tmp_path / "out"))) == 11
    assert_same(trials(sqlite(tmp_path / "out")), undisturbed)


def test_a_resumed_job_goes_on_from_its_checkpoint(start, tmp_path):
    assert start(at=("save", 1, signal.SIGKILL)).wait() == -signal.SIGKILL
    # At least a step of the first job is not made again.
    assert start(at=("step", 2 * STUDY["steps"], signal.SIGKILL)).wait() == 0
    assert len(trials(sqlite(tmp_path / "out"))) == 2 * MEMBERS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop(number, start, undisturbed, tmp_path):
    stopped = start(at=("step", 50, number), checkpoints=1000)
    assert stopped.wait() == 130
    one_line(stopped.printed, f"stopped; the same command goes on from {tmp_path / 'out'}")
    # Nothing that was trained is trained again.
    again = start(at=("step", 2 * STUDY["steps"] - 49, signal.SIGKILL))
    assert again.wait() == 0, again.printed
    assert_same(trials(sqlite(tmp_path / "out")), undisturbed)


def test_a_journal_whose_last_line_was_cut_off(start, undisturbed, tmp_path):
    """By a kill while it was written."""
    journal = tmp_path / "journal"
    killed = start(storage=f"journal:{journal}", at=("write", 3, signal.SIGKILL))
    assert killed.wait() == -signal.SIGKILL
    os.truncate(journal, journal.stat().st_size - 100)
    again = start(storage=f"journal:{journal}")
    assert again.wait() == 0, again.printed
    assert_same(trials(f"journal:{journal}"), undisturbed)


def test_a_search_is_the_same_after_kills(start, text, tmp_path, undisturbed_search):
    study = study_file(tmp_path, text, SEARCH)
    for at in (("step", 30), ("write", 6), ("step", 100)):
        assert start(study=study, at=(*at, signal.SIGKILL)).wait() == -signal.SIGKILL
    again = start(study=study)
    assert again.wait() == 0, again.printed
    found = trials(sqlite(tmp_path / "out"))
    assert len(found) == 24
    assert_same(found, undisturbed_search)


# ---- beside each other ----


@pytest.mark.parametrize("shared", [True, False], ids=["one folder", "a folder each"])
def test_two_workers_of_which_one_is_killed_and_started_again(
    shared, start, postgresql, undisturbed
):
    folders = ("out", "out") if shared else ("one", "other")
    killed = start(folders[0], postgresql, at=("step", 60, signal.SIGSTOP))
    killed.until_stopped()  # in its job, which the other cannot have taken
    other = start(folders[1], postgresql)
    killed.signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    again = start(folders[0], postgresql)
    for worker in (again, other):
        assert worker.wait() == 0, worker.printed
    assert_same(trials(postgresql), undisturbed)


@pytest.mark.parametrize(
    ("storage", "shared"),
    [("sqlite", True), ("journal", False), ("postgresql", True), ("postgresql", False)],
)
def test_workers_that_start_at_once(storage, shared, start, request, tmp_path, undisturbed):
    """On every storage."""
    if storage == "postgresql":
        url = request.getfixturevalue("postgresql")
    else:
        url = {"sqlite": f"sqlite:///{tmp_path}/db", "journal": f"journal:{tmp_path}/db"}[storage]
    workers = [start("out" if shared else f"out{index}", url, report=True) for index in range(3)]
    for worker in workers:
        assert worker.wait() == 0, worker.printed
    assert_same(trials(url), undisturbed)


def test_takeover_from_a_worker_of_another_machine(start, postgresql, undisturbed):
    """Nothing but its silence tells that it is dead."""
    assert start("one", postgresql, at=("step", 60, signal.SIGKILL)).wait() == -signal.SIGKILL
    other = start("other", postgresql, waits={"grace": 2.0})
    assert other.wait() == 0, other.printed
    assert "is taken over from" in other.printed
    assert_same(trials(postgresql), undisturbed)


@pytest.mark.parametrize("shared", [True, False], ids=["one folder", "a folder each"])
@pytest.mark.parametrize("at", [("step", 60), ("write", 3)], ids=["training", "writing"])
def test_a_worker_taken_for_dead_comes_back(at, shared, start, postgresql, undisturbed):
    folders = ("out", "out") if shared else ("one", "other")
    sleeper = start(folders[0], postgresql, at=(*at, signal.SIGSTOP))
    sleeper.until_stopped()
    other = start(folders[1], postgresql, waits={"grace": 1.0})
    other.until_printed("is taken over from")
    if at[0] == "write":  # the other has written all of it before the sleeper wakes
        assert other.wait() == 0, other.printed
    sleeper.signal(signal.SIGCONT)
    assert sleeper.wait() == 0, sleeper.printed
    assert other.wait() == 0, other.printed
    assert_same(trials(postgresql), undisturbed)


def test_two_workers_of_a_search(start, text, postgresql, tmp_path, undisturbed_search):
    study = study_file(tmp_path, text, SEARCH)
    one = start("one", postgresql, study, at=("claim", 1, signal.SIGSTOP))
    one.until_stopped()
    other = start("other", postgresql, study)
    other.until(lambda: len(holders(postgresql)) == 2)
    one.signal(signal.SIGCONT)
    for worker in (one, other):
        assert worker.wait() == 0, worker.printed
    assert_same(trials(postgresql), undisturbed_search)


# ---- storages ----


@pytest.mark.skipif(not shutil.which("redis-server"), reason="redis-server is not installed")
def test_trials_are_the_same_in_redis(start, tmp_path, undisturbed):
    pytest.importorskip("redis")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path / "redis.log"
    server = subprocess.Popen(
        ["redis-server", "--port", str(port), "--dir", tmp_path, "--logfile", log]
    )
    try:
        while not (log.exists() and "Ready to accept connections" in log.read_text()):
            time.sleep(0.05)
        url = f"redis://127.0.0.1:{port}"
        workers = [start(f"out{index}", url) for index in range(2)]
        for worker in workers:
            assert worker.wait() == 0, worker.printed
        assert_same(trials(url), undisturbed)
    finally:
        server.kill()
        server.wait()


def test_a_storage_that_stops_and_starts_again(start, postgresql, postgresql_server, undisturbed):
    worker = start(storage=postgresql, at=("step", 60, signal.SIGSTOP))
    worker.until_stopped()
    postgresql_server.stop()
    try:
        worker.signal(signal.SIGCONT)
        worker.until_printed("trying again for 60 s")
    finally:
        postgresql_server.start()
    assert worker.wait() == 0, worker.printed
    assert_same(trials(postgresql), undisturbed)


def test_a_storage_that_stops_for_longer_than_patience(
    start, postgresql, postgresql_server, undisturbed, tmp_path
):
    worker = start(
        storage=postgresql,
        at=("step", 60, signal.SIGSTOP),
        checkpoints=1000,
        waits={"patience": 1.0},
    )
    worker.until_stopped()
    postgresql_server.stop()
    try:
        worker.signal(signal.SIGCONT)
        assert worker.wait() == 1, worker.printed
    finally:
        postgresql_server.start()
    one_line(worker.printed, f"Nothing is lost: the same command goes on from {tmp_path / 'out'}")
    assert "storage: postgresql://depthnet@/" in worker.printed
    # The first job's last step was saved, and only the second job is trained.
    again = start(storage=postgresql, at=("step", STUDY["steps"] + 1, signal.SIGKILL))
    assert again.wait() == 0, again.printed
    assert_same(trials(postgresql), undisturbed)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@127.0.0.1:1/there", "postgresql://me@127.0.0.1:1/there"),
        ("sqlite:////nowhere/study.db", "sqlite:////nowhere/study.db"),
        ("journal:/nowhere/journal", "journal:/nowhere/journal"),
        ("nosuch://me:secret@host/there", "nosuch://me@host/there"),
    ],
)
def test_a_storage_that_cannot_be_reached(url, shown, start):
    if url.startswith("postgresql"):
        pytest.importorskip("psycopg")
    worker = start(storage=url)
    assert worker.wait() == 2
    one_line(worker.printed, f"depthnet sweep: storage: {shown} failed (")
    assert "secret" not in worker.printed


# ---- disks ----


def test_a_full_disk_at_a_checkpoint(start, undisturbed, tmp_path):
    full = start(file_size=500_000)  # SQLite's file is smaller, a checkpoint larger
    assert full.wait() == 2
    message = one_line(full.printed, "depthnet sweep: out: ")
    assert f"{tmp_path / 'out/checkpoints'}/" in message
    assert "cannot be written" in message
    again = start()
    assert again.wait() == 0, again.printed
    assert_same(trials(sqlite(tmp_path / "out")), undisturbed)


@pytest.fixture
def small_disk():
    folder = tempfile.mkdtemp(prefix="depthnet-disk-")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        os.rmdir(folder)
        pytest.skip(f"a small disk cannot be mounted here ({mounted.stderr.strip()})")
    yield Path(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)
    os.rmdir(folder)


def test_a_full_disk_of_the_storage(small_disk, start, undisturbed):
    url = f"sqlite:///{small_disk}/study.db"
    worker = start(storage=url, at=("step", 60, signal.SIGSTOP))
    worker.until_stopped()
    fill(small_disk)
    worker.signal(signal.SIGCONT)
    worker.until_printed("trying again")
    (small_disk / "filling").unlink()
    assert worker.wait() == 0, worker.printed
    assert_same(trials(url), undisturbed)


@pytest.mark.parametrize("storage", ["sqlite:///{}/study.db", "journal:{}/journal"])
def test_a_full_disk_of_the_storage_for_longer_than_patience(
    storage, small_disk, start, undisturbed
):
    url = storage.format(small_disk)
    worker = start(storage=url, at=("step", 60, signal.SIGSTOP), waits={"patience": 1.0})
    worker.until_stopped()
    fill(small_disk)
    worker.signal(signal.SIGCONT)
    assert worker.wait() == 1, worker.printed
    one_line(worker.printed, "Nothing is lost: the same command goes on from")
    (small_disk / "filling").unlink()
    again = start(storage=url)
    assert again.wait() == 0, again.printed
    assert_same(trials(url), undisturbed)


def fill(disk):
    with open(disk / "filling", "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(100)):
            pass


def test_a_full_disk_at_the_start(small_disk, start):
    fill(small_disk)
    worker = start(storage=f"sqlite:///{small_disk}/study.db")
    assert worker.wait() == 2
    one_line(worker.printed, f"depthnet sweep: storage: sqlite:///{small_disk}/study.db failed (")


def test_folders_that_cannot_be_written(start, text):
    nowhere = start("/proc/nowhere")
    assert nowhere.wait() == 2
    one_line(nowhere.printed, "depthnet sweep: out: /proc/nowhere cannot be written (")
    with tempfile.TemporaryDirectory() as folder:  # pytest's are closed to others
        os.chmod(folder, 0o755)
        shutil.copy(text, folder)
        study, out = study_file(folder, f"{folder}/text.txt"), Path(folder, "out")
        out.mkdir(mode=0o555)
        user = {"user": 65534} if os.geteuid() == 0 else {}
        closed = start(out, f"sqlite:///{out}/study.db", study, **user)
        assert closed.wait() == 2
        assert str(out) in one_line(closed.printed, "depthnet sweep: ")


# ---- mistaken for another ----


def test_a_changed_study_is_refused(start, text, tmp_path):
    assert start().wait() == 0
    changed = start(study=study_file(tmp_path, text, steps=101))
    assert changed.wait() == 2
    assert "study: 'study' is there with other settings" in changed.printed
    one_line(changed.printed, "  steps: 100 there, 101 now")


def test_a_broken_checkpoint_is_named(start, undisturbed, tmp_path):
    assert start(at=("save", 1, signal.SIGKILL)).wait() == -signal.SIGKILL
    (checkpoint,) = (tmp_path / "out/checkpoints").glob("*.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    refused = start()
    assert refused.wait() == 2
    message = one_line(refused.printed, f"depthnet sweep: out: {checkpoint} is broken (")
    assert message.endswith("; remove it to train that again")
    checkpoint.unlink()
    again = start()
    assert again.wait() == 0, again.printed
    assert_same(trials(sqlite(tmp_path / "out")), undisturbed)


def test_what_a_save_left_is_removed_unless_its_process_is_there(start, tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert start(at=("save", 1, signal.SIGKILL)).wait() == -signal.SIGKILL
    (checkpoint,) = (tmp_path / "out/checkpoints").glob("*.pt")
    left, in_use = (
        checkpoint.with_name(f".{checkpoint.name}.{pid}.tmp") for pid in (ended.pid, os.getpid())
    )
    left.touch()
    in_use.touch()
    assert start().wait() == 0
    assert not left.exists()
    assert in_use.exists()


def test_a_checkpoint_of_another_study_is_refused(start, text, tmp_path):
    assert start(at=("save", 1, signal.SIGKILL)).wait() == -signal.SIGKILL
    (checkpoint,) = (tmp_path / "out/checkpoints").glob("*.pt")
    other = start(study=study_file(tmp_path, text, name="other", batch=9))
    assert other.wait() == 2
    assert str(checkpoint) in one_line(other.printed, "depthnet sweep: out: ")
    assert "another study" in other.printed
    assert checkpoint.exists()


# ---- members do not see each other ----


def trained(folder, text, **changes):
    """The trials of a study that is run in this process, by their member."""
    folder.mkdir()
    settings = SweepSettings(**read_file(study_file(folder, text, depth=[4], **changes)))
    source = data.load(settings.data)
    ledger = Ledger(sqlite(folder), settings.name, record(settings, source))
    for _ in Worker(ledger, source, folder).run():
        pass
    return {trial.member: trial for trial in trials(sqlite(folder))}


def assert_same_members(found, wanted):
    for member, trial in found.items():
        assert trial.losses.tobytes() == wanted[member].losses.tobytes(), member


def test_diverging_members_leave_no_trace(tmp_path, text):
    sane = trained(tmp_path / "sane", text)
    mixed = trained(tmp_path / "mixed", text, log2_lr=[-9, -7, 36, 38, -5, 40])
    assert all(trial.diverged_at is None for trial in sane.values())
    lost = {member: trial for member, trial in mixed.items() if member not in sane}
    assert len(lost) == 6
    for trial in lost.values():
        assert trial.diverged_at < STUDY["steps"] - 1
        assert np.isfinite(trial.losses[: trial.diverged_at]).all()
        assert np.isnan(trial.losses[trial.diverged_at :]).all()
    assert_same_members(sane, mixed)


def test_all_members_diverge(start, text, tmp_path):
    study = study_file(tmp_path, text, depth=[4], log2_lr=[38, 40])
    worker = start(study=study)
    assert worker.wait() == 0, worker.printed
    found = trials(sqlite(tmp_path / "out"))
    assert len(found) == 4
    assert all(trial.diverged_at is not None for trial in found)


@pytest.mark.parametrize("size", [1, 7, 33])
def test_a_trial_does_not_depend_on_the_size_of_its_population(size, tmp_path, text):
    values = [float(value) for value in np.linspace(-10, -5, 33)]
    shape = {"log2_lr": values, "seeds": 1, "steps": 20}
    whole = trained(tmp_path / "whole", text, **shape)
    settings = SweepSettings(**read_file(study_file(tmp_path, text, depth=[4], **shape)))
    source = data.load(settings.data)
    (network,) = settings.networks
    memory = f"{size * plan.member_bytes(network, settings, source) / 1024:.3f} KiB"
    changed = {**shape, "memory": memory}
    parts = trained(tmp_path / "parts", text, **changed)
    settings = SweepSettings(**read_file(tmp_path / "parts/study.yaml"))
    sizes = {len(job.members) for job in plan.jobs(settings, source, {})}
    assert max(sizes) == size
    assert parts.keys() == whole.keys()
    assert_same_members(parts, whole)
