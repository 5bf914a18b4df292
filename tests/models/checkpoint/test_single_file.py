"""Single files of the paper's layout: what they are, which weights count, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoint import CheckpointError, load, parts, save, single_file, weights
from models.checkpoint.parts import ALIGNMENT
from models.checkpoint.weights import forget_pages
from models.conditioning.conditioner import make_conditioner
from models.networks.autoencoder import Autoencoder
from models.networks.unet import UNet
from models.sampling.schedule import Schedule
from models.spec import ModelSpec, ScheduleSpec
from tests.checkpoints.ldm_files import ROWS, VQ, published, random, write
from tests.checkpoints.tiny import tiny_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ROWS)
@torch.inference_mode()
def test_each_model_is_recognised_by_its_tensors(tmp_path, name):
    unet, first_stage, condition, end = ROWS[name]
    model = load(write(tmp_path, name))
    assert model.spec.name == name
    assert (model.spec.unet, model.spec.autoencoder, model.spec.condition) == (unet, first_stage, condition)
    assert model.spec.schedule.beta_end == end
    assert ModelSpec.from_dict(model.spec.to_dict()) == model.spec

    counts = 1 if name in ("cin256-v2", "txt2img-1p4B") else 2  # the averages, where there are any
    x, t = torch.randn(2, unet.in_channels, 8, 8), torch.tensor([1, 700])
    context = torch.randn(2, 5, unet.context_width) if unet.context_width else None
    assert torch.equal(model.unet(x, t, context), random(UNet(unet), counts)(x, t, context))
    z = torch.randn(1, first_stage.latent_channels, 4, 4)
    assert torch.equal(model.autoencoder.decode(z), random(Autoencoder(first_stage), 3).decode(z))
    if condition:
        c = random(make_conditioner(condition), 4).state_dict()
        assert all(torch.equal(value, c[key]) for key, value in model.conditioner.state_dict().items())


def test_betas_are_the_files_own(tmp_path):
    def edit(tensors):
        tensors["betas"] = torch.from_numpy(Schedule(ScheduleSpec(0.001, 0.02)).betas).float()

    schedule = load(write(tmp_path, "celebahq", edit)).spec.schedule
    assert (schedule.beta_start, schedule.beta_end) == (0.001, 0.02)
    file = write(tmp_path, "celebahq", lambda ts: ts.update(betas=torch.linspace(0.001, 0.02, 1000)))
    with pytest.raises(CheckpointError, match="betas"):
        load(file)


@torch.inference_mode()
def test_a_first_stage_alone(tmp_path):
    first_stage = random(Autoencoder(VQ), 1)
    save_file(first_stage.state_dict() | {"loss.logvar": torch.zeros(1)}, tmp_path / "f.safetensors")
    model = load(tmp_path / "f.safetensors", dtype=torch.float64)
    assert (model.unet, model.conditioner, model.spec.autoencoder) == (None, None, VQ)
    assert ModelSpec.from_dict(model.spec.to_dict()) == model.spec
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(model.encode(x), first_stage.encode(x), rtol=0, atol=1e-4)
    assert model.to(dtype=torch.float32).spec.size_multiple == 2


@pytest.mark.parametrize(
    ("key", "network"),
    [
        ("model.diffusion_model.time_embed.0.bias", "UNet"),
        ("first_stage_model.quant_conv.bias", "Autoencoder"),
        ("cond_stage_model.transformer.norm.weight", "TokenConditioner"),
    ],
)
def test_missing_keys_are_named(tmp_path, key, network):
    def without(tensors):
        del tensors[key]
        for average in [name for name in tensors if name.startswith("model_ema.")]:
            del tensors[average]

    file = write(tmp_path, "text2img256", without)
    with pytest.raises(CheckpointError, match=rf"{network}: 1 missing keys: {key}"):
        load(file)


@pytest.mark.parametrize("key", ["first_stage_model.x", "model_ema.x", "cond_stage_model.x", "model.x"])
def test_unexpected_keys_are_named(tmp_path, key):
    file = write(tmp_path, "bsr_sr", lambda tensors: tensors.update({key: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=f"1 unexpected keys: {key}"):
        load(file)


def test_a_conditioner_that_is_another_first_stage_is_refused(tmp_path):
    file = write(tmp_path, "inpainting_big", lambda ts: ts["cond_stage_model.quant_conv.bias"].add_(1))
    with pytest.raises(CheckpointError, match="another first stage"):
        load(file)


def test_a_file_of_something_else(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="neither"):
        load(tmp_path / "a.safetensors")


class Callback:
    """What a trainer leaves in its files."""

    def __init__(self):
        self.best = 0.5


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (self.file.touch, ())


def test_pickles_with_a_trainers_objects_are_read_when_allowed_and_never_run(tmp_path):
    tensors, file = published("celebahq"), tmp_path / "celebahq.ckpt"
    rest = {"callbacks": {Callback: Callback()}, "epoch": 3, "folder": tmp_path}
    torch.save({"state_dict": tensors} | rest, file)
    with pytest.raises(CheckpointError, match="allow_pickle"):
        load(file)
    model = load(file, allow_pickle=True)
    assert torch.equal(model.unet.out[2].weight, tensors["model_ema.diffusion_modelout2weight"])

    bomb = Bomb(tmp_path / "ran")
    for whole in (
        {"state_dict": tensors, "bomb": bomb},
        {"state_dict": tensors | {"x": bomb}},
        {"state_dict": tensors | {"x": Callback()}},
    ):
        torch.save(whole, file)
        with pytest.raises(CheckpointError, match=r"more than tensors|something other than named tensors"):
            load(file, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_models_that_the_folder_layout_cannot_describe_are_refused(tmp_path):
    model = load(write(tmp_path, "celebahq"))
    with pytest.raises(CheckpointError, match="CLIP"):
        save(model, tmp_path / "m")
    model = tiny_model()
    model.spec = replace(model.spec, autoencoder=replace(model.spec.autoencoder, codes=9))
    with pytest.raises(CheckpointError, match="KL"):
        save(model, tmp_path / "m")


@pytest.mark.slow
def test_a_vocabulary_next_to_the_file_is_used(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "apple"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    file = write(tmp_path, "text2img256")
    assert load(file).conditioner.tokenize(["red apple"])[0, :4].tolist() == [2, 5, 6, 3]
    assert load(file).copy(torch.bfloat16).conditioner(["red"]).dtype == torch.bfloat16
    assert load(write(tmp_path, "text2img256")).conditioner(["", "red"]).shape == (2, 77, 16)
    (tmp_path / "vocab.txt").write_text("\n".join([*words, *map(str, range(99))]) + "\n")
    with pytest.raises(CheckpointError, match="106 tokens"):
        load(file)


def reads(monkeypatch):
    """Which tensors of files are read from now on."""
    seen, original = [], single_file.map_weights

    def recorded(file, header, device):
        weights = original(file, header, device)
        return weights._replace(read=lambda name: seen.append(name) or weights.read(name))

    monkeypatch.setattr(single_file, "map_weights", recorded)
    return seen


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_only_what_a_network_takes_is_read(tmp_path, monkeypatch, form):
    tensors, seen = published("text2img256"), reads(monkeypatch)
    file = tmp_path / f"m.{form}"
    torch.save(tensors, file) if form == "ckpt" else save_file(tensors, file)
    model = load(file, allow_pickle=True)
    networks = model.unet, model.autoencoder, model.conditioner
    assert len(seen) == len(set(seen)) == sum(len(network.state_dict()) for network in networks)
    assert not [name for name in seen if name.startswith("model.diffusion_model.") or "to_logits" in name]


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_weights_of_the_files_own_type_stay_in_the_file(tmp_path, form):
    """Their memory is the file's, where they lie at an address that kernels like."""
    tensors = {key: value.contiguous() for key, value in published("celebahq").items()}
    file = tmp_path / f"m.{form}"
    torch.save(tensors, file) if form == "ckpt" else save_file(tensors, file)
    model = load(file, allow_pickle=True)
    lines = Path("/proc/self/maps").read_text().splitlines()
    maps = [line.split()[0].split("-") for line in lines if str(file) in line]
    mapped = [range(int(first, 16), int(last, 16)) for first, last in maps]
    places = [weight.data_ptr() for weight in model.unet.parameters()]
    inside = [place for place in places if any(place in part for part in mapped)]
    assert all(place % ALIGNMENT == 0 for place in places)
    if form == "ckpt":  # whose tensors all begin at such addresses
        assert len(inside) == len(places)
    converted = load(file, dtype=torch.bfloat16, allow_pickle=True)
    assert converted.unet.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda value: value.to(torch.int8), "first_stage_model.quant_conv.bias int8"),
        (lambda value: value.int(), "first_stage_model.quant_conv.bias int32"),
        (lambda value: value.to(torch.complex64), "first_stage_model.quant_conv.bias complex64"),
    ],
)
def test_weights_that_are_not_floats_are_named(tmp_path, change, what):
    key = "first_stage_model.quant_conv.bias"
    file = write(tmp_path, "celebahq", lambda tensors: tensors.update({key: change(tensors[key])}))
    with pytest.raises(CheckpointError, match=f"Autoencoder: 1 mistyped keys: {what}"):
        load(file)


