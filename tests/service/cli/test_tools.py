"""`ldm models`, `inspect`, `convert` and `settings`."""

from __future__ import annotations

import json
import shutil

import torch
from safetensors.torch import save_file

from service.cli.main import main
from service.cli.tools import settings_table
from tests.checkpoints.ldm_files import published, write
from tests.helpers.environment import ROOT


def test_models_lists_what_can_be_served(tiny, capsys):
    assert main(["models", "--model", str(tiny)]) == 0
    assert capsys.readouterr().out.startswith("tiny  64x64, 5 steps")


def test_models_lists_folders_and_says_what_is_ignored(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "checkpoints" / "mine")
    (tmp_path / "checkpoints" / "broken.safetensors").write_bytes(b"no tensors")
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "ink.safetensors").touch()
    assert main(["models", "--model-dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["mine", "lora:"]
    assert "checkpoints/broken.safetensors is ignored: broken.safetensors is corrupt" in err
    assert str(tmp_path) not in out + err


def test_the_readme_has_the_table_of_settings():
    """If this fails: replace the table in service/README.md by the output of `ldm settings`."""
    assert "\n".join(settings_table()) in (ROOT / "service/README.md").read_text()


def test_settings_prints_the_table(capsys):
    assert main(["settings"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| `--queue-size` | `LDM_QUEUE_SIZE` | `64` |") for line in lines)
    assert any(line.startswith("| none | `LDM_API_KEYS` |") for line in lines)


def test_inspect_describes_a_checkpoint_and_fails_if_tensors_are_missing(tmp_path, capsys):
    file = write(tmp_path, "celebahq")
    assert main(["inspect", str(file)]) == 0
    assert "unconditional VQ (celebahq" in capsys.readouterr().out
    assert main(["inspect", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "celebahq"
    write(tmp_path, "celebahq", lambda tensors: tensors.pop("first_stage_model.decoder.conv_in.bias"))
    assert main(["inspect", str(file)]) == 1
    assert "decoder.conv_in.bias" in capsys.readouterr().out
    file.write_bytes(file.read_bytes()[:1000])
    assert main(["inspect", str(file)]) == 2
    assert "corrupt or truncated" in capsys.readouterr().err


def test_inspect_describes_a_lora_in_a_folder_and_fails_if_it_does_not_fit(tiny, tmp_path, capsys):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(
        {"unet.conv_in.lora.down.weight": torch.ones(2, 3), "unet.a.lora.up.weight": torch.ones(3, 2)}, file
    )
    assert main(["inspect", str(tmp_path)]) == 0
    assert "adapter     LoRA" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--base", str(tiny)]) == 1
    assert "does not fit tiny" in capsys.readouterr().out


def test_pickles_are_read_only_with_a_flag_or_a_variable(tmp_path, capsys, monkeypatch):
    file = tmp_path / "faces" / "model.ckpt"
    file.parent.mkdir()
    torch.save({"state_dict": published("celebahq")}, file)
    for command in (["inspect", str(file)], ["models", "--model", str(file)], ["convert", str(file), "out"]):
        assert main(command) == 2
        assert "pickle" in capsys.readouterr().err
    assert main(["models", "--model", str(file), "--allow-pickle"]) == 0
    assert capsys.readouterr().out.startswith("faces  256x256")
    assert main(["convert", str(file), str(tmp_path / "out"), "--dtype", "float16", "--allow-pickle"]) == 0
    monkeypatch.setenv("LDM_ALLOW_PICKLE", "1")
    assert main(["inspect", str(file)]) == 0
    monkeypatch.delenv("LDM_ALLOW_PICKLE")
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "float16" in capsys.readouterr().out
