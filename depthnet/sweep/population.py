"""A job's population of networks."""

from __future__ import annotations

import torch

from depthnet.data import Dataset
from depthnet.nn import ResNet
from depthnet.optim import AdamW
from depthnet.sweep.study import Job, SweepSettings, activation
from depthnet.training.population import PopulationTrainer

FIXED_LOG2_LR = -7.0  # of input and output layers where only the hidden learning rate is swept
BETAS = (0.9, 0.99)


def trainer(settings: SweepSettings, job: Job, data: Dataset) -> PopulationTrainer:
    """A job's population at its first step; members that diverge leave it.

    Members of one seed start from the same weights and see the same batches.
    """
    network, members = job.network, job.members
    shape = {"base_width": settings.base_width, "base_depth": settings.base_depth}
    model = ResNet(
        data.in_features,
        network.width,
        network.depth,
        data.out_features,
        activation=activation(network.activation),
        parametrization=network.parametrization,
        active_features=data.active_features,
        population=len(members),
        generator=[torch.Generator().manual_seed(member.seed) for member in members],
        **shape,
    ).to(settings.device)
    model.blocks.scale = torch.tensor(
        [
            model.parametrization.rule(
                "hidden",
                fan_in=network.width,
                width=network.width,
                depth=network.depth,
                block_multiplier=2.0**member.log2_block_multiplier,
                **shape,
            ).multiplier
            for member in members
        ],
        dtype=torch.float64,
        device=settings.device,
    )
    swept = torch.tensor([2.0**member.log2_lr for member in members], dtype=torch.float64)
    decay = torch.tensor([member.weight_decay for member in members], dtype=torch.float64)
    groups = model.param_groups("adamw")
    for group in groups:
        moves = settings.sweep == "all" or group["name"] == "hidden"
        group["lr"] = swept if moves else 2.0**FIXED_LOG2_LR
        group["weight_decay"], group["weight_decay_scale"] = (
            1.0,
            decay * group["weight_decay_scale"],
        )
    return PopulationTrainer(
        model,
        AdamW(groups, betas=BETAS),
        data,
        [member.seed for member in members],
        settings.batch,
        settings.steps,
        drop_diverged=True,
    )