def test_a_float_type_swapped_for_another_of_its_size_is_refused(tmp_path):
    """float16 and bfloat16 in one network: the header is damaged. Larger and smaller floats may mix."""

    def edit(tensors):
        for key in tensors:
            if key.startswith("first_stage_model.") and "norm" not in key:
                tensors[key] = tensors[key].half()
        tensors["first_stage_model.quant_conv.bias"] = tensors["first_stage_model.quant_conv.bias"].bfloat16()

    with pytest.raises(CheckpointError, match=r"1 mistyped keys: first_stage_model.quant_conv.bias bfloat16"):
        load(write(tmp_path, "celebahq", edit))
    key = "first_stage_model.quant_conv.bias"
    load(write(tmp_path, "celebahq", lambda tensors: edit(tensors) or tensors.update({key: torch.zeros(3)})))


def test_the_pages_of_converted_tensors_are_released_while_a_file_is_read(tmp_path, monkeypatch):
    """Otherwise loading takes twice the memory of the weights. Weights of the file's own type stay mapped."""
    released = []
    monkeypatch.setattr(weights, "forget_pages", lambda data: released.append(forget(data)))
    monkeypatch.setattr(parts, "RELEASE_BYTES", 0)
    forget, file = forget_pages, write(tmp_path, "celebahq")
    mapped = load(file)
    before = len(released)
    converted = load(file, dtype=torch.bfloat16)
    assert len(released) > before + 9
    for ours, theirs in zip(converted.unet.parameters(), mapped.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16())
