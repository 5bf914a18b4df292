"""How many kernels one call launches on a GPU."""

from __future__ import annotations

import importlib.util

import pytest

from tests.benchmarks import launches

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install '.[kernels]'"
)
# One call of a UNet with two rows, and of a VAE decoder with one latent; in tests/README.md as well.
MOST = {("sd15", "unet"): 473, ("sdxl", "unet"): 1143, ("sd15", "D"): 156}


@pytest.mark.parametrize(("name", "part"), MOST)
def test_launches_of_a_call(name, part):
    launched = launches.count(name, part)
    assert launched.total() <= MOST[name, part]
    assert launched.converted == 0  # inputs of convolutions that cuDNN would copy to another layout first
