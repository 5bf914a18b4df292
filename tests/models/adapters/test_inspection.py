"""`ldm inspect` of LoRAs and embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.adapters.inspection import as_json, as_text, inspect_adapter
from models.formats.identify import read_spec
from tests.checkpoints.lora_files import write_lora

ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def kohya(module: str, **parts: tuple[int, ...]) -> dict[str, Tensor]:
    return {f"{module}.{name.replace('__', '.')}": torch.zeros(shape) for name, shape in parts.items()}


LORA = kohya(ATTENTION, lora_down__weight=(8, 768), lora_up__weight=(320, 8), alpha=())


@pytest.mark.parametrize(
    ("tensors", "base", "kinds", "ranks"),
    [
        (LORA, "Stable Diffusion 1.x", {"LoRA": 1}, {8: 1}),
        (LORA | kohya(ATTENTION, dora_scale=(1, 768)), "Stable Diffusion 1.x", {"LoRA (DoRA)": 1}, {8: 1}),
        (
            kohya(
                ATTENTION, hada_w1_a=(320, 4), hada_w1_b=(4, 2048), hada_w2_a=(320, 4), hada_w2_b=(4, 2048)
            ),
            "Stable Diffusion XL",
            {"LoHa": 1},
            {4: 1},
        ),
        (
            kohya(ATTENTION, lokr_w1=(16, 32), lokr_w2_a=(20, 2), lokr_w2_b=(2, 32)),
            "Stable Diffusion 2.x",
            {"LoKr": 1},
            {2: 1},
        ),
        (
            kohya(ATTENTION, diff=(320, 768), diff_b=(320,)),
            "Stable Diffusion 1.x",
            {"full differences": 1},
            {},
        ),
        (
            kohya("lora_te2_text_model_encoder_layers_0_mlp_fc1", lora_down__weight=(4, 8)),
            "Stable Diffusion XL",
            {"LoRA": 1},
            {4: 1},
        ),
    ],
)
def test_kind_base_model_and_ranks_of_a_lora(tmp_path, tensors, base, kinds, ranks):
    report = inspect_adapter(write_lora(tmp_path / "a.safetensors", tensors))
    assert report is not None
    assert (report.adapter, report.base_model, report.kinds, report.ranks) == ("LoRA", base, kinds, ranks)
    assert report.problems == ()
    assert json.loads(as_json(report))["base_model"] == base


def test_the_base_model_in_a_header_is_repeated_as_a_claim(tmp_path):
    tensors = kohya("lora_unet_x", lora_down__weight=(4, 8), lora_up__weight=(8, 4))
    file = write_lora(tmp_path / "a.safetensors", tensors, {"ss_base_model_version": "sdxl_base_v1-0"})
    assert "base model  sdxl_base_v1-0 (according to its header)" in as_text(inspect_adapter(file))


def test_unread_tensors_words_and_unsupported_kinds_are_named(tmp_path):
    more = {f"{ATTENTION}.extra": torch.zeros(1), "bundle_emb.cat.emb_params": torch.zeros(1, 768)}
    text = as_text(inspect_adapter(write_lora(tmp_path / "a.safetensors", LORA | more)))
    assert f"ignored     {ATTENTION}.extra" in text
    assert "embeddings  cat" in text
    odd = write_lora(tmp_path / "odd.safetensors", kohya(ATTENTION, oft_blocks=(4, 80, 80)))
    assert "PROBLEM     OFT or BOFT is not supported" in as_text(inspect_adapter(odd))


def test_a_base_model_shows_what_of_a_lora_it_does_not_read(tiny: Path, tmp_path):
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = kohya(module, lora_down__weight=(2, 64), lora_up__weight=(64, 2)) | {
        "lora_unet_nowhere.lora_up.weight": torch.zeros(1)
    }
    spec = read_spec(tiny)
    report = inspect_adapter(write_lora(tmp_path / "a.safetensors", tensors), model=spec)
    assert (report.ignored, report.problems) == (("lora_unet_nowhere.lora_up.weight",), ())
    report = inspect_adapter(write_lora(tmp_path / "sd.safetensors", LORA), model=spec)
    assert "does not fit tiny" in report.problems[0]


@pytest.mark.parametrize(
    ("widths", "base"),
    [
        ({"emb_params": 768}, "Stable Diffusion 1.x"),
        ({"<cat>": 1024}, "Stable Diffusion 2.x"),
        ({"clip_l": 768, "clip_g": 1280}, "Stable Diffusion XL"),
        ({"emb_params": 48}, "unknown (vectors 48 wide)"),
    ],
)
def test_base_model_and_vectors_of_an_embedding(tmp_path, widths, base):
    file = tmp_path / "cat.safetensors"
    save_file({key: torch.zeros(3, width) for key, width in widths.items()}, file)
    report = inspect_adapter(file)
    assert (report.adapter, report.base_model, report.vectors) == ("textual inversion embedding", base, 3)


def test_other_files_are_not_adapters(tiny: Path):
    assert inspect_adapter(tiny / "unet" / "diffusion_pytorch_model.safetensors") is None
