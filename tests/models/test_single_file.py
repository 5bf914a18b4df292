"""Single files of the paper's layout: what they are, which weights count, and what is refused."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from models.autoencoder import Autoencoder
from models.checkpoint import CheckpointError, load, save
from models.conditioner import make_conditioner
from models.schedule import Schedule
from models.spec import (
    AutoencoderSpec,
    ClassSpec,
    ModelSpec,
    ScheduleSpec,
    SegmentationSpec,
    TokenSpec,
    UNetSpec,
)
from models.unet import UNet
from tests.tiny import fill_randomly, tiny_model

VQ = AutoencoderSpec(
    channels=(32, 64), res_blocks=2, latent_channels=3, scale_factor=1.0, sample_size=256, codes=64
)
KL = replace(VQ, codes=0, latent_channels=4, attention_levels=(1,), scale_factor=0.18215)
WORDS = TokenSpec(vocabulary=40, width=16, layers=2, tokens=77)
BOXES = replace(WORDS, tokens=92, objects=30)


def unet(latent=3, beside=0, context=0, heads=(1, 2), depth=(0, 1), **options):
    return UNetSpec(
        in_channels=latent + beside, out_channels=latent, channels=(32, 64), res_blocks=2, heads=heads,
        transformer_depth=depth, middle_depth=options.pop("middle", 1), context_width=context, **options,
    )  # fmt: skip


EIGHT = {"heads": (8, 8)}
CHURCHES = EIGHT | {"depth": (1, 0), "residual_resampling": True, "scale_shift_norm": True}
ROWS = {  # UNet, autoencoder, condition, last beta
    "celebahq": (unet(), VQ, None, 0.0195),
    "lsun_churches": (unet(4, **CHURCHES), replace(KL, scale_factor=0.25), None, 0.0155),
    "cin256": (unet(context=16, depth=(1, 1)), VQ, ClassSpec(1000, 16), 0.0195),
    "cin256-v2": (unet(context=16, heads=(1, 1)), VQ, ClassSpec(1001, 16, null=1000), 0.0195),
    "text2img256": (unet(context=16), VQ, WORDS, 0.0195),
    "txt2img-1p4B": (unet(4, context=16, depth=(1, 0), **EIGHT), KL, WORDS, 0.012),
    "inpainting_big": (
        unet(beside=4, residual_resampling=True, **EIGHT), replace(VQ, middle_attention=False,
        sample_size=512), None, 0.0205,
    ),
    "bsr_sr": (unet(beside=3, depth=(0, 0)), VQ, None, 0.0155),
    "layout2img": (unet(context=16, depth=(0, 3), middle=3), VQ, BOXES, 0.0205),
    "semantic_synthesis": (unet(beside=3, depth=(0, 0), **EIGHT), VQ, SegmentationSpec(18, 3), 0.0205),
    "rdm768": (
        unet(16, context=16), replace(KL, latent_channels=16, scale_factor=0.22765929, sample_size=768),
        None, 0.015,
    ),
}  # fmt: skip


def random(network, seed):
    fill_randomly(network, seed)
    return network.requires_grad_(False).eval()


def published(name):
    """The tensors of a model as its file has them: the last weights, the averages if any, tables."""
    unet, first_stage, condition, end = ROWS[name]
    start = 0.00085 if name == "txt2img-1p4B" else 0.0015
    schedule = ScheduleSpec(beta_start=start, beta_end=end)
    out = {"betas": torch.from_numpy(Schedule(schedule).betas).float(), "logvar": torch.zeros(1000)}
    last, averaged = random(UNet(unet), 1).state_dict(), random(UNet(unet), 2).state_dict()
    out |= {f"model.diffusion_model.{key}": value for key, value in last.items()}
    if name not in ("cin256-v2", "txt2img-1p4B"):
        out |= {"model_ema.diffusion_model" + key.replace(".", ""): v for key, v in averaged.items()}
        out |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(9)}
    e = random(Autoencoder(first_stage), 3).state_dict()
    out |= {f"first_stage_model.{key}": value for key, value in e.items()}
    if name == "inpainting_big":
        out |= {f"cond_stage_model.{key}": value.clone() for key, value in e.items()}
    if condition:
        c = random(make_conditioner(condition), 4).state_dict()
        out |= {f"cond_stage_model.{key}": value for key, value in c.items()}
    if isinstance(condition, TokenSpec):
        out["cond_stage_model.transformer.to_logits.weight"] = torch.zeros(condition.vocabulary, 16)
    if name == "lsun_churches":
        out["scale_factor"] = torch.tensor(0.25)
    return out


def write(tmp_path, name, edit=lambda tensors: None):
    tensors = published(name)
    edit(tensors)
    save_file(tensors, tmp_path / f"{name}.safetensors")
    return tmp_path / f"{name}.safetensors"


@pytest.mark.parametrize("name", ROWS)
@torch.inference_mode()
def test_each_model_is_known_by_its_tensors(tmp_path, name):
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
        ("model_ema.diffusion_modelout2weight", "UNet"),
        ("first_stage_model.quant_conv.bias", "Autoencoder"),
        ("cond_stage_model.transformer.norm.weight", "TokenConditioner"),
    ],
)
def test_missing_keys_are_named(tmp_path, key, network):
    file = write(tmp_path, "text2img256", lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match=rf"{network}: 1 missing keys: {key}"):
        load(file)


@pytest.mark.parametrize("key", ["first_stage_model.x", "model_ema.x", "cond_stage_model.x", "anything"])
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
        with pytest.raises(CheckpointError, match=r"more than tensors|something else than named tensors"):
            load(file, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_the_folder_layout_has_no_words_for_some(tmp_path):
    model = load(write(tmp_path, "celebahq"))
    with pytest.raises(CheckpointError, match="CLIP"):
        save(model, tmp_path / "m")
    model = tiny_model()
    model.spec = replace(model.spec, autoencoder=replace(model.spec.autoencoder, codes=9))
    with pytest.raises(CheckpointError, match="KL"):
        save(model, tmp_path / "m")


def test_a_vocabulary_beside_the_file_is_taken(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "apple"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    file = write(tmp_path, "text2img256")
    assert load(file).conditioner.tokenize(["red apple"])[0, :4].tolist() == [2, 5, 6, 3]
    assert load(file).copy(torch.bfloat16).conditioner(["red"]).dtype == torch.bfloat16
    assert load(write(tmp_path, "text2img256")).conditioner(["", "red"]).shape == (2, 77, 16)
    (tmp_path / "vocab.txt").write_text("\n".join([*words, *map(str, range(99))]) + "\n")
    with pytest.raises(CheckpointError, match="106 tokens"):
        load(file)
