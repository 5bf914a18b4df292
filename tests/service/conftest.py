"""Small models of every family, and one server of them all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.servers import Server

LDM_MODELS = ("celebahq", "cin256-v2", "layout2img", "semantic_synthesis", "inpainting_big", "bsr_sr")
SD_FILES = ("sd1", "sd1-inpainting", "sd2", "sd-x4", "sdxl")
SD_FOLDERS = ("xl", "xl-inpainting", "xl-refiner", "xl-zero-snr", "playground", "pix2pix", "x4-upscaler")


@pytest.fixture(scope="session")
def ldm_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Single files of the latent diffusion paper's models, by name."""
    from tests.checkpoints.ldm_models import write

    folder = tmp_path_factory.mktemp("ldm-files")
    return {name: write(folder, name) for name in LDM_MODELS}


@pytest.fixture(scope="session")
def sd_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Single files of Stable Diffusion, by name."""
    from tests.checkpoints.sd_files import ROWS, narrow, reference, write

    folder = tmp_path_factory.mktemp("sd-files")
    rows = {name: narrow(ROWS[name]) for name in SD_FILES}
    return {name: write(folder, name, row, reference(row)) for name, row in rows.items()}


@pytest.fixture(scope="session")
def sd_pipelines() -> dict:
    """Pipelines of `diffusers`, by name."""
    from tests.checkpoints.sd_folders import pipeline

    return {name: pipeline(name) for name in SD_FOLDERS}


@pytest.fixture(scope="session")
def sd_folders(sd_pipelines: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders that those pipelines are saved in, by name."""
    folder = tmp_path_factory.mktemp("sd-folders")
    for name, pipeline in sd_pipelines.items():
        pipeline.save_pretrained(folder / name)
    return {name: folder / name for name in sd_pipelines}


@pytest.fixture(scope="session")
def downloaded_files(sd_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stable Diffusion's files as people find them, by name; the first is the VAE of the second."""
    from tests.checkpoints.sd_files import write_downloaded

    return write_downloaded(tmp_path_factory.mktemp("downloaded"), sd_files)


@pytest.fixture(scope="session")
def families(start_server, ldm_files, sd_files, downloaded_files, sd_folders) -> Iterator[Server]:
    """A server of one model of each family; those of the latent diffusion paper come first."""
    vae, *downloaded = downloaded_files.values()
    models = (*ldm_files.values(), *sd_files.values(), *downloaded, *sd_folders.values())
    with start_server(*models, LDM_PREDICTION="epsilon", LDM_VAE=f"sd1-no-vae={vae}") as server:
        yield server
