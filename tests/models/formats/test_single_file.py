"""What a single file's model is, without torch: from the file and from the files next to it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoint import load
from models.errors import CheckpointError
from models.formats.config_files import read_yaml
from models.formats.identify import read_spec
from tests.checkpoints.ldm_files import ROWS, published, write

pytestmark = pytest.mark.slow


def config(**model):
    """CompVis's configuration of celebahq in JSON, which is YAML; model: parameters that differ."""
    stage = {
        "embed_dim": 3, "n_embed": 64,
        "ddconfig": {
            "double_z": False, "z_channels": 3, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
            "ch_mult": [1, 2], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
        },
    }  # fmt: skip
    unet = {
        "image_size": 128, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 2,
        "attention_resolutions": [2], "channel_mult": [1, 2], "num_head_channels": 32,
    }  # fmt: skip
    params = {
        "linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000, "image_size": 128, "channels": 3,
        "unet_config": {"target": "os.system", "params": unet},
        "first_stage_config": {"target": "ldm.models.autoencoder.VQModelInterface", "params": stage},
        "cond_stage_config": "__is_unconditional__",
    }  # fmt: skip
    return {"model": {"target": "os.system", "params": params | model}}


def unet_config(**options):
    whole = config()["model"]["params"]["unet_config"]
    return config(unet_config=whole | {"params": whole["params"] | options})


def without_tables(tensors):
    for key in ("betas", "logvar"):
        del tensors[key]


def put(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize("name", ROWS)
def test_the_spec_is_that_of_the_loaded_model_in_both_formats(tmp_path, name):
    file = write(tmp_path, name)
    expected = load(file).spec
    assert read_spec(file) == expected
    torch.save({"state_dict": published(name)}, tmp_path / f"{name}.ckpt")
    assert read_spec(tmp_path / f"{name}.ckpt", allow_pickle=True) == expected
    with pytest.raises(CheckpointError, match="allow_pickle"):
        read_spec(tmp_path / f"{name}.ckpt")


def test_a_file_called_model_is_named_after_its_folder(tmp_path):
    (tmp_path / "cin256").mkdir()
    save_file(published("cin256"), tmp_path / "cin256" / "model.safetensors")
    assert read_spec(tmp_path / "cin256" / "model.safetensors").name == "cin256"


def test_a_yaml_file_gives_facts_that_tensors_do_not_show(tmp_path):
    file = write(tmp_path, "celebahq", without_tables)
    plain = read_spec(file)
    assert (plain.schedule.beta_end, plain.unet.heads, plain.autoencoder.scale_factor) == (0.0195, (1, 2), 1)
    options = {"linear_start": "1e-3", "linear_end": 0.02, "scale_factor": 0.5, "image_size": 64}
    changed = unet_config(num_head_channels=16)["model"]["params"] | options
    put(tmp_path / "celebahq.yaml", {"model": {"params": changed}})
    spec = read_spec(file)
    assert (spec.schedule.beta_start, spec.schedule.beta_end) == (0.001, 0.02)
    assert (spec.unet.heads, spec.autoencoder.scale_factor) == ((2, 4), 0.5)
    assert (spec.defaults.width, spec.autoencoder.sample_size) == (128, 128)
    assert load(file).spec == spec
    put(tmp_path / "celebahq.yaml", unet_config(num_head_channels=-1, num_heads=4))
    assert read_spec(file).unet.heads == (4, 4)
    put(tmp_path / "celebahq.yaml", config(parameterization="v", beta_schedule="sqrt_linear", timesteps=500))
    schedule = read_spec(file).schedule
    assert (schedule.prediction, schedule.beta_schedule, schedule.timesteps) == (
        "v_prediction",
        "linear",
        500,
    )


def test_which_yaml_file_is_read(tmp_path):
    file = write(tmp_path, "celebahq", without_tables)
    alone = put(tmp_path / "config.yaml", config(linear_end=0.02))
    assert read_spec(file).schedule.beta_end == 0.02  # the only one
    put(tmp_path / "celebahq.yaml", config(linear_end=0.018))
    assert read_spec(file).schedule.beta_end == 0.018  # of the same name
    (tmp_path / "celebahq.yaml").rename(tmp_path / "another.yml")
    assert read_spec(file).schedule.beta_end == 0.0195  # one of two: neither
    alone.unlink()
    (tmp_path / "another.ckpt").touch()
    assert read_spec(file).schedule.beta_end == 0.0195  # another file's
    (tmp_path / "another.ckpt").unlink()
    put(tmp_path / "another.yml", "services: {ldm: {image: x}}")
    assert read_spec(file).schedule.beta_end == 0.0195  # of another kind


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (config(linear_end=0.02), "linear_end is 0.02, but the weights have 0.0195"),
        (config(linear_start=0.001), "linear_start is 0.001, but the weights have 0.0015"),
        (config(channels=4), "channels is 4, but the weights have 3"),
        (unet_config(model_channels=64), "model_channels is 64, but the weights have 32"),
        (unet_config(channel_mult=[1, 2, 4]), r"channel_mult is \(1, 2, 4\), but the weights have \(1, 2\)"),
        (unet_config(attention_resolutions=[1, 2]), r"attention_resolutions is \(1, 2\)"),
        (unet_config(use_scale_shift_norm=True), "use_scale_shift_norm is True"),
        (unet_config(resblock_updown=True), "resblock_updown is True"),
        (unet_config(use_spatial_transformer=True), "use_spatial_transformer is True"),
        (unet_config(num_head_channels=24), "heads do not divide"),
        (unet_config(num_head_channels="many"), "num_head_channels must be a whole number"),
        (config(first_stage_config={"params": {"n_embed": 128}}), "n_embed is 128"),
        (config(first_stage_config={"params": {"ddconfig": {"ch_mult": [1, 2, 4]}}}), "ch_mult"),
        (config(first_stage_config={"params": {"ddconfig": {"double_z": True}}}), "double_z is True"),
        (config(first_stage_config=7), "first_stage_config must be an object"),
        (config(timesteps=500), "its betas are not 500"),
        (config(timesteps=10**12), "timesteps must be a whole number"),
        (config(scale_factor=-1), "scale_factor must be a number above 0"),
        (config(scale_factor=".nan"), "scale_factor must be a number above 0"),
        (config(linear_start=0.5, linear_end=0.1), "linear_start and linear_end are"),
        (config(beta_schedule="cosine"), "beta_schedule is 'cosine'"),
        (config(parameterization="flow"), "parameterization is 'flow'"),
        (config(image_size=True), "image_size must be a whole number"),
        ({"model": 3}, "no model.params"),
        ("model: [", "cannot be read as YAML"),
        ("!!python/object/apply:os.system ['touch ran']", "cannot be read as YAML"),
        ("- 1", "must contain a YAML object"),
        ("[" * 100_000, "cannot be read as YAML"),
        ("x: " + "y" * 2**20, "larger than"),
    ],
)
def test_a_contradicting_or_invalid_yaml_file_is_a_one_line_error(tmp_path, change, what):
    file = write(tmp_path, "celebahq")
    put(tmp_path / "celebahq.yaml", config())
    read_spec(file)
    put(tmp_path / "celebahq.yaml", change)
    with pytest.raises(CheckpointError, match=what) as caught:
        read_spec(file)
    assert "\n" not in str(caught.value)


