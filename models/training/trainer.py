"""The training loop: updates, a moving average of the weights, the learning rate, saving and resuming."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.dtypes import mixed_precision

MAX_UPDATE_RATIO = 10.0  # of an update's time to the average; the time beyond that was a pause


@dataclass(frozen=True)
class Budget:
    """How long and how fast to train."""

    minutes: float  # of the whole run, summed over all times that it was resumed
    learning_rate: float
    batch: int
    warmup: int = 100  # updates until the learning rate has risen to its peak
    save_every: float = 120.0  # seconds
    average: float = 0.999  # decay of the moving average of the weights
    stop_after: float = math.inf  # minutes after which this process stops; a later one resumes the run


@dataclass
class Progress:
    """How far a run has come."""

    updates: int = 0
    seconds: float = 0.0

    def count(self, seconds: float) -> None:
        """Counts an update that took so long. A pause during it, as of a stopped process, does not count."""
        usual = self.seconds / self.updates if self.updates else seconds
        self.seconds += min(seconds, MAX_UPDATE_RATIO * usual)
        self.updates += 1


class Trainer:
    """Trains one module on batches from an iterator.

    The learning rate follows a cosine over the time budget, so that a slower machine makes fewer updates but
    still completes the schedule.
    """

    def __init__(self, network: nn.Module, budget: Budget, path: Path, device: torch.device) -> None:
        """path: the state file; a run resumes from it if it exists."""
        self.network = network.to(device)
        self.averaged = copy.deepcopy(network).requires_grad_(False).eval()
        self.budget, self.path, self.device = budget, path, device
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=budget.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.progress = Progress()
        if path.exists():
            self._resume()

    def run(self, batches: Iterator[Any], loss_of: Callable[[Any], Tensor], title: str) -> bool:
        """Updates until the budget is spent (returns True) or until Budget.stop_after (False).

        loss_of: batch -> scalar.
        """
        total, saved, smooth = 60 * self.budget.minutes, time.monotonic(), math.nan
        stop = min(total, self.progress.seconds + 60 * self.budget.stop_after)
        self.network.train()
        with tqdm(total=round(total), initial=round(self.progress.seconds), unit="s", desc=title) as bar:
            for batch in batches:
                if self.progress.seconds >= stop:
                    break
                begin = time.monotonic()
                loss = self._update(batch, loss_of)
                smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
                self.progress.count(time.monotonic() - begin)
                bar.update(round(self.progress.seconds) - bar.n)
                bar.set_postfix(updates=self.progress.updates, loss=f"{smooth:.4f}", refresh=False)
                if time.monotonic() - saved > self.budget.save_every:
                    self.save()
                    saved = time.monotonic()
        self.save()
        return self.progress.seconds >= total

    def _update(self, batch: Any, loss_of: Callable[[Any], Tensor]) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        with mixed_precision(self.device):
            loss = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        return loss.item()

    def _learning_rate(self) -> float:
        """Linear warm-up, then a cosine over the time budget down to 2% of the peak."""
        warm = min(1.0, (self.progress.updates + 1) / self.budget.warmup)
        spent = min(1.0, self.progress.seconds / (60 * self.budget.minutes))
        return self.budget.learning_rate * warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * spent)))

    def _average(self) -> None:
        """Update the moving average of the weights; early in a run it follows them more closely."""
        decay = min(self.budget.average, (1 + self.progress.updates) / (10 + self.progress.updates))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.network.parameters()), 1 - decay)

    def save(self) -> None:
        """Writes the state atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        state = {
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": vars(self.progress),
        }
        torch.save(state, partial)
        os.replace(partial, self.path)

    def _resume(self) -> None:
        state = torch.load(self.path, map_location=self.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
