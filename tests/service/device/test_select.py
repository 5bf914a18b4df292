"""What a loaded model needs to run on a device."""

from __future__ import annotations

import torch

from service.device.select import prepare_for_device
from tests.checkpoints.tiny import tiny_model

CPU = torch.device("cpu")


def test_a_network_that_overflows_float16_runs_in_bfloat16():
    quiet = prepare_for_device(tiny_model().to(dtype=torch.float16), CPU)
    assert (quiet.unet.dtype, quiet.autoencoder.dtype) == (torch.float16, torch.float16)
    overflowing = tiny_model()
    overflowing.autoencoder.decoder.conv_in.weight.mul_(5e4)
    overflowing = prepare_for_device(overflowing.to(dtype=torch.float16), CPU)
    assert (overflowing.unet.dtype, overflowing.autoencoder.dtype) == (torch.float16, torch.bfloat16)
    x = overflowing.sample(["a cat"], [0], 2, 3.0)
    assert x.isfinite().all()
