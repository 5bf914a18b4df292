"""Compiled networks against eager ones in float32."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial

import psutil
import pytest
import torch
from torch import nn

from models.networks.adapter_inputs import AdapterInputs
from models.networks.autoencoder import Autoencoder
from models.networks.deep_features import DeepFeatures
from models.networks.unet import UNet
from models.spec import AutoencoderSpec, UNetSpec
from tests.checkpoints.tiny import fill_randomly
from tests.helpers.numbers import relative_error

TEXT = UNetSpec(
    in_channels=4, out_channels=4, channels=(32, 64), res_blocks=1, transformer_depth=(1, 1), middle_depth=1,
    heads=(2, 4), context_width=24,
)  # fmt: skip
SPECS = {
    "text": TEXT,
    "pooled vector": replace(TEXT, added_width=20, linear_projection=True, transformer_depth=(0, 2)),
    "noise level": replace(TEXT, in_channels=7, noise_levels=10),
    "guidance": replace(TEXT, guidance_width=16),
    "unconditional": replace(TEXT, context_width=0, scale_shift_norm=True, residual_resampling=True),
}
F32, BF16 = torch.float32, torch.bfloat16
MAX_ERROR = {F32: 1e-5, BF16: 0.02}


@pytest.fixture(autouse=True)
def importable(with_openvino) -> None:
    """All tests here need the package."""


def filled(network: nn.Module) -> nn.Module:
    fill_randomly(network, 0)
    return network.requires_grad_(False).eval()


def inputs_of(spec: UNetSpec, rows: int, h: int, w: int, tokens: int = 7) -> dict[str, torch.Tensor | None]:
    noise = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    return {
        "x": noise(rows, spec.in_channels, h, w),
        "t": torch.linspace(1, 981, rows),
        "context": noise(rows, tokens, spec.context_width) if spec.context_width else None,
        "pooled": noise(rows, spec.added_width) if spec.added_width else None,
        "noise_level": torch.arange(rows) if spec.noise_levels else None,
        "guidance": 1 + torch.arange(rows) if spec.guidance_width else None,
    }


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, F32) for kind in SPECS), ("text", BF16)])
def test_a_unet_agrees_at_any_size(kind, dtype):
    from service.device.openvino_networks import CompiledUNet

    exact, spec = filled(UNet(SPECS[kind])), SPECS[kind]
    compiled = CompiledUNet(filled(UNet(spec)).to(dtype))
    for rows, h, w, tokens in ((2, 8, 8, 7), (5, 10, 6, 3)):
        inputs = inputs_of(spec, rows, h, w, tokens)
        out = compiled(**inputs)
        assert out.dtype == torch.float32
        assert relative_error(out, exact(**inputs)) < MAX_ERROR[dtype]


def test_unloaded_unets_leave_no_weights_in_memory():
    from service.device.openvino_networks import CompiledUNet

    spec, process = replace(TEXT, channels=(128, 256)), psutil.Process()
    weights = sum(4 * each.numel() for each in UNet(spec).parameters())
    resident = []
    for _ in range(8):
        CompiledUNet(filled(UNet(spec)))
        gc.collect()
        resident.append(process.memory_info().rss)
    assert resident[-1] - resident[1] < weights / 2


def test_inputs_that_are_not_compiled_run_by_torch():
    from service.device.openvino_networks import CompiledUNet

    unet = filled(UNet(TEXT))
    compiled, inputs = CompiledUNet(unet), inputs_of(TEXT, 2, 8, 8)
    middle = AdapterInputs(middle=torch.ones(2, 64, 4, 4))
    assert torch.equal(compiled(**inputs, adapters=middle), unet(**inputs, adapters=middle))
    deep = DeepFeatures(keep=(0,))
    assert torch.equal(compiled(**inputs, deep=deep), unet(**inputs, deep=DeepFeatures(keep=(0,))))
    assert deep.kept


def test_a_result_is_not_overwritten_by_the_next_call():
    from service.device.openvino_networks import CompiledUNet

    compiled, inputs = CompiledUNet(filled(UNet(TEXT))), inputs_of(TEXT, 2, 8, 8)
    first = compiled(**inputs)
    copy = first.clone()
    compiled(**inputs | {"x": -inputs["x"]})
    assert torch.equal(first, copy)


@pytest.mark.parametrize(("codes", "dtype"), [(0, F32), (0, BF16), (16, F32)])
def test_a_decoder_agrees_at_any_size(codes, dtype):
    from service.device.openvino_networks import CompiledDecoder

    spec = AutoencoderSpec((32, 64), 1, latent_channels=4, scale_factor=1.0, codes=codes)
    exact = filled(Autoencoder(spec))
    compiled = CompiledDecoder(filled(Autoencoder(spec)).to(dtype))
    for count, h, w in ((1, 8, 8), (2, 5, 12)):
        z = torch.randn(count, 4, h, w, generator=torch.Generator().manual_seed(2))
        assert relative_error(compiled(z), exact.decode(z)) < MAX_ERROR[dtype]
