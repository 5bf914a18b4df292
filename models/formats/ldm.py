"""The latent diffusion paper's models, known by the names and shapes of their tensors.

Their files say nothing else about themselves. Free of torch. Networks' shapes are read off the tensors; what
no tensor shows (heads, betas, the factor of latents, the picture's size) stands in a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from models.errors import CheckpointError
from models.spec import (
    ALL_TASKS,
    AutoencoderSpec,
    ClassSpec,
    Condition,
    Defaults,
    Masking,
    ModelSpec,
    Prediction,
    ScheduleSpec,
    SegmentationSpec,
    TokenSpec,
    UNetSpec,
    UpscalingSpec,
)

Shapes = Mapping[str, tuple[int, ...]]

UNET, FIRST_STAGE, CONDITION = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
WORDS = 77  # tokens of a text; boxes have another number


@dataclass(frozen=True)
class Row:
    """What the tensors of a kind of model do not show (Rombach et al. 2021 and its configurations)."""

    side: int  # of pictures, in pixels
    beta_end: float
    heads: int | None = None  # at every level; None: as many as are 32 wide
    beta_start: float = 0.0015
    scale_factor: float = 1.0
    guidance_scale: float = 1.0
    tasks: tuple[str, ...] = ()
    masking: Masking | None = None  # it is told a mask and the picture that the mask hides parts of
    upscaling: UpscalingSpec | None = None


ROWS = {
    "unconditional VQ": Row(256, 0.0195, tasks=("unconditional",)),
    "unconditional KL": Row(256, 0.0155, heads=8, tasks=("unconditional",)),
    "class": Row(256, 0.0195, tasks=("class-to-image",)),
    "class or none": Row(256, 0.0195, heads=1, guidance_scale=3.0, tasks=("class-to-image",)),
    "text VQ": Row(256, 0.0195, guidance_scale=5.0, tasks=ALL_TASKS[:3]),
    "text KL": Row(
        256, 0.012, heads=8, beta_start=0.00085, scale_factor=0.18215, guidance_scale=5.0, tasks=ALL_TASKS[:3]
    ),
    "masked picture": Row(
        512,
        0.0205,
        heads=8,
        tasks=("inpainting",),
        masking=Masking(mask_first=False, unmasked_value=-1.0, masked_pixel=-1.0, nearest=True),
    ),
    "low-resolution picture": Row(256, 0.0155, tasks=("upscaling",), upscaling=UpscalingSpec()),
    "boxes": Row(256, 0.0205, tasks=("layout-to-image",)),
    "segmentation": Row(256, 0.0205, heads=8, tasks=("layout-to-image",)),
    "neighbours": Row(768, 0.015, scale_factor=0.22765929, guidance_scale=5.0),
}


@dataclass(frozen=True)
class Said:
    """What a file beside the weights says; None: nothing. Tensors come before it, the table after it."""

    kind: str | None = None  # a key of ROWS
    side: int | None = None  # of pictures, in pixels
    heads: int | tuple[int, ...] | None = None  # at every level, or at each
    head_width: int | None = None  # in the place of heads
    scale_factor: float | None = None
    schedule: ScheduleSpec | None = None
    prediction: Prediction | None = None


def below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """Those under a prefix, without it."""
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def count(shapes: Shapes, pattern: str) -> int:
    """How many of pattern.format(0), pattern.format(1), ... are there, up to the first that is not."""
    number = 0
    while pattern.format(number) in shapes:
        number += 1
    return number


def recognise(
    shapes: Shapes,
    name: str,
    betas: tuple[float, float] | None = None,
    scale_factor: float | None = None,
    said: Said | None = None,
) -> ModelSpec:
    """What the model in a single file is; a first stage alone has no UNet.

    betas, scale_factor: the first and last beta, and the factor, where the file holds them. Raises
    CheckpointError for a file that is neither.
    """
    said = said or Said()
    try:
        if "encoder.conv_in.weight" in shapes:
            return first_stage_alone(shapes, name, said)
        if UNET + "out.2.weight" in shapes:
            return whole_model(shapes, name, betas, scale_factor, said)
    except (KeyError, IndexError, ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{name}: tensors of no known structure: {error}") from error
    raise CheckpointError(f"{name} holds neither a latent diffusion model nor a first stage")


def first_stage_alone(shapes: Shapes, name: str, said: Said) -> ModelSpec:
    side = said.side or 256
    spec = autoencoder_spec(shapes, side, 1.0 if said.scale_factor is None else said.scale_factor)
    return ModelSpec(name, None, spec, ScheduleSpec(), (), Defaults(width=side, height=side), tasks=())


def whole_model(
    shapes: Shapes, name: str, betas: tuple[float, float] | None, scale_factor: float | None, said: Said
) -> ModelSpec:
    condition, unet = condition_spec(below(shapes, CONDITION)), below(shapes, UNET)
    row = ROWS[said.kind or kind(shapes, condition)]
    side = said.side or row.side
    scale = next(s for s in (scale_factor, said.scale_factor, row.scale_factor) if s is not None)
    schedule = said.schedule or ScheduleSpec(beta_start=row.beta_start, beta_end=row.beta_end)
    if betas:
        schedule = replace(schedule, beta_start=betas[0], beta_end=betas[1])
    if said.prediction:
        schedule = replace(schedule, prediction=said.prediction)
    return ModelSpec(
        name=name,
        unet=unet_spec(unet, *heads_of(said, row)),
        autoencoder=autoencoder_spec(below(shapes, FIRST_STAGE), side, scale),
        schedule=schedule,
        texts=(),
        defaults=Defaults(side, side, steps=50, guidance_scale=row.guidance_scale),
        tasks=row.tasks,
        condition=condition,
        mask_channels=row.masking is not None,
        masking=row.masking or Masking(),
        upscaling=row.upscaling,
        layout_channels=condition.channels if isinstance(condition, SegmentationSpec) else 0,
    )


def kind(shapes: Shapes, condition: Condition | None) -> str:
    """The row of a model."""
    head = "VQ" if FIRST_STAGE + "quantize.embedding.weight" in shapes else "KL"
    if isinstance(condition, TokenSpec):
        return "boxes" if condition.objects else f"text {head}"
    if isinstance(condition, ClassSpec):
        return "class" if condition.null is None else "class or none"
    if isinstance(condition, SegmentationSpec):
        return "segmentation"
    if CONDITION + "encoder.conv_in.weight" in shapes:
        return "masked picture"
    if f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight" in shapes:
        return "neighbours"
    if shapes[UNET + "input_blocks.0.0.weight"][1] != shapes[UNET + "out.2.weight"][0]:
        return "low-resolution picture"
    return f"unconditional {head}"


def condition_spec(shapes: Shapes) -> Condition | None:
    """Of the conditioner that has weights of its own."""
    if "transformer.token_emb.weight" in shapes:
        vocabulary, width = shapes["transformer.token_emb.weight"]
        layers = count(shapes, "transformer.attn_layers.layers.{}.0.weight") // 2
        tokens = shapes["transformer.pos_emb.emb.weight"][0]
        objects = 0 if tokens == WORDS else (tokens - 2) // 3  # three tokens each, and two for the crop
        return TokenSpec(vocabulary, width, layers, tokens, objects=objects)
    if "embedding.weight" in shapes:
        classes, width = shapes["embedding.weight"]
        return ClassSpec(classes, width, null=classes - 1 if classes == 1001 else None)
    if "channel_mapper.weight" in shapes:
        channels, classes = shapes["channel_mapper.weight"][:2]
        return SegmentationSpec(classes, channels)
    return None


def heads_of(said: Said, row: Row) -> tuple[int | tuple[int, ...] | None, int]:
    """Heads at every level or at each, or None and the width of one."""
    if said.heads or said.head_width:
        return said.heads, said.head_width or 32
    return row.heads, 32


def heads_at(width: int, heads: int, head_width: int | None) -> int:
    """Of a level. Raises ValueError where they do not divide it."""
    part = heads if head_width is None else head_width
    if width % part:
        raise ValueError(f"heads do not divide {width} channels: {part}{' wide' if head_width else ''}")
    return heads if head_width is None else width // head_width


def unet_spec(shapes: Shapes, heads: int | tuple[int, ...] | None, head_width: int = 32) -> UNetSpec:
    """heads: at every level, or at each; None: as many as are head_width wide."""
    blocks = count(shapes, "output_blocks.{}.0.in_layers.2.weight")
    per_level = res_blocks_up(shapes, blocks)
    first = [1 + index * per_level for index in range(blocks // per_level)]  # of each level going down
    channels = tuple(shapes[f"input_blocks.{index}.0.in_layers.2.weight"][0] for index in first)
    each = heads if isinstance(heads, tuple) else (heads or 1,) * len(channels)
    context = shapes.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight", (0, 0))[1]
    embedded = shapes["middle_block.0.emb_layers.1.weight"][0]
    return UNetSpec(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        channels=channels,
        res_blocks=per_level - 1,
        transformer_depth=tuple(depth(shapes, f"input_blocks.{index}.1") for index in first),
        middle_depth=depth(shapes, "middle_block.1"),
        heads=tuple(
            heads_at(width, count, None if heads else head_width)
            for width, count in zip(channels, each, strict=True)
        ),
        context_width=context,
        linear_projection=len(shapes.get("middle_block.1.proj_in.weight", ())) == 2,
        residual_resampling=len(channels) > 1 and f"input_blocks.{per_level}.0.op.weight" not in shapes,
        scale_shift_norm=embedded == 2 * channels[-1],
        noise_levels=shapes.get("label_emb.weight", (0,))[0],
        added_width=shapes.get("label_emb.0.0.weight", (0, 0))[1],
    )


def res_blocks_up(shapes: Shapes, blocks: int) -> int:
    """Residual blocks a level going up: its last is the first with an upsampler, all are with one level."""
    ends = [f"{place}.{layer}.weight" for place in (1, 2) for layer in ("conv", "in_layers.2")]
    for index in range(blocks):
        if any(f"output_blocks.{index}.{end}" in shapes for end in ends):
            return index + 1
    return blocks


def depth(shapes: Shapes, module: str) -> int:
    """Transformer blocks in a module; 1 for plain attention, 0 where nothing attends."""
    if f"{module}.qkv.weight" in shapes:
        return 1
    return count(shapes, module + ".transformer_blocks.{}.norm1.weight")


def autoencoder_spec(shapes: Shapes, side: int, scale_factor: float) -> AutoencoderSpec:
    levels = count(shapes, "encoder.down.{}.block.0.conv1.weight")
    inner, latent = shapes["decoder.conv_in.weight"][1], shapes["post_quant_conv.weight"][1]
    return AutoencoderSpec(
        channels=tuple(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)),
        res_blocks=count(shapes, "encoder.down.0.block.{}.conv1.weight"),
        latent_channels=latent,
        scale_factor=scale_factor,
        image_channels=shapes["encoder.conv_in.weight"][1],
        sample_size=side,
        codes=shapes.get("quantize.embedding.weight", (0,))[0],
        inner_channels=None if inner == latent else inner,
        attention_levels=tuple(
            level for level in range(levels) if f"encoder.down.{level}.attn.0.q.weight" in shapes
        ),
        middle_attention="encoder.mid.attn_1.q.weight" in shapes,
    )
