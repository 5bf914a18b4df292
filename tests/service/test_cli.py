"""The `ldm` command, where folders called like our packages lie in the current directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from service import model_paths
from service.cli import main
from service.cli.main import parser
from service.cli.options import settings_of
from service.model_paths import ModelPathError
from tests.checkpoints.ldm_files import published, write
from tests.helpers.environment import ROOT
from tests.helpers.servers import write_import_trap

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The current directory of the commands."""
    trap = tmp_path_factory.mktemp("current")
    write_import_trap(trap)
    return trap


def read_image(file: Path) -> Image.Image:
    """An image with all its pixels, of a file that is closed again."""
    with Image.open(file) as image:
        image.load()
    return image


def ldm(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """What the installed script does: the current directory is not on the path."""
    command = [sys.executable, "-P", "-m", "service.cli", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LDM_DTYPE": "float32"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_models_lists_what_can_be_served(folder, tiny):
    done = ldm(folder, "models", "--model", tiny)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("tiny  64x64, 5 steps")


def test_generate_writes_a_picture_that_says_how_it_was_made(folder, tiny):
    done = ldm(folder, "generate", "--model", tiny, "red apple", "--seed", "7", "-o", "apple.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "apple.png  seed 7\n"
    made = read_image(folder / "apple.png")
    parameters = json.loads(made.text["parameters"])
    assert made.size == (64, 64)
    assert (parameters["prompt"], parameters["seed"]) == ("red apple", 7)


def test_generate_numbers_several_pictures(folder, tiny):
    done = ldm(folder, "generate", "p", "-o", "p.jpg", "--model", tiny, "--n", "2", "--steps", "1")
    assert done.returncode == 0, done.stderr
    assert {read_image(folder / name).format for name in ("p-0.jpg", "p-1.jpg")} == {"JPEG"}


def test_generate_starts_from_a_picture_and_inpaint_leaves_the_rest_as_it_was(folder, tiny):
    sent = Image.effect_noise((40, 24), 90).convert("RGB")
    sent.save(folder / "sent.png")
    mask = Image.new("L", sent.size)
    mask.paste(255, (0, 0, 20, 24))
    mask.save(folder / "mask.png")
    asked = ("--model", tiny, "--steps", "4", "--seed", "1")
    done = ldm(
        folder, "generate", "p", "--init-image", "sent.png", "--strength", "0.5", "-o", "a.png", *asked
    )
    assert done.returncode == 0, done.stderr
    assert "init_image is 40x24 and was resized to 32x32" in done.stderr
    assert "/2 [" in done.stderr  # half of the steps
    assert read_image(folder / "a.png").size == (32, 32)
    done = ldm(folder, "inpaint", "sent.png", "mask.png", "a red apple", "-o", "b.png", *asked)
    assert done.returncode == 0, done.stderr
    made, right = read_image(folder / "b.png"), (20, 0, 40, 24)
    assert made.crop(right).tobytes() == sent.crop(right).tobytes()
    assert made.tobytes() != sent.tobytes()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("generate", "p", "-o", "p.bmp", "--model", "TINY"), "--output"),
        (("generate", "p", "-o", "nowhere/p.png", "--model", "TINY"), "--output"),
        (("generate", "p", "-o", "p.png", "--model", "nowhere"), "nowhere"),
        (("generate", "p", "-o", "p.png", "--model", "TINY", "--steps", "5000"), "steps"),
        (("generate", "p", "-o", "p.png", "--model", "TINY", "--width", "65"), "width"),
        (("generate", " ", "-o", "p.png", "--model", "TINY"), "prompt"),
        (("generate", "p", "-o", "p.png", "--model", "TINY", "--strength", "0.5"), "strength"),
        (("generate", "p", "-o", "p.png", "--model", "TINY", "--init-image", "no.png"), "no.png"),
        (("inpaint", "no.png", "no.png", "p", "-o", "p.png", "--model", "TINY"), "no.png"),
        (("serve", "--model", "nowhere"), "nowhere"),
        (("serve", "--model", "TINY", "--port", "99999"), "--port"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_2(folder, tiny, arguments, named):
    done = ldm(folder, *(str(tiny) if part == "TINY" else part for part in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert named in done.stderr
    assert done.stderr.count("\n") == 1


def test_only_commands_without_a_prompt_take_several_models():
    assert parser().parse_args(["serve", "--model", "a", "b"]).model == ["a", "b"]
    args = parser().parse_args(["generate", "--model", "a", "a prompt", "-o", "f.png"])
    assert (args.model, args.prompt) == ("a", "a prompt")


def test_a_flag_without_a_value_is_a_setting_too(monkeypatch):
    assert settings_of(parser().parse_args(["serve", "--invariant"]), "invariant").invariant
    monkeypatch.setenv("LDM_INVARIANT", "true")
    assert settings_of(parser().parse_args(["serve"]), "invariant").invariant
    monkeypatch.setenv("LDM_INVARIANT", "0")
    assert not settings_of(parser().parse_args(["serve"]), "invariant").invariant


def test_a_package_without_the_model_in_the_box_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "weights", None)  # as where no such package is
    with pytest.raises(ModelPathError, match="emoji"):
        model_paths.locate("emoji")


def test_inspect_says_what_is_there_and_fails_where_something_is_not(tmp_path, capsys):
    file = write(tmp_path, "celebahq")
    assert main.main(["inspect", str(file)]) == 0
    assert "unconditional VQ (celebahq" in capsys.readouterr().out
    assert main.main(["inspect", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "celebahq"
    write(tmp_path, "celebahq", lambda tensors: tensors.update(more=torch.zeros(1)))
    assert main.main(["inspect", str(file)]) == 1
    assert "1 unexpected keys: more" in capsys.readouterr().out
    file.write_bytes(file.read_bytes()[:1000])
    assert main.main(["inspect", str(file)]) == 2
    assert "corrupt or truncated" in capsys.readouterr().err


def test_pickles_are_read_with_a_flag_or_a_variable_only(tmp_path, capsys, monkeypatch):
    file = tmp_path / "faces" / "model.ckpt"
    file.parent.mkdir()
    torch.save({"state_dict": published("celebahq")}, file)
    for command in (["inspect", str(file)], ["models", "--model", str(file)], ["convert", str(file), "out"]):
        assert main.main(command) == 2
        assert "pickle" in capsys.readouterr().err
    assert main.main(["models", "--model", str(file), "--allow-pickle"]) == 0
    assert capsys.readouterr().out.startswith("faces  256x256")
    assert (
        main.main(["convert", str(file), str(tmp_path / "out"), "--dtype", "float16", "--allow-pickle"]) == 0
    )
    monkeypatch.setenv("LDM_ALLOW_PICKLE", "1")
    assert main.main(["inspect", str(file)]) == 0
    monkeypatch.delenv("LDM_ALLOW_PICKLE")
    assert main.main(["inspect", str(tmp_path / "out")]) == 0
    assert "float16" in capsys.readouterr().out
