"""Each kind of LoRA file against its written formula in float64, through a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, einsum

from models.adapters import lora, textual_inversion
from models.checkpoint import load
from models.latent_diffusion import LatentDiffusion
from tests.checkpoints.lora_files import write_lora
from tests.checkpoints.lora_kinds import (
    CASES,
    CONVOLUTION,
    LINEAR,
    LOW_RANK,
    NATIVE,
    NORM,
    double,
    draw,
    kohya,
)


@pytest.fixture(scope="module")
def base(tiny) -> LatentDiffusion:
    return load(tiny)


def opened(base: LatentDiffusion, folder: Path, tensors: dict[str, Tensor]) -> lora.Lora:
    file = write_lora(folder / "a.safetensors", tensors)
    return lora.open_loras({"a": file}, {"m": base.spec})["m"]["a"]


def merged_weight(
    base: LatentDiffusion, folder: Path, tensors: dict[str, Tensor], module: str, weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(weight before, weight after), in float64."""
    changed = lora.apply(base, [(opened(base, folder, tensors), weight, 0.0)])
    name = NATIVE[module] + ".weight"
    return tuple(model.unet.get_parameter(name).double() for model in (base, changed))


@pytest.mark.parametrize("case", CASES)
def test_a_weight_changes_by_the_formula_of_its_kind(base, case, tmp_path):
    module, parts, formula = CASES[case]
    before, after = merged_weight(base, tmp_path, kohya(module, parts), module, 0.7)
    expected = 0.7 * formula(double(parts), before)
    assert expected.norm() > 0.1
    assert ((after - before - expected).norm() / expected.norm()).item() <= 1e-5


@pytest.mark.parametrize("axis", ["per output", "per input"])
@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr of a convolution"])
def test_dora_scales_the_changed_weight_to_its_magnitudes(base, kind, axis, tmp_path):
    module, parts, formula = CASES.get(kind, (LINEAR, LOW_RANK, None))
    before = base.unet.get_parameter(NATIVE[module] + ".weight").double()
    shape = [1] * before.ndim
    kept = 0 if axis == "per output" else 1
    shape[kept] = before.shape[kept]
    magnitude = 1 + draw(*shape).abs()
    p = double(parts)
    delta = formula(p, before) if formula else 0.5 * p["lora_up.weight"] @ p["lora_down.weight"]
    changed = before + delta
    norms = changed.transpose(0, kept).flatten(1).norm(dim=1).reshape(shape)
    expected = before + 0.6 * (magnitude.double() * changed / norms - before)
    _, after = merged_weight(base, tmp_path, kohya(module, parts | {"dora_scale": magnitude}), module, 0.6)
    assert ((after - expected).norm() / expected.norm()).item() <= 1e-6


def test_the_magnitudes_of_peft_are_per_output(base, tmp_path):
    magnitude = 1 + draw(1, 32, 1, 1).abs()
    name = f"base_model.model.unet.{CONVOLUTION}"
    down, up = draw(2, 32, 3, 3), draw(32, 2, 1, 1)
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    before, after = merged_weight(
        base, tmp_path, tensors | {f"{name}.lora_magnitude_vector": magnitude}, CONVOLUTION
    )
    changed = before + einsum("or,rikl->oikl", up[:, :, 0, 0].double(), down.double())
    expected = magnitude.double().reshape(32, 1, 1, 1) * changed
    expected /= changed.flatten(1).norm(dim=1).reshape(32, 1, 1, 1)
    assert ((after - expected).norm() / expected.norm()).item() <= 1e-6


def test_biases_change_by_their_differences(base, tmp_path):
    parts = {"diff": draw(32, 32, 3, 3), "diff_b": draw(32)}
    norm = {"w_norm": draw(64), "b_norm": draw(64)}
    tensors = kohya(CONVOLUTION, parts) | kohya(NORM, norm)
    changed = lora.apply(base, [(opened(base, tmp_path, tensors), 0.5, 0.0)])
    for module, part in ((CONVOLUTION, parts["diff_b"]), (NORM, norm["b_norm"])):
        before, after = (model.unet.get_parameter(NATIVE[module] + ".bias") for model in (base, changed))
        torch.testing.assert_close(after, before + 0.5 * part)


@pytest.mark.parametrize("key", ["string_to_param.*", "emb_params"])
@torch.inference_mode()
def test_embeddings_in_a_file_are_words_of_the_changed_model_only(base, key, tmp_path):
    vectors = draw(2, 32)
    tensors = kohya(LINEAR, LOW_RANK) | {f"bundle_emb.Cat-Toy.{key}": vectors}
    ours = opened(base, tmp_path, tensors)
    changed = lora.apply(base, [(ours, 0.5, 0.5)])
    file = tmp_path / "word.safetensors"
    save_file({"emb_params": vectors}, file)
    word = textual_inversion.read_embedding("cat-toy", file)
    expected = textual_inversion.add_embeddings(base.copy(torch.float32), [word])
    prompt = ["a cat-toy here"]
    assert torch.equal(changed.conditioner(prompt), expected.conditioner(prompt))
    assert not torch.allclose(changed.conditioner(prompt), base.conditioner(prompt))
    table = base.conditioner.encoders[0].transformer.embeddings.token_embedding.weight
    assert lora.changed_bytes([ours], torch.float32) == 4 * (64 * 32 + table.numel())


def test_embeddings_of_another_width_are_ignored_with_a_warning(base, tmp_path):
    ours = opened(base, tmp_path, kohya(LINEAR, LOW_RANK) | {"bundle_emb.wide.emb_params": draw(1, 48)})
    assert ours.embeddings == ()
    assert "bundle_emb.wide" in lora.warning("a", ours)


UNET_NAMES = (
    f"lora_unet_{LINEAR.replace('.', '_')}.lora_{{}}.weight",
    f"lora_unet_{NATIVE[LINEAR].replace('.', '_')}.lora_{{}}.weight",
    f"lycoris_{LINEAR.replace('.', '_')}.lora_{{}}.weight",
    f"{LINEAR.removesuffix('.to_k')}.processor.to_k_lora.{{}}.weight",
    f"unet.{LINEAR.removesuffix('.to_k')}.processor.to_k_lora.{{}}.weight",
    f"unet.{LINEAR}.lora.{{}}.weight",
    f"diffusion_model.{NATIVE[LINEAR]}.lora_{{}}.weight",
)
TEXT = "encoder.layers.0.self_attn.q_proj"
TEXT_NAMES = (
    f"lora_te_text_model_{TEXT.replace('.', '_')}.lora_{{}}.weight",
    f"text_encoder.text_model.{TEXT}.lora_linear_layer.{{}}.weight",
    "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.{}.weight",
    f"text_encoders.clip_l.transformer.text_model.{TEXT}.lora_{{}}.weight",
)


@pytest.mark.parametrize("name", [*UNET_NAMES, *TEXT_NAMES])
def test_every_name_of_a_module_leads_to_it(base, name, tmp_path):
    into = 32
    out = 64 if name in UNET_NAMES else 32
    ours = opened(base, tmp_path, {name.format("down"): draw(2, into), name.format("up"): draw(out, 2)})
    (change,) = ours.changes
    unet, text = NATIVE[LINEAR], f"encoders.0.transformer.{TEXT}"
    assert change.target.parameter == (unet if name in UNET_NAMES else text) + ".weight"
