"""ldm convert: what is written is the same model, and is written whole or not at all."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.checkpoint import CheckpointError, conversion, load, read_spec
from models.checkpoint.conversion import convert
from tests.checkpoints.ldm_files import ROWS, published, write
from tests.checkpoints.tiny import write_tiny_model

pytestmark = pytest.mark.slow


def same(a, b):
    """Whether all networks of two models hold the same numbers."""
    pairs = zip((a.unet, a.autoencoder, a.conditioner), (b.unet, b.autoencoder, b.conditioner), strict=True)
    for one, other in pairs:
        assert (one is None) == (other is None)
        if one:
            assert one.state_dict().keys() == other.state_dict().keys()
            assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
@torch.inference_mode()
def test_each_model_is_the_same_afterwards(tmp_path, name):
    torch.save({"state_dict": published(name)}, tmp_path / f"{name}.ckpt")
    convert(tmp_path / f"{name}.ckpt", tmp_path / "out", allow_pickle=True)
    before, after = load(tmp_path / f"{name}.ckpt", allow_pickle=True), load(tmp_path / "out")
    assert before.spec == after.spec == read_spec(tmp_path / "out")
    assert same(before, after)
    x, context = torch.randn(1, before.spec.unet.in_channels, 8, 8), before.spec.unet.context_width
    inputs = x, torch.tensor([500]), torch.randn(1, 3, context) if context else None
    assert torch.equal(before.unet(*inputs), after.unet(*inputs))

    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not [name for name in names if name.startswith("model_ema.") or name == "betas"]
    assert not [name for name in names if name.startswith("cond_stage_model.encoder.")]
    assert names <= published(name).keys()

    convert(tmp_path / "out", tmp_path / "again")
    assert load(tmp_path / "again").spec == after.spec
    assert same(after, load(tmp_path / "again"))


def test_facts_from_a_yaml_file_are_kept(tmp_path):
    file = write(tmp_path, "celebahq", lambda tensors: tensors.pop("betas"))
    note = tmp_path / "celebahq.yaml"
    note.write_text("model: {params: {linear_start: 0.001, linear_end: 0.02, scale_factor: 0.5}}")
    convert(file, tmp_path / "out")
    assert read_spec(tmp_path / "out") == read_spec(file)
    assert read_spec(tmp_path / "out").autoencoder.scale_factor == 0.5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", None])
def test_weights_are_converted_to_the_type_given(tmp_path, dtype):
    def edit(tensors):
        tensors.update({key: value.double() for key, value in tensors.items() if "first_stage" in key})

    convert(write(tmp_path, "celebahq", edit), tmp_path / "out", dtype)
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # the weights are for the same readers as the rest
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        types = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (not a dict)
    short = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
    assert types["model.diffusion_model.out.2.bias"] == short.get(dtype, "F32")
    assert types["first_stage_model.quant_conv.bias"] == short.get(dtype, "F64")


def test_a_first_stage_alone_and_a_vocabulary(tmp_path):
    stage = load(write(tmp_path, "lsun_churches")).autoencoder.state_dict()
    save_file(stage | {"loss.logvar": torch.zeros(1)}, tmp_path / "kl.safetensors")
    convert(tmp_path / "kl.safetensors", tmp_path / "kl")
    assert same(load(tmp_path / "kl"), load(tmp_path / "kl.safetensors"))
    assert "loss.logvar" not in load_file(tmp_path / "kl" / "model.safetensors")

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red"]))
    convert(write(tmp_path, "text2img256"), tmp_path / "text")
    assert load(tmp_path / "text").conditioner.tokenize(["red"])[0, :3].tolist() == [2, 5, 3]


def test_a_diffusers_folder_becomes_one_in_safetensors(tmp_path):
    write_tiny_model(tmp_path / "tiny")
    for folder, old, new in (
        ("unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("text_encoder", "model.safetensors", "pytorch_model.bin"),
    ):
        file = tmp_path / "tiny" / folder / old
        torch.save(load_file(file), file.with_name(new))
        file.unlink()
    with pytest.raises(CheckpointError, match="allow_pickle"):
        convert(tmp_path / "tiny", tmp_path / "out")
    convert(tmp_path / "tiny", tmp_path / "out", allow_pickle=True)
    before, after = load(tmp_path / "tiny", allow_pickle=True), load(tmp_path / "out")
    assert before.spec == after.spec
    assert same(before, after)
    file = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}


@pytest.mark.slow
def test_targets_are_not_overwritten_and_written_completely_or_not_at_all(tmp_path, monkeypatch):
    file = write(tmp_path, "celebahq")
    there = sorted(path.name for path in tmp_path.iterdir())
    for target in (tmp_path, file):
        with pytest.raises(CheckpointError, match="exists and is not"):
            convert(file, target)
    with pytest.raises(CheckpointError, match="is not a folder"):
        convert(file, tmp_path / "missing" / "out")

    big = write(tmp_path, "bsr_sr", lambda ts: ts["first_stage_model.quant_conv.bias"].fill_(1e6))
    with pytest.raises(CheckpointError, match="cannot represent"):
        convert(big, tmp_path / "out", "float16")
    big.unlink()

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "published_tensors", fail)
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert(file, tmp_path / "out")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == there

    (tmp_path / "out").mkdir()
    convert(file, tmp_path / "out")  # an empty folder will do
    assert same(load(file), load(tmp_path / "out"))


def test_an_incomplete_checkpoint_is_not_converted(tmp_path):
    file = write(tmp_path, "celebahq", lambda ts: ts.pop("first_stage_model.quant_conv.bias"))
    with pytest.raises(CheckpointError, match=r"1 missing keys: first_stage_model.quant_conv.bias"):
        convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"kind": "neighbors"}, "kind cannot be 'neighbors'"),
        ({"kind": ["class"]}, "kind cannot be"),
        ({"side": 0}, "side cannot be 0"),
        ({"side": 255}, "not a multiple of"),
        ({"heads": [3, 3]}, "heads do not divide"),
        ({"heads": [1]}, "unsupported network structure"),
        ({"heads": [1.0, 2.0]}, "heads cannot be"),
        ({"scale_factor": "1"}, "scale_factor cannot be"),
        ({"schedule": {}}, "schedule cannot be"),
        ({"colour": 1}, "may have"),
    ],
)
def test_an_invalid_value_in_ldm_json_is_named(tmp_path, change, what):
    convert(write(tmp_path, "celebahq"), tmp_path / "out")
    own = json.loads((tmp_path / "out" / "ldm.json").read_text())
    (tmp_path / "out" / "ldm.json").write_text(json.dumps(own | {"compvis": own["compvis"] | change}))
    with pytest.raises(CheckpointError, match=what):
        read_spec(tmp_path / "out")
