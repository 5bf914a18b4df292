import json
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from models.checkpoint import CheckpointError, load, read_spec, save
from models.checkpoint.inspection import inspect
from models.checkpoint.parts import autoencoder_names, unet_names
from models.networks.autoencoder import Autoencoder
from models.networks.unet import UNet
from models.spec import AutoencoderSpec, UNetSpec
from tests.checkpoints.tiny import fill_randomly, tiny_model, tiny_spec, write_tiny_model

pytestmark = pytest.mark.slow

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return write_tiny_model(tmp_path / "tiny")


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file, edit):
    tensors = load_file(file)
    save_file(edit(tensors), file, metadata={"format": "pt"})


def same_weights(a, b):
    pairs = ((a.unet, b.unet), (a.autoencoder, b.autoencoder), (a.conditioner, b.conditioner))
    return all(
        torch.equal(value, other.state_dict()[key])
        for one, other in pairs
        for key, value in one.state_dict().items()
    )


def test_what_is_saved_is_what_is_loaded(tmp_path):
    model = tiny_model(seed=3, prediction="v_prediction")
    save(model, tmp_path / "m", dtype=torch.float32)
    loaded = load(tmp_path / "m")
    assert loaded.spec == model.spec
    assert same_weights(loaded, model)


@torch.inference_mode()
def test_an_autoencoder_on_patches_is_saved_and_loaded(tmp_path):
    model = tiny_model()
    spec = replace(model.spec.autoencoder, channels=(16, 16), patch_size=4)
    assert spec.factor == 8
    model.spec, model.autoencoder = replace(model.spec, autoencoder=spec), Autoencoder(spec)
    fill_randomly(model.autoencoder, seed=1)
    save(model, tmp_path / "m", dtype=torch.float32)
    loaded, x = load(tmp_path / "m"), torch.rand(1, 3, 64, 32) * 2 - 1
    z = loaded.autoencoder.encode(x)
    assert z.shape == (1, 4, 8, 4)
    assert torch.equal(z, model.autoencoder.encode(x))
    assert loaded.autoencoder.decode(z).shape == x.shape


def test_half_precision_is_the_form_on_disk(folder):
    assert load_file(folder / UNET)["conv_in.weight"].dtype == torch.float16
    assert load(folder).unet.dtype == torch.float32
    assert load(folder, dtype=torch.bfloat16).autoencoder.dtype == torch.bfloat16


