"""Weights in a file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from service.device.mapped_weights import MappedWeights


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Conv2d(2, 7, 3).to(torch.bfloat16)).requires_grad_(False)


def mappings() -> str:
    return "\n".join(line for line in Path("/proc/self/maps").read_text().splitlines() if "(deleted)" in line)


def test_weights_keep_their_values_and_identities():
    exact, moved = network(), network()
    before = list(map(id, moved.parameters()))
    weights = MappedWeights(moved)
    weights.release()
    assert list(map(id, moved.parameters())) == before
    assert all(map(torch.equal, moved.parameters(), exact.parameters()))


def test_the_file_is_mapped_until_the_weights_are_restored():
    moved, before = network(), mappings()
    weights = MappedWeights(moved)
    assert mappings() != before
    weights.restore()
    del weights
    assert mappings() == before
    assert torch.equal(moved[0].weight, network()[0].weight)
