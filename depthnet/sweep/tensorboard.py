"""Finished trials as runs of TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from depthnet._checks import optional_import
from depthnet.sweep.optima import final_loss
from depthnet.sweep.study import Trial

POINTS = 200  # of a curve; each is the mean of the steps that it stands for


def log_trials(trials: Iterable[Trial], folder: str | Path) -> None:
    """Write each trial that is not there yet: its loss curve, hyperparameters and final loss.

    A trial is a run, in a folder named by its network and hyperparameters.
    """
    optional_import("tensorboard", "tensorboard", "logging for TensorBoard")
    from torch.utils.tensorboard import SummaryWriter

    for trial in trials:
        member = trial.member
        name = f"lr{member.log2_lr:g}-a{member.log2_block_multiplier:g}-wd{member.weight_decay:g}"
        run = Path(folder, trial.network.name, f"{name}-seed{member.seed}")
        if run.exists():
            continue
        trained = trial.losses[: trial.diverged_at]
        with SummaryWriter(run) as writer:
            for steps in np.array_split(np.arange(len(trained)), min(POINTS, len(trained))):
                if len(steps):
                    writer.add_scalar("loss", trained[steps].mean(), steps[-1])
            writer.add_hparams(
                {**asdict(trial.network), **asdict(member)},
                {"final loss": final_loss(trial.losses)},
                run_name=".",
            )