@torch.inference_mode()
def test_diffusers_loads_what_is_saved(tmp_path):
    model = tiny_model()
    save(model, tmp_path / "m", dtype=torch.float32)
    reference = StableDiffusionPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), model.conditioner(["a", "red apple"])
    torch.testing.assert_close(
        reference.unet(x, t, context).sample, model.unet(x, t, context), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(reference.vae.decode(x).sample, model.autoencoder.decode(x), rtol=0, atol=1e-4)
    ids = reference.tokenizer(["a", "red apple"], padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(reference.text_encoder(ids).last_hidden_state, context, rtol=0, atol=1e-4)


def test_the_spec_is_read_without_weights(folder):
    for name in (UNET, VAE, TEXT):
        (folder / name).unlink()
    assert read_spec(folder) == tiny_spec()


def test_a_folder_without_ldm_json_has_its_own_name_and_size(folder):
    (folder / "ldm.json").unlink()
    spec = read_spec(folder)
    assert (spec.name, spec.defaults.width, spec.defaults.height) == ("tiny", 64, 64)


def test_variant_file_names_are_found(folder):
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    (folder / TEXT).rename(folder / "text_encoder/model.fp16.safetensors")
    load(folder)


@pytest.mark.parametrize("variant", ["bf16", "non_ema"])
def test_the_only_variant_is_used_with_a_note(folder, variant):
    (folder / UNET).rename(folder / f"unet/diffusion_pytorch_model.{variant}.safetensors")
    load(folder)
    (note,) = inspect(folder).notes
    assert f"unet/diffusion_pytorch_model.{variant}.safetensors is used" in note


@pytest.mark.parametrize(
    "pipeline",
    ["StableDiffusionImg2ImgPipeline", "LatentConsistencyModelPipeline", "StableDiffusionControlNetPipeline"],
)
def test_folders_of_other_pipelines_with_the_same_networks(folder, pipeline):
    before = load(folder)
    edit_json(folder / "model_index.json", _class_name=pipeline)
    assert same_weights(load(folder), before)


def test_older_key_styles_are_the_same_model(folder):
    before = load(folder)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def age(tensors):
        for new, name in old.items():
            tensors = {
                k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for k, v in tensors.items()
            }
        return tensors

    edit_tensors(folder / VAE, age)
    assert "encoder.mid_block.attentions.0.query.weight" in load_file(folder / VAE)
    edit_tensors(folder / TEXT, lambda ts: {k.removeprefix("text_model."): v for k, v in ts.items()})
    assert same_weights(load(folder), before)


def test_position_ids_of_older_text_encoders_are_ignored(folder):
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    edit_tensors(folder / TEXT, lambda tensors: tensors | ids)
    load(folder)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        (UNET, "mid_block.resnets.0.conv1.weight"),
        (VAE, "quant_conv.bias"),
        (TEXT, "text_model.final_layer_norm.weight"),
    ],
)
def test_wrong_keys_are_named(folder, file, key):
    whole, bare = load_file(folder / file), key.removeprefix("text_model.")
    save_file({k: v for k, v in whole.items() if k != key}, folder / file)
    with pytest.raises(CheckpointError, match=f"1 missing keys: {bare}"):
        load(folder)
    save_file(whole | {f"extra{i}": torch.zeros(1) for i in range(9)}, folder / file)
    with pytest.raises(CheckpointError, match=r"9 unexpected keys: extra0, extra1.* and 5 more"):
        load(folder)
    save_file(whole | {key: torch.zeros(5)}, folder / file)
    with pytest.raises(CheckpointError, match=rf"1 misshaped keys: {bare} \(5,\) \(expected"):
        load(folder)


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:5], lambda b: b"", lambda b: b"x" * 999]
)
def test_damaged_weights_are_a_one_line_error(folder, file, damage):
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(CheckpointError, match=r"safetensors is corrupt or truncated"):
        load(folder)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        UNET,
        TEXT,
    ],
)
def test_missing_files_are_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file} is missing"):
        load(folder)


def test_code_in_a_folder_is_never_run(folder):
    """The auto_map of transformers is ignored, a pipeline of the folder's own is refused."""
    code = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\nclass Custom: pass\n"
    for part in (".", "unet", "text_encoder", "tokenizer"):
        (folder / part / "custom.py").write_text(code)
    for file in ("text_encoder/config.json", "unet/config.json"):
        edit_json(folder / file, auto_map={"AutoModel": "custom.Custom", "AutoConfig": "custom.Custom"})
    load(folder)
    edit_json(folder / "model_index.json", _class_name=["custom", "Custom"])
    with pytest.raises(CheckpointError, match="custom"):
        load(folder)
    assert not list(folder.rglob("*.ran"))


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_broken_configurations_are_named(folder, text):
    (folder / "unet/config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"unet/config.json"):
        load(folder)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"model": 3}'])
