"""Training a population of networks: one tensor program for all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn import functional
from torch.optim.lr_scheduler import LRScheduler

from depthnet.data import Dataset
from depthnet.nn import ResNet
from depthnet.optim.base import ScaledOptimizer

SECTIONS = ("data", "forward", "backward", "optimizer")


class PopulationTrainer:
    """Trains the members of a population side by side and records every training loss.

    Members share nothing: the loss that is differentiated is the sum of theirs.  Batches are a
    function of (seed, step), so that `state_dict` and `load_state_dict` resume exactly.

    Args:
        model: a network with a population of P members.
        optimizer: over the model's parameters.
        data: where batches come from.
        seeds: the stream of batches of each member; members with equal seeds see equal batches.
        batch_size: samples a member and step. steps: the number of steps in all.
        scheduler: of torch, over the optimizer; None keeps its learning rates.
        drop_diverged: whether a member whose loss is not finite leaves the population, without a trace
            on the others; the model then keeps the members `alive`.

    Attributes:
        losses: float32 (steps, P), the mean cross-entropy of each batch; NaN where not trained.
        alive: int64 (members,), the places of the members that the model holds.
        step: steps done. seconds: time spent in each of SECTIONS.
    """

    def __init__(
        self,
        model: ResNet,
        optimizer: ScaledOptimizer,
        data: Dataset,
        seeds: Sequence[int],
        batch_size: int,
        steps: int,
        *,
        scheduler: LRScheduler | None = None,
        drop_diverged: bool = False,
    ):
        if model.population != len(seeds):
            raise ValueError(f"seeds must have {model.population} entries, got {len(seeds)}")
        self.model, self.optimizer, self.data = model, optimizer, data
        self.batch_size, self.steps, self.step = batch_size, steps, 0
        self.scheduler, self.drop_diverged = scheduler, drop_diverged
        self.device = model.output.weight.device
        self.streams = sorted(set(seeds))
        streams = torch.tensor([self.streams.index(seed) for seed in seeds])
        self.members = streams.to(self.device)  # the stream of each member that is alive
        self.alive = torch.arange(len(seeds), device=self.device)
        self.losses = np.full((steps, len(seeds)), np.nan, np.float32)
        self.seconds = dict.fromkeys(SECTIONS, 0.0)

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train: all steps are done, or every member has left."""
        return self.step == self.steps or not len(self.alive)

    @contextmanager
    def _timed(self, section: str):
        start = time.perf_counter()
        yield
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.seconds[section] += time.perf_counter() - start

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        batches = [self.data.batch(seed, self.step, self.batch_size) for seed in self.streams]
        x, y = (torch.stack(parts).to(self.device) for parts in zip(*batches, strict=True))
        return x.index_select(0, self.members), y.index_select(0, self.members)

    def train_step(self) -> np.ndarray:
        """One step of every member; returns the losses (P,) of the batches before the update."""
        if self.done:
            raise RuntimeError(f"training is over, after {self.step} steps")
        with self._timed("data"):
            x, y = self._batch()
        with self._timed("forward"):
            logits = self.model(x)
            samples = functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
            losses = samples.view(y.shape).mean(1)
        with self._timed("backward"):
            self.optimizer.zero_grad()
            losses.sum().backward()
        with self._timed("optimizer"):
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
        found = losses.detach().float().cpu().numpy()
        self.losses[self.step, self.alive.cpu().numpy()] = found
        self.step += 1
        if self.drop_diverged and not np.isfinite(found).all():
            self._keep(torch.from_numpy(np.flatnonzero(np.isfinite(found))).to(self.device))
        return self.losses[self.step - 1]

    def _keep(self, members: torch.Tensor) -> None:
        self.alive, self.members = self.alive[members], self.members[members]
        if len(members):
            self.model.keep(members)
            self.optimizer.keep(members)

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict() if len(self.alive) else {},
            "optimizer": self.optimizer.state_dict() if len(self.alive) else {},
            "scheduler": self.scheduler.state_dict() if self.scheduler else {},
            "alive": self.alive.cpu(),
            "losses": torch.from_numpy(self.losses[: self.step].copy()),
            "seconds": dict(self.seconds),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state_dict of the same population; this one must not have been trained yet."""
        if len(state["alive"]) < len(self.alive):
            self._keep(state["alive"].to(self.device))
        if len(self.alive):
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.step = len(state["losses"])
        self.losses[: self.step] = state["losses"].numpy()
        self.seconds = dict(state["seconds"])
