"""Opens a UNet from a separate folder or file."""

from __future__ import annotations

import torch

from models.checkpoint.parts import Part, check_part, unet_names
from models.checkpoint.weights import NETWORK_FILES, map_weights, open_network
from models.formats import keymaps, ldm
from models.formats.unet_files import UNetFile
from models.networks.unet import UNet


def open_unet(file: UNetFile, unet: UNet, device: torch.device | str, allow_pickle: bool) -> Part:
    """The UNet's tensors; unet: on the meta device. Raises CheckpointError if they do not fit."""
    if file.header is None:
        weights = open_network(file.path, NETWORK_FILES, device, allow_pickle)
    else:
        weights = map_weights(file.path, file.header, device)
        used = [key for key in weights.stored if key.startswith(file.prefix) and not keymaps.is_ignored(key)]
        weights = weights.renamed({key.removeprefix(file.prefix): key for key in used})
    names = unet_names(unet) if file.is_diffusers else {key: key for key in unet.state_dict()}
    if not file.is_diffusers and ldm.OTHER_GUIDANCE_KEY in weights.stored:
        names[ldm.GUIDANCE_KEY] = ldm.OTHER_GUIDANCE_KEY
    part = Part(unet, names, weights)
    check_part(part, f"the UNet {file.path} does not fit")
    return part
