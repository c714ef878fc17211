"""A job's population of networks."""

from __future__ import annotations

import torch

from depthnet.data import Dataset
from depthnet.nn import ResNet
from depthnet.optim import AdamW
from depthnet.sweep.study import Job, SweepSettings, activation
from depthnet.training.population import PopulationTrainer
from depthnet.training.schedules import schedule

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
        output_std=settings.output_std,
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
    if network.sweep == "frozen":
        model.input.requires_grad_(False)
        model.output.requires_grad_(False)
        groups = [group for group in groups if group["name"] == "hidden"]
    for group in groups:
        moves = network.sweep == "all" or group["name"] == "hidden"
        group["lr"] = swept if moves else 2.0**settings.outer_log2_lr
        group["weight_decay"], group["weight_decay_scale"] = (
            1.0,
            decay * group["weight_decay_scale"],
        )
    optimizer = AdamW(groups, betas=BETAS)
    return PopulationTrainer(
        model,
        optimizer,
        data,
        [member.seed for member in members],
        settings.batch,
        settings.steps,
        scheduler=schedule(optimizer, settings.schedule, settings.steps, settings.warmup),
        drop_diverged=True,
    )
