"""Recognises ControlNets by their configuration or their tensors. Imports no torch.

folder of diffusers           config.json
single file of diffusers      names of tensors; the number of heads follows from the base model
single file of CompVis        the same; a training checkpoint also has the base model beside it
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from models.adapter_specs import ControlNetSpec
from models.formats import keymaps
from models.formats.config_files import Config, shortened
from models.formats.diffusers_read import only, per_level, unet_spec
from models.formats.diffusers_write import DIFFUSERS_VERSION, unet_options
from models.formats.ldm import Shapes, count, depth, heads_at
from models.spec import UNetSpec

CONTROL, UNION = "ControlNetModel", "ControlNetUnionModel"  # classes of diffusers
HINT_WIDTHS = {CONTROL: (16, 32, 96, 256), UNION: (48, 96, 192, 384)}  # where a configuration has none
MAX_HINT_WIDTHS = 16
PREFIX = "control_model."  # of a ControlNet in a training checkpoint, and in some files without the rest
NATIVE_KEY, DIFFUSERS_KEY = "input_hint_block.0.weight", f"{keymaps.HINT}.conv_in.weight"
SD_1_CONTEXT, SD_1_HEADS, HEAD_WIDTH = 768, 8, 64
# Kinds of control image of ControlNet++, in the order of its task embeddings; the first model has six.
CONTROL_TYPES = (
    "openpose",
    "depth",
    "soft_edge",
    "hard_edge",
    "normal",
    "segmentation",
    "tile",
    "inpaint",
)
# Options of a UNet that a ControlNet's configuration has too.
SHARED_OPTIONS = (
    "flip_sin_to_cos",
    "freq_shift",
    "down_block_types",
    "mid_block_type",
    "only_cross_attention",
    "block_out_channels",
    "layers_per_block",
    "downsample_padding",
    "mid_block_scale_factor",
    "act_fn",
    "norm_num_groups",
    "norm_eps",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "attention_head_dim",
    "use_linear_projection",
    "resnet_time_scale_shift",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)


def spec_of_config(config: Config) -> ControlNetSpec:
    """Raises ValueError, KeyError or TypeError for a configuration that is not supported."""
    kind = config.get("_class_name")
    if kind not in HINT_WIDTHS:
        raise ValueError(f"_class_name is {shortened(kind)}; supported are {', '.join(HINT_WIDTHS)}")
    order = config.get("controlnet_conditioning_channel_order", "rgb")
    if order not in ("rgb", "bgr"):
        raise ValueError(f"controlnet_conditioning_channel_order is {shortened(order)}; supported: rgb, bgr")
    up = [str(name).replace("Down", "Up") for name in reversed(config["down_block_types"])]
    unet = unet_spec(config | {"up_block_types": up, "out_channels": config["in_channels"]})
    widths = config.get("conditioning_embedding_out_channels", HINT_WIDTHS[kind])
    if not 0 < len(widths) <= MAX_HINT_WIDTHS:
        raise ValueError(f"conditioning_embedding_out_channels must have 1 to {MAX_HINT_WIDTHS} numbers")
    union = kind == UNION
    return ControlNetSpec(
        unet=unet,
        hint_channels=only(config.get("conditioning_channels", 3), "conditioning_channels"),
        hint_widths=per_level(list(widths), len(widths), "conditioning_embedding_out_channels"),
        control_types=only(config.get("num_control_type", 6), "num_control_type") if union else 0,
        type_width=only(config.get("addition_time_embed_dim") or 256, "addition_time_embed_dim"),
        type_heads=only(config.get("num_trans_head", 8), "num_trans_head"),
        type_layers=only(config.get("num_trans_layer", 1), "num_trans_layer"),
        global_pool=bool(config.get("global_pool_conditions", False)),
        bgr=order == "bgr",
    )


def config_of_spec(spec: ControlNetSpec) -> Config:
    """The configuration that diffusers reads."""
    options = unet_options(spec.unet)
    types: Config = {
        "num_control_type": spec.control_types,
        "num_trans_channel": spec.unet.channels[0],
        "num_trans_head": spec.type_heads,
        "num_trans_layer": spec.type_layers,
        "num_proj_channel": spec.unet.channels[0],
        "addition_time_embed_dim": spec.type_width,
    }
    return (
        {key: options[key] for key in SHARED_OPTIONS if key in options}
        | {
            "_class_name": UNION if spec.control_types else CONTROL,
            "_diffusers_version": DIFFUSERS_VERSION,
            "in_channels": spec.unet.in_channels,
            "conditioning_channels": spec.hint_channels,
            "conditioning_embedding_out_channels": list(spec.hint_widths),
            "controlnet_conditioning_channel_order": "bgr" if spec.bgr else "rgb",
            "global_pool_conditions": spec.global_pool,
        }
        | (types if spec.control_types else {})
    )


@dataclass(frozen=True)
class ControlKind:
    """A kind of file. refused: why it cannot be used; derived: its weights are changes of a base model's."""

    name: str
    refused: str = ""
    derived: bool = False


