"""ldm inspect: what a checkpoint is and what is wrong with it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoint import CheckpointError, load, save, single_file
from models.checkpoint.conversion import convert
from models.checkpoint.inspection import as_json, as_text, inspect
from models.checkpoint.weights import Weights
from tests.checkpoints import sd_folders
from tests.checkpoints.ldm_files import ROWS, published, write
from tests.checkpoints.tiny import random_model, upscaler_spec, write_tiny_model


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_each_model_is_recognised_in_both_formats(tmp_path, name):
    torch.save({"state_dict": published(name)}, tmp_path / f"{name}.ckpt")
    convert(tmp_path / f"{name}.ckpt", tmp_path / "out", allow_pickle=True)
    model = load(tmp_path / "out")
    reports = inspect(tmp_path / f"{name}.ckpt", allow_pickle=True), inspect(tmp_path / "out")
    for report in reports:
        assert name in report.family
        assert report.problems == ()
        assert report.networks[0].name == "UNet"
        assert report.networks[0].parameters == sum(p.numel() for p in model.unet.parameters())
        assert report.networks[0].dtypes == {"float32": report.networks[0].parameters}
    assert [report.averaged for report in reports] == [name not in ("cin256-v2", "txt2img-1p4B"), False]
    assert [report.layout for report in reports] == ["single file (ckpt)", "folder of a single file"]


def test_the_report_as_text_and_as_json(tmp_path):
    report = inspect(write(tmp_path, "celebahq"))
    text = as_text(report)
    for line in (
        "celebahq",
        "family        unconditional VQ (celebahq, ffhq, lsun_beds)",
        "images        256x256, from latents of 3x128x128",
        "parameters, float32, averaged (EMA)",
        "schedule      1000 steps, betas 0.0015 to 0.0195 (scaled_linear)",
        "predicts      epsilon (the family)",
        "conditioner   none with weights of its own",
    ):
        assert line in text
    assert json.loads(as_json(report))["latent"] == [3, 128, 128]


def test_missing_and_unexpected_tensors_are_problems(tmp_path):
    def edit(tensors):
        del tensors["first_stage_model.quant_conv.bias"]
        tensors |= {f"optimizer.{i}": torch.zeros(1) for i in range(6)}
        tensors["cond_stage_model.embedding.weight"] = torch.zeros(1000, 16, dtype=torch.int8)

    report = inspect(write(tmp_path, "cin256", edit))
    assert report.problems == (
        "ClassConditioner: 1 mistyped keys: cond_stage_model.embedding.weight int8",
        "Autoencoder: 1 missing keys: first_stage_model.quant_conv.bias",
    )
    assert report.notes == ("6 ignored keys: optimizer.0, optimizer.1, optimizer.2, optimizer.3 and 2 more",)
    assert "PROBLEM" in as_text(report)


def test_folders_and_first_stages(tmp_path):
    write_tiny_model(tmp_path / "tiny")
    report = inspect(tmp_path / "tiny")
    assert (report.layout, report.problems) == ("diffusers folder", ())
    assert [network.dtypes.keys() for network in report.networks] == [{"float16"}] * 3
    (tmp_path / "tiny/tokenizer/tokenizer.json").unlink()
    (tmp_path / "tiny/tokenizer/vocab.json").unlink(missing_ok=True)
    assert inspect(tmp_path / "tiny").problems == ("tokenizer/vocab.json is missing",)

    save_file(load(write(tmp_path, "celebahq")).autoencoder.state_dict(), tmp_path / "vq.safetensors")
    report = inspect(tmp_path / "vq.safetensors")
    assert (report.family, report.schedule) == ("first stage alone (VQ-f2)", None)


def test_no_weight_is_read(tmp_path, monkeypatch):
    file = write(tmp_path, "inpainting_big")

    def unread(file, header, device):
        return Weights(header.tensors, lambda name: pytest.fail(f"{name} was read"))

    monkeypatch.setattr(single_file, "map_weights", unread)
    assert inspect(file).notes[0].startswith("the file has the first stage twice")
    with pytest.raises(pytest.fail.Exception, match="was read"):
        load(file)


def test_a_file_of_something_else_is_an_error(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="neither"):
        inspect(tmp_path / "x.safetensors")


def test_the_family_of_an_upscaler(tmp_path):
    save(random_model(upscaler_spec()), tmp_path / "up")
    report = inspect(tmp_path / "up")
    assert report.family == "super-resolution, 4x with noise conditioning"
    assert report.tasks == ("upscaling",)
    assert not report.problems


@pytest.mark.parametrize(
    ("name", "family", "networks"),
    [
        ("x4-upscaler", "Stable Diffusion x4 upscaler", ["UNet", "Autoencoder", "TextEncoder"]),
        ("xl", "text (Stable Diffusion's structure)", ["UNet", "Autoencoder", "TextEncoder", "TextEncoder"]),
    ],
)
def test_folders_of_several_parts(tmp_path, name, family, networks):
    folder = sd_folders.write(tmp_path, name)
    report = inspect(folder)
    assert (report.family, [network.name for network in report.networks]) == (family, networks)
    assert not report.problems
    tokenizer = [*folder.glob("tokenizer*")][-1]
    for file in ("tokenizer.json", "vocab.json"):
        (tokenizer / file).unlink(missing_ok=True)
    assert inspect(folder).problems == (f"{tokenizer.name}/vocab.json is missing",)
