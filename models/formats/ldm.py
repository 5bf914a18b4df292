"""The latent diffusion paper's models in single files, recognised by the names and shapes of their tensors.

Network shapes follow from the tensors. Attention heads, betas, the latents' scale factor and the image size
do not; they come from hints or from a table of the published models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from models.errors import CheckpointError
from models.formats.hints import Hints
from models.spec import (
    ALL_TASKS,
    AutoencoderSpec,
    ClassSpec,
    Condition,
    Defaults,
    Masking,
    ModelSpec,
    ScheduleSpec,
    SegmentationSpec,
    TokenSpec,
    UNetSpec,
    UpscalingSpec,
)

Shapes = Mapping[str, tuple[int, ...]]

UNET, FIRST_STAGE, CONDITION = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
FIRST_STAGE_ALONE = "first stage alone"  # name of the family of files with an autoencoder and nothing else
TEXT_TOKENS = 77  # context length of the text models; models of boxes have another one
GUIDANCE_KEY = "time_embed.cond_proj.weight"  # of UNets that take the guidance scale
OTHER_GUIDANCE_KEY = "time_embedding.cond_proj.weight"  # diffusers' name, which conversion scripts leave
HEAD_WIDTH = 32  # channels of an attention head, unless a table or a hint gives another width


@dataclass(frozen=True)
class Family:
    """Facts about a kind of model that its tensors do not show, from the paper and its configurations."""

    published: str  # names of the published checkpoints
    image_size: int  # pixels along a side
    beta_end: float
    heads: int | None = None  # at every level; None: heads of HEAD_WIDTH channels
    beta_start: float = 0.0015
    scale_factor: float = 1.0
    guidance_scale: float = 1.0
    tasks: tuple[str, ...] = ()
    masking: Masking | None = None  # of UNets with mask channels
    upscaling: UpscalingSpec | None = None


FAMILIES = {
    "unconditional VQ": Family("celebahq, ffhq, lsun_beds", 256, 0.0195, tasks=("unconditional",)),
    "unconditional KL": Family("lsun_churches", 256, 0.0155, heads=8, tasks=("unconditional",)),
    "class-conditional": Family("cin256", 256, 0.0195, tasks=("class-to-image",)),
    "class-conditional with guidance": Family(
        "cin256-v2", 256, 0.0195, heads=1, guidance_scale=3.0, tasks=("class-to-image",)
    ),
    "text VQ": Family("text2img256", 256, 0.0195, guidance_scale=5.0, tasks=ALL_TASKS[:3]),
    "text KL": Family(
        "txt2img-1p4B",
        256,
        0.012,
        heads=8,
        beta_start=0.00085,
        scale_factor=0.18215,
        guidance_scale=5.0,
        tasks=ALL_TASKS[:3],
    ),
    "inpainting": Family(
        "inpainting_big",
        512,
        0.0205,
        heads=8,
        tasks=("inpainting",),
        masking=Masking(mask_first=False, unmasked_value=-1.0, masked_pixel=-1.0, nearest=True),
    ),
    "super-resolution": Family("bsr_sr", 256, 0.0155, tasks=("upscaling",), upscaling=UpscalingSpec()),
    "boxes": Family("layout2img-openimages256", 256, 0.0205, tasks=("layout-to-image",)),
    "segmentation": Family("semantic_synthesis", 256, 0.0205, heads=8, tasks=("layout-to-image",)),
    "retrieval-augmented": Family("rdm768", 768, 0.015, scale_factor=0.22765929, guidance_scale=5.0),
}


def recognise(
    shapes: Shapes,
    name: str,
    betas: tuple[float, float] | None = None,
    scale_factor: float | None = None,
    hints: Hints | None = None,
) -> tuple[ModelSpec, str]:
    """Spec and family of the model in a single file. The spec of a first stage alone has no UNet.

    betas, scale_factor: the first and last beta, and the latents' factor, if the file contains them. Raises
    CheckpointError if the tensors are of neither a latent diffusion model nor a first stage.
    """
    hints = hints or Hints()
    try:
        if "encoder.conv_in.weight" in shapes:
            return first_stage_alone(shapes, name, hints), FIRST_STAGE_ALONE
        if UNET + "out.2.weight" in shapes:
            return recognise_model(shapes, name, betas, scale_factor, hints)
    except (KeyError, IndexError, ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{name}: unsupported network structure: {error}") from error
    raise CheckpointError(f"{name} contains neither a latent diffusion model nor a first stage")


def first_stage_alone(shapes: Shapes, name: str, hints: Hints) -> ModelSpec:
    size = hints.image_size or 256
    spec = autoencoder_spec(shapes, size, 1.0 if hints.scale_factor is None else hints.scale_factor)
    return ModelSpec(name, None, spec, ScheduleSpec(), (), Defaults(width=size, height=size), tasks=())


def recognise_model(
    shapes: Shapes, name: str, betas: tuple[float, float] | None, scale_factor: float | None, hints: Hints
) -> tuple[ModelSpec, str]:
    condition = condition_spec(below(shapes, CONDITION))
    key = hints.family or family_of(shapes, condition)
    family = FAMILIES[key]
    size = hints.image_size or family.image_size
    scale = next(s for s in (scale_factor, hints.scale_factor, family.scale_factor) if s is not None)
    schedule = hints.schedule or ScheduleSpec(beta_start=family.beta_start, beta_end=family.beta_end)
    if betas:
        schedule = replace(schedule, beta_start=betas[0], beta_end=betas[1])
    if hints.prediction:
        schedule = replace(schedule, prediction=hints.prediction)
    if hints.heads or hints.head_width:
        heads, head_width = hints.heads, hints.head_width or HEAD_WIDTH
    else:
        heads, head_width = family.heads, HEAD_WIDTH
    spec = ModelSpec(
        name=name,
        unet=unet_spec(below(shapes, UNET), heads, head_width),
        autoencoder=autoencoder_spec(below(shapes, FIRST_STAGE), size, scale),
        schedule=schedule,
        texts=(),
        defaults=Defaults(size, size, steps=50, guidance_scale=family.guidance_scale),
        tasks=family.tasks,
        condition=condition,
        mask_channels=family.masking is not None,
        masking=family.masking or Masking(),
        upscaling=family.upscaling,
        layout_channels=condition.channels if isinstance(condition, SegmentationSpec) else 0,
    )
    return spec, key


def family_of(shapes: Shapes, condition: Condition | None) -> str:
    """Which of FAMILIES a model's tensors belong to."""
    latent = "VQ" if FIRST_STAGE + "quantize.embedding.weight" in shapes else "KL"
    if isinstance(condition, TokenSpec):
        return "boxes" if condition.objects else f"text {latent}"
    if isinstance(condition, ClassSpec):
        return "class-conditional" if condition.null is None else "class-conditional with guidance"
    if isinstance(condition, SegmentationSpec):
        return "segmentation"
    if CONDITION + "encoder.conv_in.weight" in shapes:
        return "inpainting"
    if f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight" in shapes:
        return "retrieval-augmented"
    if shapes[UNET + "input_blocks.0.0.weight"][1] != shapes[UNET + "out.2.weight"][0]:
        return "super-resolution"
    return f"unconditional {latent}"


