"""Which files of a folder are found, of which kind, and by which name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.catalogue import Catalogue, Folders, read_catalogue
from service.model_paths import ModelPathError
from service.settings import Settings

ROOT = "folder"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / ROOT).mkdir()
    return tmp_path / ROOT


def write(root: Path, *files: str) -> None:
    """Write files with some bytes, below the root."""
    for name in files:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"some bytes")


def read(*roots: Path, **options) -> Catalogue:
    return read_catalogue(map(str, roots), (), **options)


def found(catalogue: Catalogue) -> set[tuple[str, str]]:
    return {(entry.kind, entry.name) for entry in catalogue.entries}


def reasons(catalogue: Catalogue) -> dict[str, str]:
    return {file.removeprefix(ROOT + "/"): reason for file, reason in catalogue.ignored}


A1111 = {
    "models/Stable-diffusion/sd15.safetensors": ("model", "sd15"),
    "models/Stable-diffusion/anime/xl.safetensors": ("model", "xl"),
    "models/Stable-diffusion/sd15.vae.safetensors": ("vae", "sd15.vae"),
    "models/Lora/ink.safetensors": ("lora", "ink"),
    "models/LyCORIS/oil.safetensors": ("lora", "oil"),
    "models/VAE/mse.safetensors": ("vae", "mse"),
    "models/VAE-approx/taesd.safetensors": ("tiny_vae", "taesd"),
    "models/ControlNet/canny.safetensors": ("control", "canny"),
    "embeddings/zebra.safetensors": ("embedding", "zebra"),
}
COMFYUI = {
    "checkpoints/sd15.safetensors": ("model", "sd15"),
    "diffusers/xl/model_index.json": ("model", "xl"),
    "loras/style/ink.safetensors": ("lora", "ink"),
    "embeddings/zebra.safetensors": ("embedding", "zebra"),
    "vae/mse.safetensors": ("vae", "mse"),
    "vae/diffusers-vae/config.json": ("vae", "diffusers-vae"),
    "vae_approx/taesd.safetensors": ("tiny_vae", "taesd"),
    "controlnet/canny.safetensors": ("control", "canny"),
    "controlnet/depth/config.json": ("control", "depth"),
    "clip_vision/clip.safetensors": ("image_encoder", "clip"),
    "ipadapter/ip.safetensors": ("reference_adapter", "ip"),
    "in-the-root.safetensors": ("model", "in-the-root"),
}
PASSED_OVER = (
    "upscale_models/esrgan.safetensors",
    "text_encoders/clip.safetensors",
    "my-notes/a.safetensors",
    ".cache/b.safetensors",
    "checkpoints/.hidden.safetensors",
)


@pytest.mark.parametrize("layout", [A1111, COMFYUI])
def test_the_names_of_subfolders_say_what_is_in_them(root, layout):
    write(root, *layout, *PASSED_OVER)
    catalogue = read(root)
    assert found(catalogue) == set(layout.values())
    assert catalogue.ignored == ()


def test_any_other_folder_is_searched_for_models(root):
    write(root, "a.safetensors", "more/b.safetensors", "more/c/model_index.json", "more/c/unet/d.safetensors")
    write(root, "text_encoder/config.json", "text_encoder/model.safetensors")  # belongs to a model
    assert found(read(root)) == {("model", "a"), ("model", "b"), ("model", "c")}


@pytest.mark.parametrize(("name", "kind"), [("embeddings", "embedding"), ("Lora", "lora"), ("vae", "vae")])
def test_the_name_of_the_folder_itself_counts(tmp_path, name, kind):
    write(tmp_path / name, "sub/a.safetensors")
    assert found(read(tmp_path / name)) == {(kind, "a")}


def test_a_lora_folder_has_loras_only(root):
    write(root, "ink.safetensors", "deep/er/oil.safetensors", "peft/adapter_model.safetensors")
    catalogue = read_catalogue((), [str(root)])
    assert found(catalogue) == {("lora", "ink"), ("lora", "oil"), ("lora", "peft")}


def test_a_file_with_a_general_name_is_named_after_its_folder(root):
    write(root, "dreams/model.safetensors", "model.safetensors")
    assert found(read(root)) == {("model", "dreams"), ("model", "model")}


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("a.safetensors.part", "still being downloaded"),
        ("a.crdownload", "still being downloaded"),
        ("a.tmp", "still being downloaded"),
        ("a.ckpt", "--allow-pickle"),
        ("a.gguf", "GGUF"),
        ("notes.txt", "not a file of weights"),
        ("a\n.safetensors", "characters"),
    ],
)
def test_other_files_are_ignored_with_the_reason(root, file, reason):
    write(root, file)
    catalogue = read(root)
    assert catalogue.entries == ()
    assert reason in reasons(catalogue)[file]


def test_a_file_whose_download_is_not_finished_is_ignored(root):
    write(root, "a.safetensors", "a.safetensors.aria2", "b.safetensors")
    assert found(read(root)) == {("model", "b")}


def test_pickles_are_found_if_they_are_allowed(root):
    write(root, "a.ckpt", "b.pt")
    assert found(read(root, allow_pickle=True)) == {("model", "a"), ("model", "b")}


def test_files_that_belong_to_a_model_are_passed_over(root):
    write(root, "a.safetensors", "a.png", "a.preview.png", "a.yaml", "a.civitai.info")
    (root / "put_checkpoints_here").touch()
    assert read(root).ignored == ()


def test_the_first_of_two_files_with_one_name_is_used(root, tmp_path):
    write(root, "b/a.safetensors", "a.safetensors")
    write(tmp_path / "second", "a.safetensors", "given.safetensors")
    catalogue = read(root, tmp_path / "second", taken={"model": {"given": tmp_path}})
    (entry,) = catalogue.entries
    assert entry.path == str(root / "a.safetensors")
    assert reasons(catalogue) == {
        "b/a.safetensors": "folder/a.safetensors has the same name",
        "second/a.safetensors": "folder/a.safetensors has the same name",
        "second/given.safetensors": "the name given was given at start-up",
    }


def test_a_model_of_a_folder_can_be_given_by_name_or_path_without_a_warning(root):
    write(root, "a.safetensors", "b.safetensors")
    for given in ("b", str(root / "b.safetensors")):
        folders = Folders(Settings(model=(given,), model_dir=(str(root),)))
        assert folders.models == {"b": root / "b.safetensors"}
        assert found(folders.read()) == {("model", "a")}
        assert folders.read().ignored == ()
    with pytest.raises(ModelPathError, match="name of a model in --model-dir"):
        Folders(Settings(model=("c",), model_dir=(str(root),)))


def test_names_of_embeddings_have_no_case(root):
    write(root, "embeddings/Zebra.safetensors", "embeddings/zebra.safetensors")
    assert len(read(root).entries) == 1


def test_a_folder_given_twice_is_read_once(root):
    write(root, "a.safetensors")
    catalogue = read(root, root)
    assert len(catalogue.entries) == 1
    assert catalogue.ignored == ()


def test_links_are_followed_once(root, tmp_path):
    write(tmp_path, "elsewhere/a.safetensors")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "b.safetensors").symlink_to(tmp_path / "elsewhere" / "a.safetensors")
    (root / "loop").symlink_to(root)
    (root / "broken.safetensors").symlink_to(tmp_path / "nowhere")
    assert found(read(root)) == {("model", "a"), ("model", "b")}


def test_a_folder_that_is_gone_is_ignored_like_a_file(root):
    assert "cannot be read" in read(root / "gone").ignored[0].reason


def test_no_message_has_the_path_of_the_folder(root):
    write(root, "sub/a.ckpt", "a.safetensors", "sub/a.safetensors")
    assert str(root) not in str(read(root).ignored)


def test_the_version_changes_with_the_file_and_its_configuration(root):
    def version() -> str:
        return read(root).entries[0].version

    write(root, "a.safetensors")
    first = version()
    assert version() == first
    (root / "a.yaml").touch()
    second = version()
    os.utime(root / "a.safetensors", (1, 1))
    assert len({first, second, version()}) == 3


def test_thousands_of_files_are_found(root):
    write(root, *(f"loras/{number}.safetensors" for number in range(3000)))
    assert len(read(root).entries) == 3000


def test_there_is_a_limit_of_files(root, monkeypatch):
    monkeypatch.setattr("service.catalogue.MAX_FILES", 3)
    write(root, *(f"{number}.safetensors" for number in range(9)))
    catalogue = read(root)
    assert len(catalogue.entries) <= 3
    assert any("more than 3 files" in reason for reason in reasons(catalogue).values())
