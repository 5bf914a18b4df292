"""Recognises IP-Adapters and CLIP image encoders by their tensors and configuration. Imports no torch."""

from __future__ import annotations

import re

from models.adapter_specs import IPAdapterSpec, VisionSpec
from models.formats.config_files import Config, shortened
from models.formats.diffusers_read import only
from models.formats.ldm import Shapes, count
from models.spec import UNetSpec

PROJECTION, ATTENTION = "image_proj.", "ip_adapter."  # prefixes of an IP-Adapter's tensors
KEY = re.compile(r"ip_adapter\.(\d+)\.to_k_ip\.weight")
HEAD_WIDTH = 64  # of the resampler of IP-Adapter Plus
REFUSED = {  # a part of a tensor's name -> the kind, which is not supported
    "_lora.": "an IP-Adapter FaceID, which needs a face recognition model; it is not supported",
    "perceiver_resampler.": "an IP-Adapter FaceID Plus, which needs a face recognition model; it is not "
    "supported",
}
VISION_PREFIX = "vision_model."
CLASS_EMBEDDING = "embeddings.class_embedding"
VISION_HEADS = {768: 12}  # width -> heads of CLIP's ViT-B; all larger ones have 16
OPENAI_WIDTHS = (768, 1024)  # encoders of the first CLIP, with its approximation of GELU


def is_ip_adapter(shapes: Shapes) -> bool:
    return any(key.startswith((PROJECTION, ATTENTION)) for key in shapes)


def refusal(shapes: Shapes) -> str | None:
    """Why an IP-Adapter is not supported, beginning with its kind; None if it is."""
    return next((text for part, text in REFUSED.items() if any(part in key for key in shapes)), None)


def layer_numbers(shapes: Shapes) -> list[int]:
    """The numbers of the cross-attention layers in a file, in its order."""
    return sorted(int(match[1]) for key in shapes if (match := KEY.fullmatch(key)))


def spec_of_tensors(shapes: Shapes) -> IPAdapterSpec:
    """Raises KeyError, IndexError or ValueError for tensors that are no IP-Adapter's."""
    layers = tuple(shapes[f"{ATTENTION}{number}.to_k_ip.weight"] for number in layer_numbers(shapes))
    context = layers[0][1]
    widths = tuple(shape[0] for shape in layers)
    if (latents := shapes.get(f"{PROJECTION}latents")) is not None:
        inner = shapes[f"{PROJECTION}layers.0.0.to_q.weight"][0]
        return IPAdapterSpec(
            "plus",
            tokens=latents[1],
            embedding_width=shapes[f"{PROJECTION}proj_in.weight"][1],
            context_width=context,
            layers=widths,
            width=latents[2],
            depth=count(shapes, PROJECTION + "layers.{}.0.to_q.weight"),
            heads=inner // HEAD_WIDTH,
            intermediate=shapes[f"{PROJECTION}layers.0.1.1.weight"][0],
        )
    if f"{PROJECTION}proj.3.weight" in shapes:
        return IPAdapterSpec("full", 0, shapes[f"{PROJECTION}proj.0.weight"][1], context, widths)
    out, width = shapes[f"{PROJECTION}proj.weight"]
    return IPAdapterSpec("plain", out // context, width, context, widths)


def down_up_middle(unet: UNetSpec) -> tuple[list[int], list[int], list[int]]:
    """Widths of a UNet's cross-attention layers: going down, going up, in the middle block.

    It is the order of an IP-Adapter's numbers. The UNet's own order has the middle block between the others.
    """
    levels = list(enumerate(unet.channels))
    down = [width for level, width in levels for _ in range(unet.res_blocks * unet.transformer_depth[level])]
    up = [
        width
        for level, width in reversed(levels)
        for block in range(unet.res_blocks + 1)
        for _ in range(unet.up_depth(level, block))
    ]
    return down, up, [unet.channels[-1]] * unet.middle_depth


def vision_spec(config: Config) -> VisionSpec:
    """Of an image encoder's configuration, or of a complete CLIP's. Raises ValueError or KeyError."""
    inner = config.get("vision_config")
    config = config | (inner if isinstance(inner, dict) else {})
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"hidden_act is {shortened(activation)}; supported are quick_gelu, gelu")
    return VisionSpec(
        width=only(config["hidden_size"], "hidden_size"),
        layers=only(config["num_hidden_layers"], "num_hidden_layers"),
        heads=only(config["num_attention_heads"], "num_attention_heads"),
        intermediate=only(config["intermediate_size"], "intermediate_size"),
        image_size=only(config.get("image_size", 224), "image_size"),
        patch_size=only(config["patch_size"], "patch_size"),
        projection=only(config.get("projection_dim", 512), "projection_dim"),
        activation=activation,
    )


def vision_spec_of_tensors(shapes: Shapes) -> VisionSpec:
    """Of an image encoder's tensors without their prefix. Raises KeyError for other tensors."""
    width = shapes[CLASS_EMBEDDING][0]
    patch, positions = (
        shapes["embeddings.patch_embedding.weight"][2],
        shapes["embeddings.position_embedding.weight"],
    )
    return VisionSpec(
        width=width,
        layers=count(shapes, "encoder.layers.{}.layer_norm1.weight"),
        heads=VISION_HEADS.get(width, 16),
        intermediate=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        image_size=round((positions[0] - 1) ** 0.5) * patch,
        patch_size=patch,
        projection=shapes["visual_projection.weight"][0],
        activation="quick_gelu" if width in OPENAI_WIDTHS else "gelu",
    )
