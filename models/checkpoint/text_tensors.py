"""Text encoders inside single files: under which names, and what OpenCLIP holds in another form than ours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from torch import Tensor

from models.conditioning.text_encoder import TextEncoder
from models.formats import keymaps
from models.formats.safetensors import Stored
from models.formats.stable_diffusion import PROJECTION, Place

NATIVE = "transformer."  # of all of an encoder but its projection
WHOLE = ".attn.in_proj_"


def names_of(encoder: TextEncoder, place: Place, held: Collection[str]) -> dict[str, str]:
    """Native parameter -> name in the file, as in_pieces() has it; held: the file's names."""
    if place.open_clip:
        table = keymaps.open_clip(encoder.spec.layers)
        return {key: place.prefix + keymaps.rename(key, table) for key in encoder.state_dict()}
    prefix = place.prefix + keymaps.TEXT_PREFIX
    if not any(key.startswith(prefix) for key in held):
        prefix = place.prefix  # in the names of later versions of `transformers`
    return {key: prefix + key.removeprefix(NATIVE) for key in encoder.state_dict()}


def unused(key: str, encoder: TextEncoder, place: Place) -> bool:
    """Whether a tensor is of the layer that no token goes through, or of a projection that nothing takes."""
    if not place.open_clip or encoder.spec.pooled:
        return False
    last = f"{place.prefix}transformer.resblocks.{encoder.spec.layers}."
    return key == place.prefix + PROJECTION or key.startswith(last)


def in_pieces(
    stored: Mapping[str, Stored], read: Callable[[str], Tensor]
) -> tuple[dict[str, Stored], Callable[[str], Tensor]]:
    """The same tensors with q, k and v of each attention apart, and the projection's axes in our order."""
    out = {}
    for key, entry in stored.items():
        if WHOLE in key and entry.shape and entry.shape[0] % len(keymaps.PIECES) == 0:
            third = replace(entry, shape=(entry.shape[0] // len(keymaps.PIECES), *entry.shape[1:]))
            out |= {f"{key}.{piece}": third for piece in keymaps.PIECES}
        else:
            out[key] = replace(entry, shape=entry.shape[::-1]) if key.endswith(PROJECTION) else entry

    def read_piece(name: str) -> Tensor:
        if name not in stored:
            whole, _, piece = name.rpartition(".")
            return read(whole).chunk(len(keymaps.PIECES))[keymaps.PIECES[piece]]
        return read(name).T.contiguous() if name.endswith(PROJECTION) else read(name)

    return out, read_piece
