"""Studies in storages: claims, results, refusals."""

import json
import math
import multiprocessing
import threading

import numpy as np
import optuna
import pytest

from depthnet import data
from depthnet.sweep import plan, study
from depthnet.sweep.ledger import Ledger, StorageError, hide_password, study_names
from depthnet.sweep.study import SweepSettings, Trial

DIGITS = data.load("digits")


def settings(**changes):
    small = {
        "data": "digits",
        "width": 8,
        "depth": (2, 4),
        "steps": 10,
        "batch": 8,
        "log2_lr": (-9, -8),
    }
    return SweepSettings(**{**small, **changes})


def url_of(tmp_path, kind="sqlite"):
    return f"sqlite:///{tmp_path}/study.db" if kind == "sqlite" else f"journal:{tmp_path}/study.log"


def open_ledger(tmp_path, chosen=None, kind="sqlite"):
    chosen = chosen or settings()
    return Ledger(url_of(tmp_path, kind), chosen.name, study.record(chosen, DIGITS))


def trial_of(job, index, losses, diverged_at=None):
    losses = np.asarray(losses, np.float32)
    return Trial(job.network, job.members[index], losses, 0.25, 1e9, diverged_at)


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_the_first_claim_is_valid_and_a_takeover_follows_the_claim_that_it_names(tmp_path, kind):
    first, second = open_ledger(tmp_path, kind=kind), open_ledger(tmp_path, kind=kind)
    job, other = plan.jobs(settings(), DIGITS, {})
    assert first.claim(job, "a", None)
    assert not second.claim(job, "b", None)  # too late
    assert second.claim(other, "b", None)
    held = second.claims()[job.name]
    assert (held.worker, second.claims()[other.name].worker) == ("a", "b")
    assert second.claim(job, "c", held)
    assert not first.claim(job, "d", held)  # c took over before d
    assert first.claims()[job.name].worker == "c"
    assert not first.claim(job, "a", None)


def claim_all(url, name, worker, barrier, won):
    ledger = Ledger(url, name, None)
    jobs = plan.jobs(ledger.settings, DIGITS, {})
    barrier.wait()
    won.put([(job.name, worker) for job in jobs if ledger.claim(job, worker, None)])


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_of_claims_at_the_same_time_one_is_valid(tmp_path, kind):
    chosen = settings(depth=tuple(range(1, 7)))
    open_ledger(tmp_path, chosen, kind)
    context = multiprocessing.get_context("fork")  # the children compute nothing with torch
    barrier, won = context.Barrier(3), context.Queue()
    arguments = url_of(tmp_path, kind), chosen.name
    workers = [
        context.Process(target=claim_all, args=(*arguments, worker, barrier, won))
        for worker in "abc"
    ]
    for worker in workers:
        worker.start()
    claims = [pair for _ in workers for pair in won.get(timeout=120)]
    for worker in workers:
        worker.join()
    assert len(claims) == len(dict(claims)) == 6
    held = open_ledger(tmp_path, chosen, kind).claims()
    assert {name: claim.worker for name, claim in held.items()} == dict(claims)


def test_trials_come_back_bit_for_bit(tmp_path):
    chosen = settings(steps=40_000)
    ledger = open_ledger(tmp_path, chosen)
    job, _ = plan.jobs(chosen, DIGITS, {})
    losses = np.random.default_rng(0).random(40_000, np.float32)  # random bits do not compress
    diverged = losses.copy()
    diverged[7:] = np.nan
    ledger.write(job, 1, trial_of(job, 1, losses))
    ledger.write(job, 0, trial_of(job, 0, diverged, 7))
    found = Ledger(ledger.url, chosen.name, None).trials()
    assert [trial.member for trial in found] == [job.members[0], job.members[1]]
    assert np.array_equal(found[0].losses, diverged, equal_nan=True)
    assert np.array_equal(found[1].losses, losses)
    assert (found[0].diverged_at, found[1].diverged_at) == (7, None)
    assert (found[1].network, found[1].seconds, found[1].flops) == (job.network, 0.25, 1e9)
    (frozen,) = (
        t for t in optuna.load_study(study_name=chosen.name, storage=ledger.url).trials if t.value
    )
    assert max(len(json.dumps(value)) for value in frozen.user_attrs.values()) < 65_535


def test_what_optuna_sees(tmp_path):
    ledger = open_ledger(tmp_path)
    job, _ = plan.jobs(settings(), DIGITS, {})
    ledger.write(job, 0, trial_of(job, 0, np.arange(10)))
    ledger.write(job, 1, trial_of(job, 1, [1.0] * 5 + [math.nan] * 5, 5))
    whole, pruned = optuna.load_study(study_name="sweep", storage=ledger.url).trials
    assert whole.state == optuna.trial.TrialState.COMPLETE
    assert whole.value == 8.5  # the mean of the last fifth
    # Only what varies is a parameter.
    assert whole.params == {"depth": 4, "log2_lr": -9.0}
    assert pruned.state == optuna.trial.TrialState.PRUNED
    assert pruned.value is None


def test_trials_of_other_programs_are_left_alone(tmp_path):
    ledger = open_ledger(tmp_path)
    optuna.load_study(study_name="sweep", storage=ledger.url).enqueue_trial({"log2_lr": -5.0})
    assert ledger.trials() == []


def test_another_study_under_the_same_name_is_refused_with_the_difference(tmp_path):
    open_ledger(tmp_path)
    with pytest.raises(ValueError, match="is there with other settings") as caught:
        open_ledger(tmp_path, settings(steps=20, depth=(2, 8)))
    assert "steps: 10 there, 20 now" in str(caught.value)
    assert "depth: [2, 4] there, [2, 8] now" in str(caught.value)
    assert "width" not in str(caught.value)
    open_ledger(tmp_path, settings(name="other", steps=20))
    assert study_names(url_of(tmp_path)) == ["other", "sweep"]


def test_a_study_of_another_program_is_refused(tmp_path):
    for name in ("sweep", "sweep (claims)"):
        optuna.create_study(storage=url_of(tmp_path), study_name=name).add_trial(
            optuna.trial.create_trial(value=1.0)
        )
    with pytest.raises(ValueError, match="is no sweep's"):
        open_ledger(tmp_path)


def test_a_study_that_is_not_there(tmp_path):
    open_ledger(tmp_path)
    with pytest.raises(ValueError, match="has no study 'other'"):
        Ledger(url_of(tmp_path), "other", None)


def test_settings_come_with_the_study(tmp_path):
    open_ledger(tmp_path)
    assert Ledger(url_of(tmp_path), "sweep", None).settings == settings()


def test_workers_speak_from_threads(tmp_path):
    ledger = open_ledger(tmp_path)
    thread = threading.Thread(target=ledger.report, args=("a", {"step": 3}))
    thread.start()
    thread.join()
    ledger.report("b", {"step": 4})
    assert ledger.workers() == {"a": {"step": 3}, "b": {"step": 4}}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite:////proc/nowhere/study.db", "unable to open database file"),
        ("nosuch://host/x", "nosuch"),
        ("study.db", "parse"),
        ("journal:/proc/nowhere/study.log", "No such file or directory"),
    ],
)
def test_storages_that_cannot_be_reached(url, words):
    with pytest.raises(StorageError, match=words) as caught:
        Ledger(url, "sweep", study.record(settings(), DIGITS))
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_passwords_are_hidden():
    assert hide_password("postgresql://me:secret@host:1/db") == "postgresql://me@host:1/db"
    assert hide_password("sqlite:///a@b.db") == "sqlite:///a@b.db"
    assert hide_password("postgresql://host/db") == "postgresql://host/db"