def test_a_broken_tokenizer_is_named(folder, damage):
    (folder / "tokenizer/tokenizer.json").write_text(damage)
    with pytest.raises(CheckpointError, match="tokenizer"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("unet/config.json", {"class_embed_type": "timestep"}),
        ("unet/config.json", {"addition_embed_type": "image"}),
        ("unet/config.json", {"act_fn": "mish"}),
        ("unet/config.json", {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}),
        ("unet/config.json", {"up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}),
        ("unet/config.json", {"block_out_channels": [30, 64]}),
        ("unet/config.json", {"block_out_channels": "wide"}),
        ("unet/config.json", {"attention_head_dim": [5, 4]}),
        ("unet/config.json", {"attention_head_dim": 0}),
        ("unet/config.json", {"layers_per_block": [1, 2]}),
        ("unet/config.json", {"layers_per_block": 10**9}),  # would be listed one by one
        ("unet/config.json", {"transformer_layers_per_block": [1, 10**9]}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}),
        ("vae/config.json", {"layers_per_block": 10**9}),
        ("vae/config.json", {"scaling_factor": 0}),
        ("vae/config.json", {"scaling_factor": "0.18"}),
        ("unet/config.json", {"in_channels": None}),
        ("vae/config.json", {"shift_factor": 0.1}),
        ("vae/config.json", {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}),
        ("text_encoder/config.json", {"hidden_act": "relu"}),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "squaredcos_cap_v2"}),
        ("scheduler/scheduler_config.json", {"beta_start": -0.1}),
        ("scheduler/scheduler_config.json", {"beta_end": 1.5}),
        ("scheduler/scheduler_config.json", {"steps_offset": -1}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}),
        ("model_index.json", {"unet": ["diffusers", "UNet3DConditionModel"]}),
        ("ldm.json", {"defaults": {"width": 65}}),
        ("ldm.json", {"defaults": {"colour": "red"}}),
        ("ldm.json", {"defaults": {"steps": "many"}}),
    ],
)
def test_what_is_not_supported_is_named(folder, file, change):
    edit_json(folder / file, **change)
    ((key, value),) = change.items()
    inner = next(iter(value)) if isinstance(value, dict) else key
    with pytest.raises(CheckpointError, match=rf"{file}: .*{'pipeline' if key == '_class_name' else inner}"):
        read_spec(folder)


def test_networks_that_do_not_fit_are_refused(folder):
    edit_json(folder / "unet/config.json", in_channels=9)
    with pytest.raises(CheckpointError, match="9 input"):
        read_spec(folder)


def test_a_path_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="neither a folder nor"):
        load(tmp_path / "nothing")


def test_pickles_are_read_only_when_allowed_and_never_run(folder, tmp_path):
    tensors = load_file(folder / UNET)
    (folder / UNET).unlink()
    pickled = folder / "unet/diffusion_pytorch_model.bin"
    torch.save(tensors, pickled)
    with pytest.raises(CheckpointError, match="allow_pickle"):
        load(folder)
    load(folder, allow_pickle=True)

    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"conv_in.weight": Bomb()}, pickled)
    with pytest.raises(CheckpointError, match="more than tensors"):
        load(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_values_too_large_for_the_file_are_refused(tmp_path):
    model = tiny_model()
    model.unet.out[2].bias[0] = 1e6
    with pytest.raises(CheckpointError, match=r"conv_out.bias"):
        save(model, tmp_path / "m")


def test_overflow_is_the_text_beyond_the_context(folder):
    overflow = load(folder).conditioner.overflow
    assert overflow("red apple") == ""
    assert overflow("a" * 75) == ""
    assert overflow("A" * 75 + " Tail") == "Tail"


def test_the_published_shapes_of_stable_diffusion_1():
    unet_spec = UNetSpec(
        in_channels=4, out_channels=4, channels=(320, 640, 1280, 1280), res_blocks=2,
        transformer_depth=(1, 1, 1, 0), middle_depth=1, heads=(8, 8, 8, 8), context_width=768,
    )  # fmt: skip
    vae_spec = AutoencoderSpec(
        channels=(128, 256, 512, 512), res_blocks=2, latent_channels=4, scale_factor=0.18215
    )
    with torch.device("meta"):
        unet, vae = UNet(unet_spec), Autoencoder(vae_spec)
        reference = UNet2DConditionModel(cross_attention_dim=768).state_dict()
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    names = unet_names(unet)
    assert {names[k]: v.shape for k, v in unet.state_dict().items()} == {
        k: v.shape for k, v in reference.items()
    }
    assert len(set(autoencoder_names(vae).values())) == len(vae.state_dict()) == 248
    assert unet.state_dict()["output_blocks.8.2.conv.weight"].shape == (640, 640, 3, 3)
