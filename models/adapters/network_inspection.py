"""What a control, an IP-Adapter or an image encoder is (`ldm inspect`)."""

from __future__ import annotations

from collections.abc import Iterator

from models.adapter_specs import ControlNetSpec, IPAdapterSpec, T2IAdapterSpec, VisionSpec
from models.adapters import control_net, ip_adapter, t2i_adapter
from models.adapters.report import UNKNOWN, AdapterReport, dtypes
from models.checkpoint.parts import Part, misfits
from models.checkpoint.weights import (
    NETWORK_FILES,
    TEXT_FILES,
    Weights,
    open_network,
    open_weights,
)
from models.errors import CheckpointError
from models.formats import control_files
from models.formats.adapter_files import AdapterFile, Spec
from models.formats.identify import STABLE_DIFFUSION
from models.formats.structure import checked_structure
from models.formats.t2i_files import XL_FACTOR
from models.spec import ModelSpec

SDXL = STABLE_DIFFUSION[2048]


def network_report(found: AdapterFile, allow_pickle: bool, model: ModelSpec | None) -> AdapterReport:
    """Describe a recognised adapter, and why it cannot be used or does not fit `model`.

    Raises CheckpointError for weights that cannot be read.
    """
    names = TEXT_FILES if found.role == "image encoder" else NETWORK_FILES
    if found.path.is_dir():
        tensors = open_network(found.path, names, "cpu", allow_pickle)
    else:
        tensors = open_weights(found.path, "cpu", allow_pickle)
    types = dtypes(tensors.stored)
    return AdapterReport(
        name=found.path.stem,
        adapter=found.kind,
        base_model=base_of(found.spec),
        dtypes=types,
        parameters=sum(types.values()),
        bytes=sum(stored.bytes for stored in tensors.stored.values()),
        details=dict(details_of(found.spec)),
        problems=(found.problem,) if found.problem else tuple(checked(found.spec, tensors, model)),
    )


def base_of(spec: Spec | None) -> str:
    """The base model: by the width of the context, or by sizes of features."""
    match spec:
        case ControlNetSpec(unet=unet):
            if unet.added_width and not unet.context_width:
                return SDXL
            width = unet.context_width
        case IPAdapterSpec(context_width=width):
            pass
        case T2IAdapterSpec(factor=factor):
            return SDXL if factor == XL_FACTOR else f"{STABLE_DIFFUSION[768]} or 2.x"
        case VisionSpec():
            return "any"
        case _:
            return UNKNOWN
    return STABLE_DIFFUSION.get(width, f"{UNKNOWN} (contexts {width} wide)")


def details_of(spec: Spec | None) -> Iterator[tuple[str, str]]:
    match spec:
        case ControlNetSpec():
            yield "image", f"{spec.hint_channels} channels, {spec.factor} pixels for a latent cell"
            if spec.control_types:
                yield "types", ", ".join(control_files.CONTROL_TYPES[: spec.control_types])
            if spec.global_pool:
                yield "acts", "equally everywhere in the image (global average pooling)"
        case T2IAdapterSpec():
            yield "image", f"{spec.image_channels} channels, {spec.factor} pixels for a cell"
            yield "features", ", ".join(map(str, spec.channels))
        case IPAdapterSpec():
            yield "tokens", str(spec.tokens or "one for each patch of the image")
            yield "layers", str(len(spec.layers))
            what = "projected vector" if spec.projected else "states before the last layer"
            yield "reads", f"the image encoder's {what}, {spec.embedding_width} wide"
        case VisionSpec():
            yield "image", f"{spec.image_size} pixels, patches of {spec.patch_size}"
            yield "vectors", f"{spec.projection} wide projected, {spec.width} wide before the last layer"


def checked(spec: Spec | None, tensors: Weights, model: ModelSpec | None) -> list[str]:
    """problems(), or the reason why there is no such network."""
    try:
        with checked_structure("it"):
            return list(problems(spec, tensors, model))
    except CheckpointError as error:
        return [str(error)]


def problems(spec: Spec | None, tensors: Weights, model: ModelSpec | None) -> Iterator[str]:
    """Why the weights are incomplete or do not fit the model."""
    part: Part | None = None
    match spec:
        case ControlNetSpec():
            part = control_net.part_of(spec, control_net.own_tensors(tensors))
            reason = control_net.misfit(spec, model) if model else None
        case T2IAdapterSpec():
            part = t2i_adapter.part_of(spec, tensors)
            reason = t2i_adapter.misfit(spec, model) if model else None
        case IPAdapterSpec():
            reason = ip_adapter.misfit(spec, model) if model else None
        case _:
            return
    if model and reason:
        yield f"it does not fit {model.name}: {reason}"
    if part:
        yield from misfits(part)
