"""Single files as people find them: merged, rounded, marked in headers, with tensors missing or left over."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import CheckpointError, load
from models.checkpoint.conversion import convert
from models.checkpoint.inspection import as_text, inspect
from models.formats.identify import identify, read_spec, with_vae
from tests.checkpoints import ldm_files, sd_files

pytestmark = pytest.mark.slow

NAMES = ("sd1", "sd2", "sdxl")
ROWS = {name: sd_files.narrow(sd_files.ROWS[name]) for name in NAMES}
UNET = "model.diffusion_model."
VAE = "first_stage_model."
PROJECTION = "conditioner.embedders.1.model.text_projection"


@pytest.fixture(scope="module")
def networks() -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each model's file."""
    return {name: sd_files.published(name, row, sd_files.reference(row)) for name, row in ROWS.items()}


def write(folder: Path, tensors: dict, name: str = "model-a", words: dict | None = None) -> Path:
    file = folder / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata=words)
    return file


def rounded(tensors: dict, dtype: torch.dtype) -> dict:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}


@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_rounded_tables_give_the_exact_schedule(tmp_path, networks, dtype, form):
    tensors = rounded(networks["sd1"], dtype)
    if form == "ckpt":
        torch.save({"state_dict": tensors}, file := tmp_path / "half.CKPT")
    else:
        file = write(tmp_path, tensors, "half").rename(tmp_path / "half.SafeTensors")
    model = load(file, allow_pickle=True)
    assert (model.spec.schedule.beta_start, model.spec.schedule.beta_end) == (0.00085, 0.012)
    key = "input_blocks.1.0.in_layers.2.weight"
    assert torch.equal(model.unet.state_dict()[key], tensors[UNET + key].float())


def test_rounded_tables_of_the_papers_files(tmp_path):
    file = ldm_files.write(tmp_path, "lsun_churches")
    half = write(tmp_path, rounded(load_file(file), torch.float16), "half")
    assert read_spec(half).schedule == read_spec(file).schedule


def test_rounded_tables_of_another_schedule_are_refused(tmp_path, networks):
    changed = networks["sd1"] | {"betas": torch.linspace(0.00085, 0.012, 1000).half()}
    with pytest.raises(CheckpointError, match="evenly spaced square roots"):
        read_spec(write(tmp_path, changed))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_empty_tensors_mark_v_prediction_and_zero_terminal_snr(tmp_path, networks, name):
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    schedule = load(write(tmp_path, networks[name] | marks)).spec.schedule
    assert (schedule.prediction, schedule.zero_terminal_snr, schedule.spacing) == (
        "v_prediction",
        True,
        "trailing",
    )
    v_alone = read_spec(write(tmp_path, networks[name] | {"v_pred": torch.zeros(0)})).schedule
    assert (v_alone.prediction, v_alone.zero_terminal_snr) == ("v_prediction", False)


@pytest.mark.parametrize("key", ["modelspec.predict_key", "modelspec.prediction_type"])
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("sdxl", "v", "v_prediction"),
        ("sd2", "epsilon", "epsilon"),
        ("sd1", "v_prediction", "v_prediction"),
    ],
)
def test_the_header_says_what_is_predicted(tmp_path, networks, key, name, value, expected):
    report = inspect(write(tmp_path, networks[name], words={key: value}))
    assert report.schedule["prediction"] == expected
    assert report.prediction_origin == f"{key} in the file's header"


def test_the_files_own_mark_is_believed_before_a_yaml_file(tmp_path, networks):
    file = write(tmp_path, networks["sd2"] | {"v_pred": torch.zeros(0)})
    file.with_suffix(".yaml").write_text("model: {params: {parameterization: eps}}")
    report = inspect(file)
    assert report.schedule["prediction"] == "v_prediction"
    assert "the tensor v_pred says v_prediction" in report.notes[0]
    assert "model-a.yaml says otherwise" in report.notes[0]


def test_an_unknown_prediction_in_the_header_is_refused(tmp_path, networks):
    with pytest.raises(CheckpointError, match="'flow'; supported are epsilon, v and sample"):
        read_spec(write(tmp_path, networks["sdxl"], words={"modelspec.prediction_type": "flow"}))


