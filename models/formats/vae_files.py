"""The shape of a VAE in a folder or file of its own, for a model whose file has none. Reads no weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from models.errors import CheckpointError
from models.formats import keymaps, ldm
from models.formats.config_files import read_json
from models.formats.diffusers_read import autoencoder_spec, translated
from models.formats.single_file import read_header
from models.spec import AutoencoderSpec

DIFFUSERS_KEY = ".down_blocks."  # occurs in names of tensors in the diffusers layout only


def read_vae_spec(path: Path, model: AutoencoderSpec, allow_pickle: bool) -> AutoencoderSpec:
    """The shape of the VAE at a path. model: what else its model expects of one.

    Raises CheckpointError, also if its latents have another number of channels than the model's.
    """
    if path.is_dir():
        config = path / "config.json"
        found = translated(config, autoencoder_spec, read_json(config))
    else:
        found = spec_of_tensors(path, allow_pickle)
    if found.latent_channels != model.latent_channels:
        raise CheckpointError(
            f"the VAE {path} does not fit: its latents have {found.latent_channels} channels, the model's "
            f"{model.latent_channels}"
        )
    return replace(
        found,
        scale_factor=model.scale_factor,
        latents_mean=model.latents_mean,
        latents_std=model.latents_std,
        sample_size=model.sample_size,
        upcast=model.upcast,
    )


def spec_of_tensors(path: Path, allow_pickle: bool) -> AutoencoderSpec:
    shapes = ldm.below(first := read_header(path, allow_pickle).shapes, ldm.FIRST_STAGE) or first
    try:
        if any(DIFFUSERS_KEY in key for key in shapes):
            return diffusers_spec(shapes)
        return ldm.autoencoder_spec(shapes, image_size=0, scale_factor=1.0)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not a VAE: {error} is missing") from error


def diffusers_spec(shapes: ldm.Shapes) -> AutoencoderSpec:
    """Of a VAE whose tensors have the names of diffusers."""
    levels = ldm.count(shapes, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    names = {key: keymaps.OLDER_ATTENTION.get(key, key) for key in shapes}
    return AutoencoderSpec(
        channels=tuple(
            shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)
        ),
        res_blocks=ldm.count(shapes, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        latent_channels=shapes["post_quant_conv.weight"][1],
        scale_factor=1.0,
        image_channels=shapes["encoder.conv_in.weight"][1],
        middle_attention="encoder.mid_block.attentions.0.to_q.weight" in names.values(),
    )