def below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """The tensors whose names start with a prefix, under their names without it."""
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def count(shapes: Shapes, pattern: str) -> int:
    """How many of pattern.format(0), pattern.format(1), ... exist without a gap."""
    number = 0
    while pattern.format(number) in shapes:
        number += 1
    return number


def condition_spec(shapes: Shapes) -> Condition | None:
    """Spec of a conditioner that has weights of its own."""
    if "transformer.token_emb.weight" in shapes:
        vocabulary, width = shapes["transformer.token_emb.weight"]
        layers = count(shapes, "transformer.attn_layers.layers.{}.0.weight") // 2
        tokens = shapes["transformer.pos_emb.emb.weight"][0]
        objects = 0 if tokens == TEXT_TOKENS else (tokens - 2) // 3  # three tokens per box, two for the crop
        return TokenSpec(vocabulary, width, layers, tokens, objects=objects)
    if "embedding.weight" in shapes:
        classes, width = shapes["embedding.weight"]
        return ClassSpec(classes, width, null=classes - 1 if classes == 1001 else None)
    if "channel_mapper.weight" in shapes:
        channels, classes = shapes["channel_mapper.weight"][:2]
        return SegmentationSpec(classes, channels)
    return None


def unet_spec(shapes: Shapes, heads: int | tuple[int, ...] | None, head_width: int = HEAD_WIDTH) -> UNetSpec:
    """Spec of a UNet. heads: for all levels or for each one; None: heads of head_width channels."""
    blocks = count(shapes, "output_blocks.{}.0.in_layers.2.weight")
    per_level = res_blocks_up(shapes, blocks)
    first = [1 + index * per_level for index in range(blocks // per_level)]  # of each level going down
    channels = tuple(shapes[f"input_blocks.{index}.0.in_layers.2.weight"][0] for index in first)
    each = heads if isinstance(heads, tuple) else (heads or 1,) * len(channels)
    context = next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), 0)
    projection = next((shape for key, shape in shapes.items() if key.endswith(".1.proj_in.weight")), ())
    embedded = shapes["input_blocks.1.0.emb_layers.1.weight"][0]
    depths = tuple(depth(shapes, f"input_blocks.{index}.1") for index in first)
    up_depths = tuple(
        tuple(depth(shapes, f"output_blocks.{start + index}.1") for index in range(per_level))
        for start in reversed(range(0, blocks, per_level))
    )
    return UNetSpec(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        channels=channels,
        res_blocks=per_level - 1,
        transformer_depth=depths,
        middle_depth=depth(shapes, "middle_block.1"),
        heads=tuple(
            heads_at(width, count, None if heads else head_width)
            for width, count in zip(channels, each, strict=True)
        ),
        context_width=context,
        linear_projection=len(projection) == 2,
        residual_resampling=len(channels) > 1 and f"input_blocks.{per_level}.0.op.weight" not in shapes,
        scale_shift_norm=embedded == 2 * channels[0],
        noise_levels=shapes.get("label_emb.weight", (0,))[0],
        up_depths=() if up_depths == tuple((d,) * per_level for d in depths) else up_depths,
        middle_res_blocks=sum(f"middle_block.{index}.in_layers.2.weight" in shapes for index in range(3)),
        added_width=shapes.get("label_emb.0.0.weight", (0, 0))[1],
        guidance_width=shapes.get(GUIDANCE_KEY, shapes.get(OTHER_GUIDANCE_KEY, (0, 0)))[1],
    )