@pytest.mark.parametrize(
    ("name", "key", "noted"),
    [
        ("sd1", "cond_stage_model.transformer.text_projection.weight", False),
        ("sd1", "cond_stage_model.logit_scale", False),
        ("sd1", "cond_stage_model.transformer.vision_model.post_layernorm.weight", False),
        ("sd2", "cond_stage_model.model.visual.proj", False),
        ("sdxl", "conditioner.embedders.0.logit_scale", False),
        ("sdxl", "conditioner.embedders.0.transformer.text_projection.weight", False),
        ("sdxl", "denoiser.sigmas", False),
        ("sd1", "first_stage_model.model_ema.decay", False),
        ("sd1", "embedding_manager.string_to_param_dict.x", True),
        ("sd1", "safety_checker.concept_embeds", True),
        ("sd1", "global_step", True),
        ("sd1", "optimizer_states.0.step", True),
    ],
)
def test_tensors_that_change_no_image_are_ignored(tmp_path, networks, name, key, noted, caplog):
    with caplog.at_level(logging.WARNING):
        load(write(tmp_path, networks[name] | {key: torch.zeros(2)}))
    assert (f"1 ignored keys: {key}" in caplog.text) == noted


def test_a_projection_may_be_a_linear_layers(tmp_path, networks):
    tensors = dict(networks["sdxl"])
    expected = load(write(tmp_path, tensors)).conditioner.encoders[1].text_projection.weight
    tensors[PROJECTION + ".weight"] = tensors.pop(PROJECTION).T
    found = load(write(tmp_path, tensors, "linear")).conditioner.encoders[1].text_projection.weight
    assert torch.equal(found, expected)


def without_vae(tensors: dict) -> dict:
    return {key: value for key, value in tensors.items() if not key.startswith(VAE)}


@pytest.mark.parametrize("names", ["CompVis", "diffusers"])
def test_a_file_without_a_vae_takes_one_from_elsewhere(tmp_path, networks, names):
    file = write(tmp_path, without_vae(networks["sd1"]))
    with pytest.raises(CheckpointError, match="holds no VAE; give one with --vae"):
        load(file)
    if names == "CompVis":
        own = {key.removeprefix(VAE): value for key, value in networks["sd1"].items() if VAE in key}
    else:
        own = sd_files.reference(ROWS["sd1"]).autoencoder.state_dict()
    vae = write(tmp_path, own, "vae")
    complete, model = load(write(tmp_path, networks["sd1"], "whole")), load(with_vae(identify(file), vae))
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.autoencoder.decode(z), complete.autoencoder.decode(z))
    assert model.spec.autoencoder.scale_factor == 0.18215


def averages(tensors: dict, factor: float) -> dict:
    return {
        "model_ema." + key.removeprefix("model.").replace(".", ""): value * factor
        for key, value in tensors.items()
        if key.startswith(UNET)
    }


def test_trained_weights_of_stable_diffusion_are_preferred_to_averages(tmp_path, networks):
    tensors, key = networks["sd1"], "out.2.weight"
    file = write(tmp_path, tensors | averages(tensors, 2))
    factors = {"auto": 1, "raw": 1, "ema": 2}
    for choice, factor in factors.items():
        weight = load(file, weights=choice).unet.state_dict()[key]
        assert torch.equal(weight, tensors[UNET + key] * factor), choice
    assert "--weights ema" in inspect(file).notes[0]
    assert "averaged (EMA)" in as_text(inspect(file, weights="ema"))


def test_averages_that_lack_tensors_are_ignored_with_a_note(tmp_path, networks):
    tensors = networks["sd1"]
    some = dict(list(averages(tensors, 2).items())[5:])
    report = inspect(file := write(tmp_path, tensors | some), weights="ema")
    assert "lack 5 of" in report.notes[0]
    assert not report.averaged
    load(file)


