"""`ldm train` from the first update to the evaluation, each part for a fraction of a second."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.checkpoint import load
from models.sampling.schedule import Schedule
from models.training import cli, presets, scenes
from models.training.cli import main
from models.training.diffusion import timestep_density
from tests.helpers.environment import needs_font

pytestmark = pytest.mark.slow


@pytest.fixture
def few_glyphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation compares with every glyph of the font; a few keep it short."""
    glyphs = dict(list(scenes.known_glyphs().items())[:30])
    glyphs |= {name: scenes.known_glyphs()[name] for name in ("red apple", "rocket")}
    monkeypatch.setattr(scenes, "known_glyphs", lambda: glyphs)


def image_size(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


@needs_font
def test_all_trains_exports_and_evaluates_a_model(tmp_path: Path, capsys, monkeypatch, few_glyphs) -> None:
    monkeypatch.setitem(cli.SCALES, "cpu", cli.Scale("2", "2", "64"))
    state, model, names = tmp_path / "state", tmp_path / "emoji", tmp_path / "names.txt"
    names.write_text("red apple\nrocket\n")
    shared = ["--state", str(state), "--device", "cpu", "--minutes", "0.002", "--names", str(names)]
    command = ["all", *shared, "--workers", "0", "--count", "2", "--steps", "1", "-o", str(model)]
    main([*command, "--stop-after", "0"])
    assert capsys.readouterr().out.endswith("stopped; the same command resumes\n")
    assert not model.exists()
    main(command)

    loaded = load(model)
    assert loaded.spec.name == "emoji"
    assert loaded.spec.autoencoder.scale_factor != 1.0
    assert loaded.spec.labels == ("red apple", "rocket")
    assert all(file.stat().st_size < 16 * 2**20 for file in model.rglob("*.safetensors"))
    sizes = {file.stem: image_size(file) for file in (model / "sheets").iterdir()}
    assert sizes["text-to-image"] == (824, 736)
    assert sizes["layout-to-image"][1] == sizes["inpainting"][1] > sizes["unconditional"][1]
    assert sizes["256x128"][0] > sizes["192x128"][0]
    out = capsys.readouterr().out
    assert " dB\n" in out
    assert "2 held-out prompts: top-1" in out
    assert "boxes, 1: the right object" in out
    assert "shuffled" in out

    (state / "diffusion.pt").unlink()
    main(["diffusion", *shared, "--batch", "2", "--start", str(model)])
    assert (state / "diffusion.pt").exists()


@needs_font
def test_training_the_decoder_alone_changes_nothing_else(tmp_path: Path) -> None:
    old, new, names = Path("weights/emoji"), tmp_path / "emoji", Path("weights/emoji/names.txt")
    shared = ["--state", str(tmp_path / "state"), "--device", "cpu", "--start", str(old)]
    main(["autoencoder", *shared, "--minutes", "0.001", "--batch", "2", "--only-decoder"])
    main(["export", *shared[:2], *shared[4:], "--names", str(names), "-o", str(new)])
    before, after = load(old), load(new)
    assert after.spec == before.spec
    networks = (before.unet, after.unet), (before.autoencoder.encoder, after.autoencoder.encoder)
    for ours, theirs in networks:
        assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    ours, theirs = before.autoencoder.decoder.conv_out.weight, after.autoencoder.decoder.conv_out.weight
    assert not torch.equal(ours, theirs)


@needs_font
def test_the_upscaler_is_trained_exported_and_evaluated(tmp_path: Path, capsys, few_glyphs) -> None:
    state, model = tmp_path / "state", tmp_path / "emoji-upscale"
    shared = ["--state", str(state), "--device", "cpu"]
    brief = ["--minutes", "0.001", "--batch", "2", "--crops", "4"]
    main(["upscaler-autoencoder", *shared, *brief])
    main(["upscaler", *shared, *brief])
    main(["export-upscaler", *shared, "-o", str(model)])

    spec = load(model).spec
    assert (spec.name, spec.tasks) == ("emoji-upscale", ("upscaling",))
    assert spec.autoencoder.scale_factor != 1.0
    main(["evaluate", str(model), "--count", "2", "--steps", "1"])
    main(["sheet", str(model), "-o", str(tmp_path / "sheets")])
    drawn = {file.stem for file in (tmp_path / "sheets").iterdir()}
    assert drawn == {"held-out-scenes", "mixed-scenes", "dead-leaves", "text", "textures", "tiles"}
    out = capsys.readouterr().out
    assert "32 -> 128 on 2 held-out scenes, 1 steps" in out
    assert "128x64 by tiles" in out
    assert "shuffled" in out

    refined = tmp_path / "refined"
    started = [*shared, "--start", str(model)]
    main(["refine-upscaler", *started, *brief])
    main(["export-upscaler", *started, "-o", str(refined)])
    before, after = load(model), load(refined)
    assert after.spec == before.spec
    encoders = [each.autoencoder.encoder.state_dict().values() for each in (before, after)]
    assert all(map(torch.equal, *encoders))
    for part in (lambda each: each.autoencoder.decoder.conv_out, lambda each: each.unet.out[2]):
        assert not torch.equal(part(before).weight, part(after).weight)


@needs_font
def test_a_control_net_is_trained_exported_and_evaluated(tmp_path: Path, capsys, few_glyphs) -> None:
    base, control = Path("weights/emoji"), tmp_path / "outline"
    shared = ["--state", str(tmp_path / "state"), "--device", "cpu", "--start", str(base)]
    names = tmp_path / "names.txt"
    names.write_text("red apple\nrocket\n")
    brief = ["--minutes", "0.001", "--batch", "2", "--scenes", "64"]
    main(["control", *shared, *brief, "--names", str(names)])
    main(["export-control", *shared, "-o", str(control)])
    (weights,) = control.glob("*.safetensors")
    assert weights.stat().st_size < 6 * 2**20
    given = [str(base), "--control", str(control), "--names", str(names), "--steps", "1"]
    main(["evaluate", *given, "--count", "2"])
    main(["sheet", *given, "-o", str(tmp_path)])
    out = capsys.readouterr().out
    assert "drawn scenes: IoU with the outline's inside over 0.6 in 100.0% of 2" in out
    assert "without control: IoU" in out
    assert image_size(tmp_path / "outlines.png") == (824, 736)


@needs_font
def test_a_lora_for_few_steps_is_trained_exported_and_evaluated(tmp_path: Path, capsys, few_glyphs) -> None:
    base, folder, names = Path("weights/emoji"), tmp_path / "few", tmp_path / "names.txt"
    names.write_text("red apple\nrocket\n")
    shared = ["--state", str(tmp_path / "state"), "--device", "cpu", "--start", str(base)]
    brief = ["--minutes", "0.001", "--batch", "2", "--paths", "2", "--names", str(names)]
    main(["few-steps", *shared, *brief])
    main(["export-few-steps", *shared, "-o", str(folder)])
    (file,) = folder.iterdir()
    assert file.stat().st_size < 1.5 * 2**20
    given = ["--lora", str(file), "--names", str(names), "--steps", "4", "--guidance-scale", "1"]
    main(["evaluate", str(base), *given, "--count", "2"])
    main(["evaluate", str(base), *given, "--count", "2", "--sampler", "lcm"])
    out = capsys.readouterr().out
    assert "2 names, ddim, 4 steps, guidance 1\n" in out
    assert "2 names, lcm, 4 steps, guidance 1\n" in out
    assert out.count("2 held-out prompts: top-1") == 2


def test_most_updates_are_at_middle_noise() -> None:
    alpha_bar = Schedule(presets.SCHEDULE).alpha_bar
    density = timestep_density(alpha_bar)
    assert density.sum() == pytest.approx(1.0)
    middle = torch.from_numpy((alpha_bar > 0.1) & (alpha_bar < 0.9))
    assert density[middle].sum() > 0.6
    assert np.all(density.numpy() >= 0)
