"""The speed comparison: both sides do the same work, and different results are never timed."""

import subprocess
import sys

import pytest
import torch

from tests.benchmarks.compare import DisagreementError, difference
from tests.benchmarks.shapes import SHAPES, Pair, flops_of


@pytest.mark.slow
def test_small_networks_are_compared_and_timed(tmp_path):
    command = [sys.executable, "-m", "tests.benchmarks.compare", "sd15", "--tiny", "--device", "cpu"]
    options = ["--dtype", "float32", "--rounds", "1", "--parts", "unet", "D", "images"]
    run = subprocess.run([*command, *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line.split() for line in run.stdout.splitlines() if line.startswith("sd15")]
    assert [line[1] for line in lines] == ["unet", "D", "images"]
    for line in lines:
        ours, theirs, ratio = map(float, line[3:6])
        assert ratio == pytest.approx(theirs / ours, rel=0.2)


def test_different_results_are_an_error():
    x = torch.randn(1, 4, 8, 8)
    same = Pair(lambda: x, lambda: x.clone(), 1)
    assert difference(same, "unet", torch.float32) == 0
    for other, what in ((x + 0.01, "difference"), (x[:, :2], "shapes")):
        with pytest.raises(DisagreementError, match=what):
            difference(Pair(lambda: x, lambda other=other: other, 1), "unet", torch.float32)
    with pytest.raises(DisagreementError, match="constant"):
        difference(Pair(lambda: 0 * x, lambda: 0 * x, 1), "unet", torch.float32)


def test_flops_are_counted():
    linear = torch.nn.Linear(8, 16)
    assert flops_of(linear, torch.randn(4, 8)) == 2 * 4 * 8 * 16


def test_unets_have_the_published_number_of_parameters():
    """To a tenth of a million."""
    from models.networks.unet import UNet

    sizes = {}
    for name in ("sd15", "ldm-text", "sdxl"):
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in UNet(SHAPES[name].spec.unet).parameters())
    assert [round(size / 1e6, 1) for size in sizes.values()] == [859.5, 872.3, 2567.5]