def test_averages_alone_are_used(tmp_path, networks):
    tensors = networks["sdxl"]
    rest = {key: value for key, value in tensors.items() if not key.startswith(UNET)}
    file = write(tmp_path, rest | averages(tensors, 1))
    assert torch.equal(load(file).unet.state_dict()["out.2.weight"], tensors[UNET + "out.2.weight"])
    assert "averaged weights (EMA) only" in inspect(file).notes[0]


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight", UNET + "single_blocks.0.x"], "FLUX"),
        (["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"], "Stable Diffusion 3"),
        (["adaln_single.linear.weight"], "PixArt"),
        (
            ["lora_unet_mid_block_attentions_0.lora_down.weight"],
            "a LoRA, which is added to a model with --lora",
        ),
        (["lora_unet_conv_in.hada_w1_a", "lora_unet_conv_in.alpha"], "a LoRA, which is added"),
        (["lycoris_down_blocks_0_resnets_0_conv1.lokr_w1"], "a LoRA, which is added"),
        (["diffusion_model.input_blocks.4.1.proj_in.lora_up.weight"], "a LoRA, which is added"),
        (["decoder.mid_block.resnets.0.norm1.weight"], "a VAE alone: add it to a model with --vae"),
        ([VAE + "decoder.conv_in.weight"], "a VAE alone: add it to a model with --vae"),
        (
            ["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"],
            "a motion module of AnimateDiff",
        ),
        ([UNET + "input_blocks.1.1.time_stack.0.attn1.to_q.weight"], "Stable Video Diffusion"),
        (["clip_txt_mapper.weight"], "Stable Cascade"),
        (["add_embedding.image_proj.weight"], "Kandinsky 2"),
        (["encoder_pooling.0.weight"], "DeepFloyd IF"),
        (["patchify_proj.weight", "adaln_single.linear.weight"], "LTX-Video"),
        (["transformer_blocks.0.img_mod.1.weight"], "Qwen-Image"),
        (["embedder.model.visual.proj", UNET + "x"], "Stable unCLIP"),
        (["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"], "an upscaler of pixels"),
        (["params_ema.conv_first.weight"], "an upscaler of pixels"),
        (["1.conv.0.weight", "14.weight"], "a tiny autoencoder"),
        (["text_model.embeddings.token_embedding.weight"], "a CLIP text encoder"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5 text encoder"),
        (["emb_params"], "a textual inversion embedding, which is added to a model with --embedding"),
        (
            ["control_model.input_hint_block.0.weight"],
            "a ControlNet, which is added to a model with --controlnet",
        ),
        (["lora_controlnet"], "a Control-LoRA, which is added to a model with --controlnet"),
        (["task_embedding"], r"a ControlNet\+\+ \(union\), which is added to a model with --controlnet"),
        (["body.0.block1.weight"], "a T2I-Adapter, which is added to a model with --controlnet"),
        (["image_proj.proj.weight"], "an IP-Adapter, which is added to a model with --reference-adapter"),
        (["vision_model.embeddings.class_embedding"], "a CLIP image encoder, which is for IP-Adapters"),
        (["time_embedding.linear_1.weight"], "a UNet alone: it contains no text encoder and no VAE"),
        ([UNET + "input_blocks.1.0.in_layers.0.scale_weight"], "scaled fp8"),
    ],
)
def test_other_kinds_of_files_are_refused_by_name(tmp_path, keys, what):
    with pytest.raises(CheckpointError, match=what):
        read_spec(write(tmp_path, {key: torch.zeros(2) for key in keys}))


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ([], "a UNet alone of Stable Diffusion XL: it contains no text encoder and no VAE"),
        ([VAE + "x"], "a UNet and a VAE of Stable Diffusion XL: it contains no text encoder"),
    ],
)
def test_what_a_unet_lacks_is_named(tmp_path, keys, what):
    unet = {
        UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(2, 2048),
        UNET + "out.2.weight": torch.zeros(4, 2, 3, 3),
    }
    with pytest.raises(CheckpointError, match=what):
        read_spec(write(tmp_path, unet | {key: torch.zeros(2) for key in keys}))


def test_conversion_keeps_what_the_file_says(tmp_path, networks):
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    file = write(tmp_path, rounded(networks["sdxl"], torch.float16) | marks)
    convert(file, tmp_path / "converted")
    before, after = load(file), load(tmp_path / "converted")
    assert after.spec.schedule.prediction == "v_prediction"
    assert after.spec.schedule.zero_terminal_snr
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.unet.state_dict().values(), after.unet.state_dict().values(), strict=True)
    )
    config = json.loads((tmp_path / "converted/scheduler/scheduler_config.json").read_text())
    assert config["rescale_betas_zero_snr"] is True
