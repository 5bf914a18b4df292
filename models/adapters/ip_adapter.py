"""IP-Adapters: attention to image tokens beside the text's (Ye et al. 2023).

    open_adapter()              the adapter at a path, with its image encoder
    ReferenceAdapter.prepare()  once for each reference image: keys and values for every layer
    ReferenceAdapter.inputs()   at each step: those of some rows, with their scales

A row's text is unchanged; ControlNets never see image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.adapter_specs import IPAdapterSpec
from models.adapters.image_encoder import ImageEncoder, open_image_encoder
from models.checkpoint.meta import shapes_only
from models.checkpoint.parts import load_part, native_part
from models.checkpoint.weights import Weights, open_weights
from models.errors import CheckpointError
from models.formats import adapter_files, ip_files
from models.formats.safetensors import Stored
from models.formats.structure import checked_structure
from models.networks.adapter_inputs import AdapterInputs, ImageTokens
from models.networks.image_projection import IPAdapter
from models.networks.modules import weight_bytes
from models.spec import ModelSpec, UNetSpec


@dataclass(frozen=True)
class ReferenceAdapter:
    """An IP-Adapter that is ready to run. nothing: keys and values (1, n, W) without an image."""

    kind: str
    spec: IPAdapterSpec
    network: IPAdapter
    encoder: ImageEncoder
    nothing: tuple[Tensor, Tensor]

    @property
    def bytes(self) -> int:
        """Memory of the weights, without the image encoder's."""
        return weight_bytes(self.network)

    def misfit(self, model: ModelSpec) -> str | None:
        """Why it does not fit a model, as a clause; None if it does."""
        return misfit(self.spec, model)

    def fits(self, model: ModelSpec) -> bool:
        return self.misfit(model) is None

    def prepare(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """A reference image (1, 3, H, W) in [0, 1], of which the centre square is used -> keys and values.

        Each (2, n, W): of unconditional rows, then of conditional rows. Needed once for each image.
        """
        keys, values = self.network(seen(self.encoder.encode(images), self.spec))
        return torch.cat([self.nothing[0], keys]), torch.cat([self.nothing[1], values])

    def inputs(self, keys: Tensor, values: Tensor, scales: Tensor) -> AdapterInputs:
        """The inputs of R rows: keys and values (R, n, W) as prepare() returns them, scales (R,)."""
        return AdapterInputs(images=(ImageTokens(keys, values, scales),))


def seen(encoded: tuple[Tensor, Tensor], spec: IPAdapterSpec) -> Tensor:
    """What an adapter takes of an image encoder's outputs."""
    projected, states = encoded
    return projected if spec.projected else states


def misfit(spec: IPAdapterSpec, model: ModelSpec) -> str | None:
    """Why an adapter does not fit a model, as a clause with the numbers of both; None if it does."""
    if model.unet is None:
        return "the model has no UNet"
    if spec.context_width != model.unet.context_width:
        return (
            f"its tokens are {spec.context_width} wide, the model's contexts {model.unet.context_width} wide"
        )
    down, up, middle = ip_files.down_up_middle(model.unet)
    expected = (*down, *up, *middle)
    if len(expected) != len(spec.layers):
        return f"it is for {len(spec.layers)} cross-attention layers, the model has {len(expected)}"
    pairs = enumerate(zip(spec.layers, expected, strict=True))
    return next(
        (
            f"its layer {2 * n + 1} has {own} channels, the model's {theirs}"
            for n, (own, theirs) in pairs
            if own != theirs
        ),
        None,
    )


def open_adapter(
    path: str | Path,
    image_encoder: str | Path | ImageEncoder,
    base: ModelSpec,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
) -> ReferenceAdapter:
    """The IP-Adapter in a .safetensors or .bin file, for a model.

    image_encoder: CLIP's, or its folder or file. Raises CheckpointError for a file that is no IP-Adapter, for
    missing, unexpected and misshaped tensors, and if it fits neither the model nor the image encoder.
    """
    path = Path(path)
    tensors = open_weights(path, device, allow_pickle)
    shapes = tensors.shapes
    if not ip_files.is_ip_adapter(shapes):
        raise CheckpointError(f"{path} is not an IP-Adapter")
    if reason := ip_files.refusal(shapes):
        raise CheckpointError(f"{path} is {reason}")
    with checked_structure(f"the IP-Adapter {path}"):
        spec = ip_files.spec_of_tensors(shapes)
    if reason := misfit(spec, base):
        raise CheckpointError(f"the IP-Adapter {path} does not fit {base.name}: {reason}")
    if not isinstance(image_encoder, ImageEncoder):
        image_encoder = open_image_encoder(image_encoder, device, dtype, allow_pickle)
    width = image_encoder.spec.projection if spec.projected else image_encoder.spec.width
    if width != spec.embedding_width:
        raise CheckpointError(
            f"the IP-Adapter {path} takes image vectors {spec.embedding_width} wide, the image encoder gives "
            f"{width}"
        )
    assert base.unet is not None
    with checked_structure(f"the IP-Adapter {path}"), shapes_only():
        network = IPAdapter(spec)
    part = native_part(network, joined(tensors, spec, base.unet))
    load_part(part, f"the IP-Adapter {path}", dtype, device)
    with torch.inference_mode():
        nothing = network(seen(image_encoder.encode_nothing(), spec))
    return ReferenceAdapter(adapter_files.IP_KINDS[spec.kind], spec, network, image_encoder, nothing)


def joined(tensors: Weights, spec: IPAdapterSpec, unet: UNetSpec) -> Weights:
    """The tensors with the weights of all layers as one for keys and one for values, in the UNet's order."""
    numbers = ip_files.layer_numbers(tensors.shapes)
    down, up, _ = map(len, ip_files.down_up_middle(unet))
    order = [
        *numbers[:down],
        *numbers[down + up :],
        *numbers[down : down + up],
    ]  # the middle is the file's last
    names = {
        f"{kind}.weight": [f"{ip_files.ATTENTION}{number}.to_{kind[0]}_ip.weight" for number in order]
        for kind in ("keys", "values")
    }
    parts = {name for group in names.values() for name in group}
    stored = {key: entry for key, entry in tensors.stored.items() if key not in parts}
    for name, group in names.items():
        if all(part in tensors.stored for part in group):
            stored[name] = stacked([tensors.stored[part] for part in group])

    def read(key: str) -> Tensor:
        return torch.cat([tensors.read(part) for part in names[key]]) if key in names else tensors.read(key)

    return Weights(stored, read)


def stacked(entries: list[Stored]) -> Stored:
    """The entry of matrices that are read as one, with the last one's columns."""
    rows = sum(entry.shape[0] if len(entry.shape) == 2 else 0 for entry in entries)
    widths = {entry.shape[1:] for entry in entries}
    shape = (rows, *(widths.pop() if len(widths) == 1 else (0,)))
    return Stored(entries[0].dtype, shape, (1,) * len(shape), 0, 0)