def test_a_scale_factor_that_contradicts_the_yaml_file(tmp_path):
    file = write(tmp_path, "lsun_churches")
    note = tmp_path / "lsun_churches.yaml"
    put(note, {"model": {"params": {"scale_by_std": True, "scale_factor": 1.0}}})
    assert read_spec(file).autoencoder.scale_factor == 0.25
    put(note, {"model": {"params": {"scale_factor": 1.0}}})
    with pytest.raises(CheckpointError, match=r"scale_factor is 1.0, but the weights have 0.25"):
        read_spec(file)


def test_a_yaml_file_with_references_is_refused(tmp_path):
    note, lines = tmp_path / "bomb.yaml", ["a0: &a0 [1]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 10)]
    note.write_text("\n".join([*lines, "model: {params: {linear_start: *a9}}"]))
    with pytest.raises(CheckpointError, match="refers to other parts"):
        read_yaml(note)


def test_the_yaml_file_of_a_first_stage_alone(tmp_path):
    tensors = {
        key.removeprefix("first_stage_model."): value
        for key, value in published("celebahq").items()
        if key.startswith("first_stage_model.")
    }
    save_file(tensors, tmp_path / "vq.safetensors")
    params = config()["model"]["params"]["first_stage_config"]["params"]
    put(
        tmp_path / "vq.yaml",
        {"model": {"params": params | {"ddconfig": params["ddconfig"] | {"resolution": 128}}}},
    )
    assert read_spec(tmp_path / "vq.safetensors").autoencoder.sample_size == 128
    put(tmp_path / "vq.yaml", {"model": {"params": params | {"embed_dim": 4}}})
    with pytest.raises(CheckpointError, match="embed_dim is 4"):
        read_spec(tmp_path / "vq.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("scale_factor", torch.tensor(float("nan")), "scale_factor is not one number"),
        ("scale_factor", torch.ones(3), "scale_factor is not one number"),
        ("scale_factor", torch.tensor(3), "int64"),
        ("betas", torch.zeros(1000), "betas are not numbers between"),
        ("betas", torch.tensor(0.5), "betas are not numbers between"),
        ("betas", torch.ones(2**18 + 1), "expected a few floats"),
        ("cond_stage_model.embedding.weight", torch.ones(3), "unsupported network structure"),
        ("first_stage_model.post_quant_conv.weight", torch.ones(3), "unsupported network structure"),
    ],
)
def test_tensors_of_no_model_are_a_one_line_error(tmp_path, key, value, what):
    file = write(tmp_path, "celebahq", lambda tensors: tensors.update({key: value}))
    with pytest.raises(CheckpointError, match=what):
        load(file)


def test_impossible_widths_are_a_one_line_error(tmp_path):
    key = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    file = write(tmp_path, "celebahq", lambda tensors: tensors.update({key: torch.ones(33, 32, 3, 3)}))
    with pytest.raises(CheckpointError, match=r"unsupported network structure"):
        load(file)
