"""`ldm generate` and `inpaint`, in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.cli.main import main
from service.requests import images
from service.requests.metadata import Metadata
from tests.checkpoints.lora_files import ATTENTION, as_peft, random_lora, shapes_of, write_lora
from tests.checkpoints.tiny import write_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of the commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDM_DTYPE", "float32")
    return tmp_path


def read_image(file: Path) -> Image.Image:
    """The image of a file, which is closed again."""
    with Image.open(file) as image:
        image.load()
    return image


def test_several_images_get_numbered_files(folder, tiny, capsys):
    assert main(["generate", "p", "-o", "p.jpg", "--model", str(tiny), "--n", "2", "--steps", "1"]) == 0
    assert {read_image(folder / name).format for name in ("p-0.jpg", "p-1.jpg")} == {"JPEG"}
    assert capsys.readouterr().out.startswith("p-0.jpg  seed ")


def test_loras_of_a_folder_are_given_by_name(folder, tiny, capsys):
    shapes = shapes_of(tiny, *ATTENTION)
    (folder / "loras").mkdir()
    for name, seed in (("ink", 1), ("oil", 2)):
        write_lora(folder / "loras" / f"{name}.safetensors", as_peft(random_lora(shapes, seed)))
    (folder / "loras" / "broken.safetensors").write_bytes(b"no tensors")  # not used, so not opened
    common = ["generate", "p", "--model", str(tiny), "--steps", "1", "--seed", "1"]
    dir_ = ["--lora-dir", str(folder / "loras")]
    ink = f"ink={folder / 'loras/ink.safetensors'}"
    for output, flags in {
        "named.png": [*dir_, "--lora", "ink:0.5"],
        "path.png": ["--lora", f"{ink}:0.5"],
        "both.png": [*dir_, "--lora", f"{ink}:0.5"],  # the path takes precedence over the folder's file
        "none.png": dir_,
    }.items():
        assert main([*common, *flags, "-o", output]) == 0
    named, path, both, none = (
        (folder / f"{name}.png").read_bytes() for name in ("named", "path", "both", "none")
    )
    assert named == path == both
    assert named != none
    assert main(["generate", "--from", "named.png", "--model", str(tiny), *dir_, "-o", "again.png"]) == 0
    assert (folder / "again.png").read_bytes() == named
    capsys.readouterr()
    assert main([*common, *dir_, "--lora", "water", "-o", "x.png"]) == 2
    assert "a LoRA of --lora-dir: broken, ink, oil" in capsys.readouterr().err
    assert main([*common, "--lora-dir", "nowhere", "-o", "x.png"]) == 2
    assert "no folder at 'nowhere'" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_from_makes_the_image_of_a_file_again(folder, tiny, suffix):
    first, again = folder / f"a.{suffix}", folder / f"b.{suffix}"
    flags = ["--negative-prompt", "blue", "--steps", "2", "--width", "72", "--sampler", "euler"]
    model = ["--model", str(tiny)]
    assert main(["generate", "a red äpple", *flags, *model, "-o", str(first)]) == 0
    assert main(["generate", "--from", str(first), *model, "-o", str(again)]) == 0
    assert again.read_bytes() == first.read_bytes()
    assert main(["generate", "pear", "--from", str(first), *model, "-o", str(again)]) == 0
    assert again.read_bytes() != first.read_bytes()


def test_from_reads_an_infotext(folder, tiny):
    text = "a (red:1.2) apple\nNegative prompt: blue\nSteps: 2, Sampler: Euler, Schedule type: Karras, "
    text += "CFG scale: 4, Seed: 5, Size: 72x64, Model: other, Version: v1.10.1"
    (folder / "a.png").write_bytes(images.encode(np.zeros((8, 8, 3), np.uint8), "png", Metadata(text)))
    model = ["--model", str(tiny)]
    assert main(["generate", "--from", "a.png", *model, "-o", "b.png"]) == 0
    flags = ["--steps", "2", "--sampler", "euler", "--spacing", "karras", "--guidance-scale", "4"]
    flags += ["--seed", "5", "--width", "72", "--prompt-syntax", "a1111"]
    flags += ["--negative-prompt", "blue"]
    assert main(["generate", "a (red:1.2) apple", *flags, *model, "-o", "c.png"]) == 0
    assert (folder / "b.png").read_bytes() == (folder / "c.png").read_bytes()


def test_from_refuses_an_infotext_that_it_cannot_repeat(folder, tiny, capsys):
    text = "a\nSteps: 2, Sampler: Euler, CFG scale: 4, Seed: 5, Face restoration: CodeFormer"
    (folder / "a.png").write_bytes(images.encode(np.zeros((8, 8, 3), np.uint8), "png", Metadata(text)))
    assert main(["generate", "--from", "a.png", "--model", str(tiny), "-o", "b.png"]) == 2
    assert "Face restoration" in capsys.readouterr().err


def test_from_refuses_a_file_without_parameters(folder, tiny, capsys):
    Image.new("RGB", (8, 8)).save("plain.png")
    assert main(["generate", "--from", "plain.png", "--model", str(tiny), "-o", "b.png"]) == 2
    assert "has no parameters" in capsys.readouterr().err


def test_provenance_can_be_left_out(folder, tiny):
    flags = ["--model", str(tiny), "--steps", "1", "--seed", "1"]
    assert main(["generate", "p", *flags, "-o", "a.png"]) == 0
    assert main(["generate", "p", *flags, "-o", "b.png", "--provenance", "none"]) == 0
    a, b = (folder / "a.png").read_bytes(), (folder / "b.png").read_bytes()
    assert b"trainedAlgorithmicMedia" in a
    assert b"trainedAlgorithmicMedia" not in b
    assert read_image(folder / "a.png").tobytes() == read_image(folder / "b.png").tobytes()


def test_a_variation_keeps_the_seed(folder, tiny, capsys):
    flags = ["--model", str(tiny), "--steps", "1", "--n", "2", "--seed", "3", "-o", "v.png"]
    assert main(["generate", "p", *flags, "--variation-strength", "0.5"]) == 0
    assert capsys.readouterr().out == "v-0.png  seed 3\nv-1.png  seed 3\n"
    assert main(["generate", "p", *flags, "--variation-seed", "1"]) == 2
    assert "--variation-strength" in capsys.readouterr().err


def test_generate_starts_from_an_image_that_is_resized_with_a_warning(folder, tiny, capsys):
    Image.effect_noise((42, 26), 90).convert("RGB").save("sent.png")
    flags = ["--model", str(tiny), "--steps", "4", "--strength", "0.5", "-o", "a.png"]
    assert main(["generate", "p", "--init-image", "sent.png", *flags]) == 0
    stderr = capsys.readouterr().err
    assert "init_image is 42x26 and was resized to 40x24" in stderr
    assert "/2 [" in stderr, "half of the steps"
    assert read_image(folder / "a.png").size == (40, 24)


def test_inpaint_extends_an_image_without_a_mask(folder, tiny):
    sent = Image.effect_noise((40, 24), 90).convert("RGB")
    sent.save("sent.png")
    flags = ["--model", str(tiny), "--steps", "2", "-o", "c.png", "--extend", "8,0,16,0", "--mask-blur", "1"]
    assert main(["inpaint", "sent.png", "-", "p", *flags, "--fill", "blur"]) == 0
    made = read_image(folder / "c.png")
    assert made.size == (64, 24)
    middle = (5, 0, 35, 24)
    assert made.crop((13, 0, 43, 24)).tobytes() == sent.crop(middle).tobytes()


def test_inpaint_keeps_the_pixels_outside_the_mask(folder, tiny):
    sent = Image.effect_noise((40, 24), 90).convert("RGB")
    sent.save("sent.png")
    mask = Image.new("L", sent.size)
    mask.paste(255, (0, 0, 20, 24))
    mask.save("mask.png")
    flags = ["--model", str(tiny), "--steps", "4", "--seed", "1", "-o", "b.png"]
    assert main(["inpaint", "sent.png", "mask.png", "a red apple", *flags]) == 0
    made, right = read_image(folder / "b.png"), (20, 0, 40, 24)
    assert made.crop(right).tobytes() == sent.crop(right).tobytes()
    assert made.tobytes() != sent.tobytes()


def test_a_refiner_may_be_any_model(folder, tiny, capsys):
    other = write_tiny_model(folder / "other", seed=1)
    flags = ["--steps", "4", "--seed", "1", "--model", str(tiny)]
    refined = ["--refiner", str(other), "--refiner-switch-at", "0.5"]
    assert main(["generate", "p", *flags, *refined, "-o", "refined.png"]) == 0
    assert main(["generate", "p", *flags, "-o", "plain.png"]) == 0
    assert read_image(folder / "refined.png").tobytes() != read_image(folder / "plain.png").tobytes()
    both = f"{tiny},{other}"
    assert main(["generate", "--from", "refined.png", "--model", both, "-o", "again.png"]) == 0
    assert (folder / "again.png").read_bytes() == (folder / "refined.png").read_bytes()
    assert main(["generate", "p", *flags, "--refiner-switch-at", "0.5", "-o", "a.png"]) == 2
    assert "has no effect without --refiner" in capsys.readouterr().err


def test_a_second_pass_makes_a_larger_image(folder, tiny, capsys):
    flags = ["--steps", "2", "--seed", "1", "--model", str(tiny)]
    hires = ["--hires-scale", "1.5", "--hires-upscaler", "lanczos", "--hires-strength", "1"]
    assert main(["generate", "p", *flags, *hires, "-o", "large.png"]) == 0
    assert read_image(folder / "large.png").size == (96, 96)
    assert main(["generate", "--from", "large.png", "--model", str(tiny), "-o", "again.png"]) == 0
    assert (folder / "again.png").read_bytes() == (folder / "large.png").read_bytes()
    assert main(["generate", "p", *flags, "--hires-steps", "2", "-o", "a.png"]) == 2
    assert "--hires-steps has no effect without --hires-scale" in capsys.readouterr().err
