"""How many kernels one call launches on a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from models.networks.attention import AttentionBlock
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


def test_self_attention_of_the_papers_models_copies_no_feature_map():
    block = launches.served(lambda: AttentionBlock(width=448, heads=14, groups=32))
    x = torch.empty(2, 448, 16, 16, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
    with launches.counted() as launched:
        y = block(x)
    assert launched.counts == {"whole_groups": 1, "addmm": 2, "attention": 1, "add": 1}
    assert launched.converted == 0
    assert y.is_contiguous(memory_format=torch.channels_last)