def heads_at(width: int, heads: int, head_width: int | None) -> int:
    """Heads of a level of `width` channels. Raises ValueError if they do not divide it."""
    divisor = heads if head_width is None else head_width
    if width % divisor:
        raise ValueError(f"heads do not divide {width} channels: {divisor}{' wide' if head_width else ''}")
    return heads if head_width is None else width // head_width


def res_blocks_up(shapes: Shapes, blocks: int) -> int:
    """Residual blocks per level going up: those before the first upsampler; all if there is one level."""
    ends = [f"{place}.{layer}.weight" for place in (1, 2) for layer in ("conv", "in_layers.2")]
    for index in range(blocks):
        if any(f"output_blocks.{index}.{end}" in shapes for end in ends):
            return index + 1
    return blocks


def depth(shapes: Shapes, module: str) -> int:
    """Transformer blocks in a module; 1 for plain attention, 0 without attention."""
    if f"{module}.qkv.weight" in shapes:
        return 1
    return count(shapes, module + ".transformer_blocks.{}.norm1.weight")


def autoencoder_spec(shapes: Shapes, image_size: int, scale_factor: float) -> AutoencoderSpec:
    levels = count(shapes, "encoder.down.{}.block.0.conv1.weight")
    inner, latent = shapes["decoder.conv_in.weight"][1], shapes["post_quant_conv.weight"][1]
    return AutoencoderSpec(
        channels=tuple(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)),
        res_blocks=count(shapes, "encoder.down.0.block.{}.conv1.weight"),
        latent_channels=latent,
        scale_factor=scale_factor,
        image_channels=shapes["encoder.conv_in.weight"][1],
        sample_size=image_size,
        codes=shapes.get("quantize.embedding.weight", (0,))[0],
        inner_channels=None if inner == latent else inner,
        attention_levels=tuple(
            level for level in range(levels) if f"encoder.down.{level}.attn.0.q.weight" in shapes
        ),
        middle_attention="encoder.mid.attn_1.q.weight" in shapes,
    )