CONTROL_NET = ControlKind("a ControlNet")
UNION_NET = ControlKind("a ControlNet++ (union)")
CONTROL_LORA = ControlKind("a Control-LoRA", derived=True)
DIFFERENCE = ControlKind("a ControlNet stored as differences from its base model", derived=True)
T2I_ADAPTER = ControlKind("a T2I-Adapter")
LLLITE = ControlKind("a ControlLLLite", refused="is not supported: it changes the inputs of attention layers")
STYLE = ControlKind("a T2I style adapter", refused="is not supported: it adds tokens to the context")
# The tensors that show a kind, as regular expressions for a whole name. The first kind that has one is meant.
SIGNS = (
    (CONTROL_LORA, r"(control_model\.)?lora_controlnet"),
    (DIFFERENCE, r"(control_model\.)?difference"),
    (LLLITE, r"lllite_unet_.*"),
    (UNION_NET, r"task_embedding"),
    (CONTROL_NET, r"(control_model\.)?(input_hint_block\.0|controlnet_cond_embedding\.conv_in)\.weight"),
    (STYLE, r"style_embedding"),
    (T2I_ADAPTER, r"(adapter\.)?body\.\d+\.((resnets|body)\.\d+\.)?(block1|in_conv)\.weight"),
)


def kind_of(shapes: Shapes) -> ControlKind | None:
    """The kind of control that a file has, alone or beside its base model; None for other files."""
    for kind, sign in SIGNS:
        pattern = re.compile(sign)
        if any(pattern.fullmatch(key) for key in shapes):
            return kind
    return None


def hint_shapes(shapes: Shapes) -> list[tuple[int, ...]]:
    """Shapes of the convolutions on the control image that change its size or width, by native names."""
    found = [
        shapes[key] for n in range(MAX_HINT_WIDTHS) if (key := f"input_hint_block.{4 * n}.weight") in shapes
    ]
    if not found:
        raise KeyError(NATIVE_KEY)
    return found


def spec_of_tensors(shapes: Shapes, file: Path, base: UNetSpec | None) -> ControlNetSpec:
    """Of a file with native names, or with those of diffusers.

    base: of the UNet that it is for, which says how many heads there are. Raises KeyError, ValueError or
    IndexError for tensors that are not a ControlNet's.
    """
    if DIFFUSERS_KEY in shapes:
        shapes = native_shapes(shapes)
    hints = hint_shapes(shapes)
    types = shapes.get("types.task_embedding", (0,))[0]
    return ControlNetSpec(
        unet=encoder_spec(shapes, base),
        hint_channels=hints[0][1],
        hint_widths=tuple(shape[0] for shape in hints),
        control_types=types,
        type_width=shapes["types.control_add_embedding.0.weight"][1] // types if types else 256,
        type_layers=count(shapes, "types.transformer_layes.{}.ln_1.weight") or 1,
        global_pool="shuffle" in file.stem.lower(),
    )


def native_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The tensors of a ControlNet with the names of diffusers, under native names."""
    rough = ControlNetSpec(
        UNetSpec(
            in_channels=0,
            out_channels=0,
            channels=(0,) * count(shapes, "down_blocks.{}.resnets.0.conv1.weight"),
            res_blocks=count(shapes, "down_blocks.0.resnets.{}.conv1.weight"),
            transformer_depth=(0,) * count(shapes, "down_blocks.{}.resnets.0.conv1.weight"),
            middle_depth=int("mid_block.attentions.0.norm.weight" in shapes),
            heads=(),
            context_width=0,
            added_width=int("add_embedding.linear_1.weight" in shapes),
            middle_res_blocks=count(shapes, "mid_block.resnets.{}.conv1.weight"),
        ),
        hint_widths=(0,) * (count(shapes, keymaps.HINT + ".blocks.{}.weight") // 2 + 1),
    )
    table = {file: native for native, file in keymaps.control_net(rough).items()}
    return {renamed_or_same(key, table): shape for key, shape in shapes.items()}


def renamed_or_same(key: str, table: dict[str, str]) -> str:
    try:
        return keymaps.rename(key, table)
    except KeyError:
        return key


def encoder_spec(shapes: Shapes, base: UNetSpec | None) -> UNetSpec:
    """Spec of a UNet's input blocks and middle block, by native names."""
    blocks = count(shapes, "zero_convs.{}.0.weight")
    halvings = [n for n in range(blocks) if f"input_blocks.{n}.0.op.weight" in shapes]
    per_level = halvings[0] if halvings else blocks
    first = range(1, blocks, per_level)  # of each level
    channels = tuple(shapes[f"input_blocks.{n}.0.in_layers.2.weight"][0] for n in first)
    if not channels:
        raise ValueError("it has no residual blocks")
    context = next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), 0)
    projection = next((shape for key, shape in shapes.items() if key.endswith(".1.proj_in.weight")), ())
    if base and base.channels == channels:
        heads = base.heads
    else:
        one = SD_1_HEADS if context == SD_1_CONTEXT else 0
        heads = tuple(heads_at(width, one, None if one else HEAD_WIDTH) for width in channels)
    return UNetSpec(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["input_blocks.0.0.weight"][1],
        channels=channels,
        res_blocks=per_level - 1,
        transformer_depth=tuple(depth(shapes, f"input_blocks.{n}.1") for n in first),
        middle_depth=depth(shapes, "middle_block.1"),
        heads=heads,
        context_width=context,
        groups=base.groups if base else 32,
        linear_projection=len(projection) == 2,
        added_width=shapes.get("label_emb.0.0.weight", (0, 0))[1],
        middle_res_blocks=sum(f"middle_block.{n}.in_layers.2.weight" in shapes for n in range(3)),
        size_width=base.size_width if base else 0,
    )
