"""The training loop learns, averages and resumes, on a tiny network."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from models.training.trainer import Budget, Progress, Trainer

DEVICE = torch.device("cpu")


def budget(seconds: float) -> Budget:
    return Budget(minutes=seconds / 60, learning_rate=0.02, batch=1, warmup=5)


def fit(network: nn.Module, seconds: float, state: Path) -> Trainer:
    x = torch.linspace(-1, 1, 32)[:, None]
    trainer = Trainer(network, budget(seconds), state, DEVICE)
    trainer.run(itertools.repeat(x), lambda x: (network(x).float() - x.sin()).square().mean(), "test")
    return trainer


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))


@pytest.mark.slow
def test_a_run_lowers_the_loss_of_the_averaged_weights(tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 32)[:, None]
    before = (network()(x) - x.sin()).square().mean().item()
    trainer = fit(network(), 2.0, tmp_path / "state.pt")
    after = (trainer.averaged(x) - x.sin()).square().mean().item()
    assert trainer.progress.updates > 5
    assert after < before / 4


def test_a_run_resumes_from_its_state(tmp_path: Path) -> None:
    first = fit(network(), 0.3, tmp_path / "state.pt")
    again = Trainer(network(), budget(0.3), tmp_path / "state.pt", DEVICE)
    assert again.progress == first.progress
    for a, b in zip(first.averaged.parameters(), again.averaged.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_spent_budget_updates_nothing(tmp_path: Path) -> None:
    first = fit(network(), 0.3, tmp_path / "state.pt")
    again = fit(network(), 0.3, tmp_path / "state.pt")
    assert again.progress.updates == first.progress.updates


def test_a_pause_is_not_training_time() -> None:
    progress = Progress(updates=10, seconds=10.0)
    progress.count(2.0)
    assert progress == Progress(11, 12.0)
    progress.count(3600.0)
    assert progress.seconds < 25.0
