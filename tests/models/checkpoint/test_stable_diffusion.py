"""Stable Diffusion's single files: what they are, that they compute what others do, what is refused."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from models.checkpoint import CheckpointError, load
from models.checkpoint.conversion import convert
from models.checkpoint.inspection import inspect
from models.formats.identify import read_spec
from models.spec import ModelSpec
from tests.checkpoints import sd_files
from tests.checkpoints.sd_files import Reference, Row
from tests.helpers.numbers import LIMIT, relative_error

pytestmark = pytest.mark.slow

ROWS = tuple(sd_files.ROWS)
PROMPTS = ["red apple", "a photo of a cat! and a dog, by night"]
FACTS = {  # prediction, factor of latents, side
    "sd1": ("epsilon", 0.18215, 512),
    "sd1-inpainting": ("epsilon", 0.18215, 512),
    "sd1-pix2pix": ("epsilon", 0.18215, 512),
    "sd2": ("v_prediction", 0.18215, 768),
    "sd2-inpainting": ("epsilon", 0.18215, 512),
    "sd-x4": ("v_prediction", 0.08333, 512),
    "sdxl": ("epsilon", 0.13025, 1024),
    "sdxl-inpainting": ("epsilon", 0.13025, 1024),
    "sdxl-refiner": ("epsilon", 0.13025, 1024),
}
OPEN = "cond_stage_model.model."
RES = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"


@cache
def made(name: str) -> tuple[Row, Reference]:
    """A narrow row, and its networks; those of inpainting differ in the UNet only."""
    row, plain = (
        sd_files.narrow(sd_files.ROWS[name]),
        name.removesuffix("-inpainting").removesuffix("-pix2pix"),
    )
    if plain == name:
        return row, sd_files.reference(row)
    return row, made(plain)[1]._replace(unet=sd_files.random(sd_files.make_unet(row), 1))


def outline(folder, name, edit=lambda tensors: None, words=None):
    """A file whose header alone is of interest: the weights are zeros."""
    tensors = {
        key: value for key, value in sd_files.published(name, *made(name)).items() if "betas" not in key
    }
    edit(tensors)
    return sd_files.hollow(folder / f"{name}.safetensors", tensors, words)


def write(folder, name, edit=lambda tensors: None, averaged=False):
    tensors = sd_files.published(name, *made(name), averaged)
    edit(tensors)
    save_file(tensors, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def outputs(row: Row, model, networks: Reference) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """name -> (our output, the reference's), for every network of a model."""
    generator = torch.Generator().manual_seed(1)
    ids = model.conditioner.tokenize(PROMPTS)
    encoded = model.conditioner.encode(ids)
    context, pooled = networks.context(row, ids)
    x, t = torch.randn(2, row.in_channels, 16, 8, generator=generator), torch.tensor([1, 801])
    added, options = None, {}
    if row.size_width:
        numbers = torch.tensor([row.numbers] * 2)
        options = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": numbers}}
        added = torch.cat([pooled, model.size_embedding(64, 96).expand(2, -1)], dim=-1)
    levels = torch.tensor([20, 350]) if row.noise_levels else None
    if row.noise_levels:
        options = {"class_labels": levels}
    z = torch.randn(1, 4, 8, 8, generator=generator)
    image = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    pairs = {
        "eps": (model.unet(x, t, context, added, levels), networks.unet(x, t, context, **options).sample),
        "context": (encoded.tokens, context),
        "D": (model.autoencoder.decode(z), networks.autoencoder.decode(z).sample),
        "E": (model.autoencoder.encode(image), networks.autoencoder.encode(image).latent_dist.mode()),
    }
    return pairs | ({"pooled": (encoded.pooled, pooled)} if row.size_width else {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
@torch.inference_mode()
def test_each_model_is_recognised_and_matches_the_reference(tmp_path, name):
    file = write(tmp_path, name)
    model, (row, networks) = load(file), made(name)
    for what, (ours, theirs) in outputs(row, model, networks).items():
        assert relative_error(ours, theirs) <= LIMIT, what
    spec = model.spec
    facts = spec.schedule.prediction, spec.autoencoder.scale_factor, spec.defaults.width
    assert facts == FACTS[name]
    ends = (0.0001, 0.02) if name == "sd-x4" else (0.00085, 0.012)
    assert (spec.schedule.beta_start, spec.schedule.beta_end) == ends
    assert spec.mask_channels == ("inpainting" in name)
    assert spec.edits == ("pix2pix" in name)
    assert spec.autoencoder.upcast == ("xl" in name or name == "sd-x4")
    assert spec.zero_null == (name in ("sdxl", "sdxl-inpainting"))
    assert [text.pad_id for text in spec.texts] == [0 if text.open_clip else 49407 for text in row.texts]
    assert spec == read_spec(file) == ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert not inspect(file).problems


@torch.inference_mode()
def test_the_short_prompts_padding(tmp_path):
    """The first encoder pads with the end token, the second with 0."""
    first, second = load(write(tmp_path, "sdxl")).conditioner.tokenize(["red apple"])
    assert first[0, :5].tolist() == [49406, 736, 3055, 49407, 49407]
    assert second[0, :5].tolist() == [49406, 736, 3055, 49407, 0]


@torch.inference_mode()
def test_averaged_weights_are_used_on_request(tmp_path):
    model, (row, networks) = load(write(tmp_path, "sd1", averaged=True), weights="ema"), made("sd1")
    assert relative_error(*outputs(row, model, networks)["eps"]) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd1", "sd2"])
@torch.inference_mode()
def test_half_precision_and_pickles(tmp_path, name):
    row, networks = made(name)
    halves = {
        key: value.half() if value.is_floating_point() else value
        for key, value in sd_files.published(name, row, networks).items()
        if "betas" not in key
    }
    torch.save({"state_dict": halves, "global_step": 9}, tmp_path / "half.ckpt")
    with pytest.raises(CheckpointError, match="allow_pickle"):
        load(tmp_path / "half.ckpt")
    model = load(tmp_path / "half.ckpt", allow_pickle=True)
    assert model.unet.dtype == torch.float32
    for what, (ours, theirs) in outputs(row, model, networks).items():
        assert relative_error(ours, theirs) <= 5e-3, what


@pytest.mark.slow
@torch.inference_mode()
def test_files_written_by_others_lack_some_names(tmp_path):
    """Names of later versions of `transformers`; a text encoder without its last layer and projection."""

    def shorter(tensors):
        for key in [key for key in tensors if ".text_model." in key]:
            tensors[key.replace(".text_model.", ".")] = tensors.pop(key)
        del tensors["cond_stage_model.transformer.embeddings.position_ids"]

    model, (row, networks) = load(write(tmp_path, "sd1", shorter)), made("sd1")
    assert relative_error(*outputs(row, model, networks)["context"]) <= LIMIT

    def without_last(tensors):
        for key in [key for key in tensors if ".resblocks.2." in key or key.endswith("text_projection")]:
            del tensors[key]

    model, (row, networks) = load(write(tmp_path, "sd2", without_last)), made("sd2")
    assert relative_error(*outputs(row, model, networks)["context"]) <= LIMIT


def test_the_prediction_of_stable_diffusion_2(tmp_path):
    """No tensor shows it: v, unless a YAML file, the caller or a mark in the file gives another."""
    file, note = outline(tmp_path, "sd2"), tmp_path / "sd2.yaml"

    def found(*given):
        spec = read_spec(file, False, *given)
        return spec.schedule.prediction, spec.defaults.width

    eps, v = ("epsilon", 512), ("v_prediction", 768)
    assert (found(), found("epsilon"), found("v_prediction")) == (v, eps, v)
    assert "assuming v_prediction" in inspect(file).notes[0]
    assert "assuming epsilon" in inspect(file, prediction="epsilon").notes[0]
    note.write_text("model: {params: {parameterization: v}}")
    assert (found(), found("epsilon")) == (v, v)
    assert not inspect(file).notes
    note.write_text("model: {params: {parameterization: eps}}")
    assert (found(), found("v_prediction")) == (eps, eps)
    note.write_text("model: {params: {linear_start: 0.00085, linear_end: 0.012, unet_config: {}}}")
    assert found() == eps  # as CompVis's code takes it
    scaling = "{denoiser_config: {params: {scaling_config: {target: sgm.VScaling}}}, network_config: {}}"
    note.write_text(f"model: {{params: {scaling}}}")
    assert found() == v
    note.write_text(note.read_text().replace("VScaling", "EDMScaling"))
    with pytest.raises(CheckpointError, match="scaling_config is 'EDMScaling'; supported are EpsScaling"):
        found()
    note.write_text("model: {params: {scale_factor: 0.18215}}")
    assert (found(), found("epsilon")) == (v, eps)
    note.unlink()
    assert load(file, prediction="epsilon").spec.schedule.prediction == "epsilon"


def test_the_prediction_of_other_models(tmp_path):
    file = outline(tmp_path, "sd1")
    assert read_spec(file, prediction="v_prediction").schedule.prediction == "epsilon"  # not of this model
    (tmp_path / "sd1.yaml").write_text("model: {params: {parameterization: v}}")
    assert read_spec(file).schedule.prediction == "v_prediction"
    marked = outline(tmp_path, "sd2", words={"modelspec.prediction_type": "epsilon"})
    assert (read_spec(marked).schedule.prediction, read_spec(marked).defaults.width) == ("epsilon", 512)
    assert not [note for note in inspect(marked).notes if "epsilon or v" in note]
    file = outline(tmp_path, "sdxl", lambda tensors: tensors.update(v_pred=torch.zeros(0)))
    assert load(file).spec.schedule.prediction == "v_prediction"


YAML = {
    "linear_start": 0.00085, "linear_end": 0.012, "parameterization": "v", "image_size": 64, "channels": 4,
    "scale_factor": 0.18215,
    "unet_config": {
        "params": {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": 2,
            "attention_resolutions": [4, 2, 1], "channel_mult": [1, 1, 2, 2], "num_head_channels": 64,
            "use_spatial_transformer": True, "use_linear_in_transformer": True, "transformer_depth": 1,
            "context_dim": 128,
        }
    },
    "first_stage_config": {"params": {"embed_dim": 4, "ddconfig": {"ch": 32, "ch_mult": [1, 2, 4, 4]}}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value", "what"),
    [
        ("use_linear_in_transformer", False, "use_linear_in_transformer is False"),
        ("context_dim", 1024, "context_dim is 1024, but the weights have 128"),
        ("transformer_depth", 2, "transformer_depth is 2"),
        ("transformer_depth", [1, 2, 1, 1], r"transformer_depth is \(1, 2, 1, 1\)"),
        ("in_channels", 9, "in_channels is 9"),
        ("num_head_channels", 48, "heads do not divide"),
    ],
)
def test_a_yaml_file_must_agree(tmp_path, option, value, what):
    file = outline(tmp_path, "sd2")
    (tmp_path / "sd2.yaml").write_text(json.dumps({"model": {"params": YAML}}))
    assert (read_spec(file).schedule.prediction, read_spec(file).defaults.width) == ("v_prediction", 768)
    unet = YAML["unet_config"]["params"] | {option: value}
    changed = YAML | {"unet_config": {"params": unet}}
    (tmp_path / "sd2.yaml").write_text(json.dumps({"model": {"params": changed}}))
    with pytest.raises(CheckpointError, match=what):
        read_spec(file)


def test_sdxls_yaml_file(tmp_path):
    file = outline(tmp_path, "sdxl")
    unet = {"adm_in_channels": 176, "transformer_depth": [1, 2, 3], "num_head_channels": 64}
    unet |= {"num_classes": "sequential", "context_dim": 256, "attention_resolutions": [4, 2]}
    params = {"scale_factor": 0.13025, "network_config": {"params": unet}}
    (tmp_path / "sdxl.yaml").write_text(json.dumps({"model": {"params": params}}))
    assert read_spec(file).schedule.prediction == "epsilon"
    unet["adm_in_channels"] = 2816
    (tmp_path / "sdxl.yaml").write_text(json.dumps({"model": {"params": params}}))
    with pytest.raises(CheckpointError, match="adm_in_channels is 2816, but the weights have 176"):
        read_spec(file)


@pytest.mark.parametrize(
    ("name", "key", "what"),
    [
        ("sd1", "model.diffusion_model.out.2.bias", "UNet: 1 missing"),
        ("sd1", "first_stage_model.quant_conv.bias", "Autoencoder: 1 missing"),
        ("sd1", "cond_stage_model.transformer.text_model.final_layer_norm.bias", "TextEncoder: 1 missing"),
        ("sd2", OPEN + "positional_embedding", "missing"),
        ("sd2", OPEN + "transformer.resblocks.1.ln_1.bias", "TextEncoder: 1 missing"),
        ("sd2", OPEN + "transformer.resblocks.0.attn.in_proj_weight", "TextEncoder: 3 missing"),
        ("sdxl", "conditioner.embedders.1.model.ln_final.weight", "TextEncoder: 1 missing"),
        ("sdxl", "conditioner.embedders.1.model.text_projection", "missing"),
        ("sdxl", "model.diffusion_model.label_emb.0.2.bias", "UNet: 1 missing"),
    ],
)
def test_missing_keys_are_named(tmp_path, name, key, what):
    with pytest.raises(CheckpointError, match=what) as caught:
        load(outline(tmp_path, name, lambda tensors: tensors.pop(key)))
    assert key in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.x",
        OPEN + "transformer.resblocks.1.x",
        "low_scale_model.x",
        "cond_stage_model.transformer.x",
    ],
)
def test_unexpected_keys_are_named(tmp_path, key):
    with pytest.raises(CheckpointError, match=f"1 unexpected keys: {key}"):
        load(outline(tmp_path, "sd2", lambda tensors: tensors.update({key: torch.zeros(2)})))


@pytest.mark.parametrize(
    ("name", "key", "what"),
    [
        ("sd2", OPEN + "transformer.resblocks.0.attn.in_proj_weight", "misshaped"),
        ("sd2", OPEN + "transformer.resblocks.1.ln_1.bias", "misshaped"),
        ("sdxl", "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "misshaped"),
    ],
)
def test_misshaped_keys_are_named(tmp_path, name, key, what):
    with pytest.raises(CheckpointError, match=rf"TextEncoder: \d {what} keys: {key}"):
        load(outline(tmp_path, name, lambda tensors: tensors.update({key: torch.zeros(6, 6)})))


def test_unused_tensors_are_ignored_by_name(tmp_path):
    names = [
        OPEN + "attn_mask",
        "denoiser.sigmas",
        "model_ema.decay",
        "model_ema.num_updates",
        "alphas_cumprod",
    ]
    load(outline(tmp_path, "sd2", lambda tensors: tensors.update({name: torch.zeros(2) for name in names})))


@pytest.mark.parametrize(
    ("name", "edit", "what"),
    [
        (
            "sd2",
            lambda ts: ts.update({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 5, 3, 3)}),
            "depth2img, whose UNet has 5 input channels",
        ),
        (
            "sd1",
            lambda ts: ts.update(
                {
                    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.zeros(
                        9, 128
                    )
                }
            ),
            "has 9 tokens, CLIP's tokenizer 49408",
        ),
        ("sd2", lambda ts: ts.update({OPEN + "token_embedding.weight": torch.zeros(49408, 64)}), "128 wide"),
        (
            "sdxl",
            lambda ts: ts.update({"model.diffusion_model.label_emb.0.0.weight": torch.zeros(9, 7)}),
            "vector",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_a_one_line_error(tmp_path, name, edit, what):
    with pytest.raises(CheckpointError, match=what):
        load(outline(tmp_path, name, edit))


def test_betas_are_the_files_own(tmp_path):
    file = write(tmp_path, "sd1", lambda tensors: tensors.update(betas=sd_files.betas(0.001, 0.02)))
    assert (read_spec(file).schedule.beta_start, read_spec(file).schedule.beta_end) == (0.001, 0.02)
    with pytest.raises(CheckpointError, match="betas are not 1000"):
        read_spec(write(tmp_path, "sd1", lambda ts: ts.update(betas=torch.linspace(0.00085, 0.012, 1000))))


def test_the_upscalers_two_schedules(tmp_path):
    spec = read_spec(write(tmp_path, "sd-x4"))
    assert (spec.tasks, spec.unet.cross_only) == (("upscaling",), (False, True, True, False))
    assert (spec.defaults.guidance_scale, spec.defaults.noise_level) == (9.0, 20)
    noise = spec.upscaling.noise
    assert (noise.beta_start, noise.beta_end, spec.upscaling.max_noise_level) == (0.0001, 0.02, 350)
    key = "low_scale_model.betas"
    with pytest.raises(CheckpointError, match="betas are not 1000"):
        read_spec(write(tmp_path, "sd-x4", lambda tensors: tensors.update({key: sd_files.betas(0.1, 0.2)})))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd1-inpainting", "sd1-pix2pix", "sd2", "sd-x4", "sdxl", "sdxl-refiner"])
@torch.inference_mode()
def test_diffusers_loads_the_converted_folder(tmp_path, name):
    file, (row, networks) = write(tmp_path, name), made(name)
    convert(file, tmp_path / "folder")
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    texts = [text for name in ("", "_2") if (text := getattr(theirs, f"text_encoder{name}", None))]
    assert theirs.scheduler.config.prediction_type == FACTS[name][0]
    assert theirs.vae.config.scaling_factor == FACTS[name][1]

    ours = load(tmp_path / "folder")
    assert replace(ours.spec, name=name) == read_spec(file)
    spread = theirs.vae, theirs.unet, *texts
    held = networks.autoencoder, networks.unet, *networks.texts
    for after, before in zip(spread, held, strict=True):
        there = {key.removeprefix("text_model."): value for key, value in before.state_dict().items()}
        for key, value in after.state_dict().items():
            assert torch.equal(value, there[key.removeprefix("text_model.")]), key
    for what, (mine, other) in outputs(row, ours, networks).items():
        assert relative_error(mine, other) <= LIMIT, what
    tokenizer = getattr(theirs, "tokenizer_2", theirs.tokenizer)
    ids = tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ids, ours.conditioner.tokenize(PROMPTS)[-1])


def test_the_refiner_refines_images(tmp_path):
    spec = read_spec(outline(tmp_path, "sdxl-refiner"))
    assert spec.aesthetic_score
    assert spec.tasks == ("image-to-image", "inpainting")
