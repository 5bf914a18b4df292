"""What is in the files of folders: which model takes which LoRA, embedding and VAE."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.adapters import lora
from models.checkpoint.weights import Weights
from models.errors import CheckpointError
from service.catalogue import Catalogue, Folders
from service.device.loading import build
from service.device.runner import TorchRunner
from service.errors import LoraUnreadable, ModelUnreadable
from service.model_paths import bundled
from service.settings import Settings
from tests.checkpoints.lora_files import ATTENTION, as_kohya, random_lora, shapes_of, write_lora
from tests.checkpoints.tiny import write_tiny_model
from tests.helpers.fake_runner import make_job
from tests.helpers.torch_runner import run_jobs

JOB = make_job("x", model="tiny", prompt="a zebra", width=64, height=64, steps=2)


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    """A folder with the model `tiny`, in the layout of ComfyUI."""
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(tiny, tmp_path / "checkpoints" / "tiny")
    for name in ("loras", "embeddings", "vae"):
        (tmp_path / name).mkdir()
    return tmp_path


def settings_of(folder: Path, **changes) -> Settings:
    return Settings(dtype="float32", device="cpu", **({"model": (), "model_dir": (str(folder),)} | changes))


def served(folder: Path, **changes) -> TorchRunner:
    settings = settings_of(folder, **changes)
    return build(settings, {}, catalogue=read(settings))


def read(settings: Settings, number: int = 0) -> Catalogue:
    return Folders(settings).read(number)


def rescan(runner: TorchRunner, folder: Path) -> None:
    runner.install(runner.read(read(settings_of(folder), 1)))


def ignored(runner: TorchRunner) -> dict[str, str]:
    return {Path(file).name: reason for file, reason in runner.registry.contents.ignored}


def write_ink(folder: Path, model: Path, name: str = "ink", **of_lora) -> Path:
    changes = random_lora(shapes_of(model, *ATTENTION), **of_lora)
    return write_lora(folder / "loras" / f"{name}.safetensors", as_kohya(changes))


def write_zebra(folder: Path, seed: int = 0, width: int = 32) -> None:
    vectors = 3 * torch.randn(2, width, generator=torch.Generator().manual_seed(seed))
    save_file({"emb_params": vectors}, folder / "embeddings" / "zebra.safetensors")


def test_a_lora_is_offered_with_the_models_that_it_fits(folder, tiny):
    shutil.copytree(bundled("emoji"), folder / "checkpoints" / "emoji")
    write_ink(folder, tiny)
    write_ink(folder, bundled("emoji"), "oil")
    runner = served(folder)
    assert {name: spec.loras for name, spec in runner.specs.items()} == {"emoji": ("oil",), "tiny": ("ink",)}
    assert ignored(runner) == {}


def test_a_lora_that_fits_no_model_is_ignored(folder):
    write_ink(folder, bundled("emoji"))
    assert "does not fit tiny" in ignored(served(folder))["ink.safetensors"]


def test_finding_a_lora_reads_none_of_its_tensors(folder, tiny, monkeypatch):
    def header_alone(file: Path, header, device) -> Weights:
        return Weights(header.tensors, lambda key: pytest.fail(f"{key} was read"))

    write_ink(folder, tiny)
    monkeypatch.setattr(lora, "map_weights", header_alone)
    assert served(folder).specs["tiny"].loras == ("ink",)


def test_unchanged_files_are_read_once(folder, tiny, monkeypatch):
    opened: list[str] = []

    class Counted(lora.OpenedLora):
        def __init__(self, name: str, *rest) -> None:
            opened.append(name)
            super().__init__(name, *rest)

    monkeypatch.setattr("service.device.library.OpenedLora", Counted)
    write_ink(folder, tiny)
    runner = served(folder)
    write_ink(folder, tiny, "oil")
    rescan(runner, folder)
    assert opened == ["ink", "oil"]
    assert runner.specs["tiny"].loras == ("ink", "oil")


def test_a_lora_given_by_path_must_fit(folder, tiny):
    file = write_ink(folder, bundled("emoji"))
    with pytest.raises(CheckpointError, match="does not fit tiny"):
        served(folder, lora=(f"ink={file}",))


@pytest.mark.parametrize(("width", "named"), [(32, None), (48, "48 wide, which fits no model")])
def test_an_embedding_must_fit_a_model(folder, width, named):
    write_zebra(folder, width=width)
    runner = served(folder)
    assert runner.specs["tiny"].embeddings == (() if named else ("zebra",))
    assert (named or "") in ignored(runner).get("zebra.safetensors", "")


def test_an_embedding_whose_name_is_not_a_word_is_ignored(folder):
    write_zebra(folder)
    file = folder / "embeddings" / "zebra.safetensors"
    file.rename(file.with_stem("a zebra"))
    assert "word of a prompt" in ignored(served(folder))["a zebra.safetensors"]


def test_a_loaded_model_learns_and_forgets_words_at_a_rescan(folder):
    runner = served(folder)
    (plain,) = run_jobs(runner, JOB)["x"]
    images = []
    for seed in (0, 1):
        write_zebra(folder, seed)
        rescan(runner, folder)
        images += run_jobs(runner, JOB)["x"]
    assert len({plain, *images}) == 3
    assert images[1:] == list(run_jobs(served(folder), JOB)["x"])
    (folder / "embeddings" / "zebra.safetensors").unlink()
    rescan(runner, folder)
    assert run_jobs(runner, JOB)["x"] == (plain,)


def test_a_vae_beside_the_model_replaces_its_own(folder, tiny, tmp_path):
    own = run_jobs(served(folder), JOB)["x"]
    other = write_tiny_model(tmp_path / "other", seed=9) / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(other, folder / "checkpoints" / "tiny.vae.safetensors")
    runner = served(folder)
    assert runner.registry.contents.vaes.keys() == {"tiny"}
    (image,) = run_jobs(runner, JOB)["x"]
    assert (image,) != own
    settings = settings_of(folder, model=("tiny",))  # by its name, so that it is loaded at the start
    folders = Folders(settings)
    by_name = build(settings, folders.models, catalogue=folders.read())
    assert by_name.registry.is_loaded("tiny")
    assert run_jobs(by_name, JOB)["x"] == (image,)


def test_a_model_that_becomes_another_one_before_it_is_loaded_is_unreadable(sd_files, folder):
    file = folder / "checkpoints" / "a.safetensors"
    shutil.copy(sd_files["sd1"], file)
    runner = served(folder)
    shutil.copy(sd_files["sdxl"], file)
    with pytest.raises(ModelUnreadable):
        runner.registry.load("a")
    assert runner.registry.load("tiny")


def test_a_lora_that_becomes_another_one_is_unreadable(folder, tiny):
    write_ink(folder, tiny)
    runner = served(folder)
    spec = runner.specs["tiny"]
    assert len(runner.registry._open(spec, ["ink"])) == 1
    write_ink(folder, bundled("emoji"))
    with pytest.raises(LoraUnreadable):
        runner.registry._open(spec, ["ink"])


def test_only_given_models_are_loaded_at_the_start(folder, tiny):
    settings = settings_of(folder)
    runner = build(settings, {"given": tiny}, catalogue=read(settings))
    assert list(runner.registry) == ["given", "tiny"]
    assert runner.registry.loaded().keys() == {"given"}
