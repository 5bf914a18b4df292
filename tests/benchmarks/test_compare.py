"""The speed comparison: both sides do the same work, and different results are never timed."""

import subprocess
import sys

import pytest
import torch

from tests.benchmarks.compare import DisagreementError, difference, measure
from tests.benchmarks.shapes import SHAPES, Pair, Setting, flops_of


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


X = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
ON_CPU = Setting(torch.device("cpu"), torch.float32)


def test_the_difference_of_two_results():
    assert difference(Pair(lambda: X, lambda: X.clone(), 1), "unet", torch.float32) == (0, True)
    error, agrees = difference(Pair(lambda: X, lambda: X + 0.01, 1), "unet", torch.float32)
    assert error == pytest.approx(0.01, rel=0.1)
    assert not agrees


@pytest.mark.parametrize(("ours", "theirs", "why"), [(X, X[:, :2], "shapes"), (0 * X, 0 * X, "constant")])
def test_results_that_cannot_be_compared_are_an_error(ours, theirs, why):
    with pytest.raises(DisagreementError, match=why):
        difference(Pair(lambda: ours, lambda: theirs, 1), "unet", torch.float32)


def test_different_results_are_timed_only_if_wanted():
    pair = Pair(lambda: X, lambda: X + 1, 1)
    with pytest.raises(DisagreementError, match="difference"):
        measure(pair, "sd15", "images", 1, ON_CPU, rounds=1)
    line = measure(pair, "sd15", "images", 1, ON_CPU, rounds=1, keep_differing=True)
    assert not line.agrees
    assert line.cells()[-1].endswith("dB!")


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
