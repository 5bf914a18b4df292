"""Stable Diffusion's models in single files, recognised by the names and shapes of their tensors.

Attention heads, betas, the latents' scale factor, the prediction and the image size do not follow from the
tensors; they come from hints or from a table of the configurations published with the checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from models.errors import CheckpointError
from models.formats import edm, ldm
from models.formats.hints import Hints
from models.formats.ldm import CONDITION, FIRST_STAGE, UNET, Shapes, below
from models.spec import (
    ALL_TASKS,
    AutoencoderSpec,
    Defaults,
    ModelSpec,
    Prediction,
    ScheduleSpec,
    TextSpec,
    UNetSpec,
    UpscalingSpec,
)

HEAD_WIDTH = 64  # channels of a head of every text encoder, and of UNets whose family gives no head count
OPEN_CLIP_PAD = 0  # padding token that OpenCLIP's encoders were trained with; CLIP's use the end token
CLIP_TOKENS = 49408  # vocabulary size of CLIP's tokenizer, which these files do not contain
OPEN_CLIP_LAYERS = 24  # of the complete text encoder of Stable Diffusion 2
PROJECTION, TEXT_MODEL = "text_projection", "text_model."
LINEAR_PROJECTION = PROJECTION + ".weight"  # as some tools write it: the weight of a linear layer, transposed


class EncoderLocation(NamedTuple):
    """A text encoder in a single file: the prefix of its tensors, and whether OpenCLIP's names follow it."""

    prefix: str
    open_clip: bool


CLIP = EncoderLocation(CONDITION + "transformer.", open_clip=False)
OPEN_CLIP = EncoderLocation(CONDITION + "model.", open_clip=True)
SDXL_FIRST = EncoderLocation("conditioner.embedders.0.transformer.", open_clip=False)
SDXL_SECOND = EncoderLocation("conditioner.embedders.1.model.", open_clip=True)
SDXL_BOTH = (SDXL_FIRST, SDXL_SECOND)
SDXL_REFINER = EncoderLocation("conditioner.embedders.0.model.", open_clip=True)
EDITING_TASKS = ("image-to-image",)
NOISE_LEVELS = UNET + "label_emb.weight"


@dataclass(frozen=True)
class Family:
    """Facts about a kind of model that its tensors do not show."""

    image_size: int  # pixels along a side
    heads: int | None = None  # at every level; None: heads of HEAD_WIDTH channels
    prediction: Prediction = "epsilon"
    scale_factor: float = 0.18215
    betas: tuple[float, float] = (0.00085, 0.012)
    inpaints: bool = False
    edits: bool = False
    zero_null: bool = False
    upcast: bool = False  # the decoder overflows float16
    guidance_scale: float = 7.5
    upscaling: UpscalingSpec | None = None
    noise_level: int = 0  # default for upscaling
    tasks: tuple[str, ...] = ALL_TASKS[:3]


SD_1, SD_2, SDXL, REFINER, PLAYGROUND, COSXL, UPSCALER = (
    "Stable Diffusion 1.x",
    "Stable Diffusion 2.x",
    "Stable Diffusion XL",
    "Stable Diffusion XL refiner",
    "Playground v2.5",
    "CosXL",
    "Stable Diffusion x4 upscaler",
)
SD_2_V = SD_2 + " 768-v"
INPAINTING, EDITING = " inpainting", " InstructPix2Pix"
FAMILIES = {
    SD_1: Family(512, heads=8),
    SD_1 + INPAINTING: Family(512, heads=8, inpaints=True),
    SD_1 + EDITING: Family(512, heads=8, edits=True, tasks=EDITING_TASKS),
    SD_2: Family(512),
    SD_2_V: Family(768, prediction="v_prediction"),
    SD_2 + INPAINTING: Family(512, inpaints=True),
    SDXL: Family(1024, scale_factor=0.13025, zero_null=True, upcast=True),
    SDXL + INPAINTING: Family(1024, scale_factor=0.13025, inpaints=True, zero_null=True, upcast=True),
    SDXL + EDITING: Family(
        1024, scale_factor=0.13025, zero_null=True, upcast=True, edits=True, tasks=EDITING_TASKS
    ),
    REFINER: Family(1024, scale_factor=0.13025, upcast=True, tasks=ALL_TASKS[1:3]),
    PLAYGROUND: Family(
        1024, scale_factor=1.0, zero_null=True, upcast=True, guidance_scale=3.0, prediction="edm"
    ),
    COSXL: Family(1024, scale_factor=0.13025, zero_null=True, upcast=True, prediction="v_prediction"),
    COSXL + EDITING: Family(
        1024,
        scale_factor=0.13025,
        zero_null=True,
        upcast=True,
        edits=True,
        tasks=EDITING_TASKS,
        prediction="v_prediction",
    ),
    UPSCALER: Family(
        512,
        heads=8,
        prediction="v_prediction",
        scale_factor=0.08333,
        betas=(0.0001, 0.02),
        upcast=True,
        guidance_scale=9.0,
        upscaling=UpscalingSpec(ScheduleSpec(0.0001, 0.02), 350),
        noise_level=20,
        tasks=("upscaling",),
    ),
}
# No tensor shows whether a Stable Diffusion 2 file predicts epsilon or v. The later and larger of the two
# published models, and most fine-tunes of either, predict v.
DEFAULT_PREDICTION: Prediction = "v_prediction"


def find_text_encoders(keys: Iterable[str]) -> tuple[EncoderLocation, ...]:
    """Where a file has its text encoders; () for a file of another family."""
    keys = tuple(keys)

    def has(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in keys)

    if has(SDXL_FIRST.prefix, SDXL_SECOND.prefix):
        return SDXL_BOTH
    if has(SDXL_REFINER.prefix):
        return (SDXL_REFINER,)
    if has(OPEN_CLIP.prefix):
        return (OPEN_CLIP,)
    return (CLIP,) if has(*(CLIP.prefix + part for part in (TEXT_MODEL, "embeddings.", "encoder."))) else ()


def recognise(
    shapes: Shapes,
    encoders: tuple[EncoderLocation, ...],
    name: str,
    betas: tuple[float, float] | None = None,
    hints: Hints | None = None,
) -> tuple[ModelSpec, str]:
    """Spec and family of a model with these text encoders.

    betas: the first and last, if the file contains them. Raises CheckpointError if the tensors do not form
    such a model.
    """
    hints = hints or Hints()
    try:
        return recognise_model(shapes, encoders, name, betas, hints)
    except KeyError as error:
        raise CheckpointError(f"{name}: {error} is missing") from error
    except (IndexError, ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{name}: unsupported network structure: {error}") from error


def recognise_model(
    shapes: Shapes,
    encoders: tuple[EncoderLocation, ...],
    name: str,
    betas: tuple[float, float] | None,
    hints: Hints,
) -> tuple[ModelSpec, str]:
    key = family_of(shapes, encoders, hints.prediction)
    family = FAMILIES[key]
    texts = text_specs(shapes, encoders)
    schedule = hints.schedule or ScheduleSpec(*family.betas)
    if betas:
        schedule = replace(schedule, beta_start=betas[0], beta_end=betas[1])
    size, scale = family.image_size, hints.scale_factor or family.scale_factor
    stage = below(shapes, FIRST_STAGE)
    autoencoder = ldm.autoencoder_spec(stage, size, scale) if stage else published_vae(family, size, scale)
    spec = ModelSpec(
        name=name,
        unet=unet_spec(shapes, texts, hints, family),
        autoencoder=replace(autoencoder, upcast=family.upcast),
        schedule=replace(schedule, prediction=hints.prediction or family.prediction),
        texts=texts,
        defaults=Defaults(size, size, guidance_scale=family.guidance_scale, noise_level=family.noise_level),
        tasks=family.tasks,
        mask_channels=family.inpaints,
        edits=family.edits,
        upscaling=family.upscaling,
        zero_null=family.zero_null,
        aesthetic_score=key == REFINER,
    )
    return spec, key


def published_vae(family: Family, size: int, scale: float) -> AutoencoderSpec:
    """The VAE that a family was published with, for a file that has none."""
    channels = (128, 256, 512) if family.upscaling else (128, 256, 512, 512)
    return AutoencoderSpec(channels, 2, 4, scale, sample_size=size)


def family_of(shapes: Shapes, encoders: tuple[EncoderLocation, ...], prediction: Prediction | None) -> str:
    """The key in FAMILIES of a model. prediction: None if unknown."""
    if NOISE_LEVELS in shapes:
        return UPSCALER
    latent, into = shapes[UNET + "out.2.weight"][0], shapes[UNET + "input_blocks.0.0.weight"][1]
    inpaints, edits = into == 2 * latent + 1, into == 2 * latent
    if encoders == (OPEN_CLIP,) and not inpaints:
        return SD_2_V if (prediction or DEFAULT_PREDICTION) == "v_prediction" else SD_2
    family = {(CLIP,): SD_1, (OPEN_CLIP,): SD_2, SDXL_BOTH: SDXL, (SDXL_REFINER,): REFINER}[encoders]
    if family == SDXL:
        family = PLAYGROUND if edm.MEAN in shapes else COSXL if edm.SIGMA_MAX in shapes else SDXL
    kind = family + (INPAINTING if inpaints else EDITING if edits else "")
    return kind if kind in FAMILIES else family


def prediction_is_ambiguous(shapes: Shapes, encoders: tuple[EncoderLocation, ...]) -> bool:
    """Whether there are published models of both predictions with these tensors."""
    return encoders == (OPEN_CLIP,) and family_of(shapes, encoders, "v_prediction") == SD_2_V


def text_specs(shapes: Shapes, encoders: tuple[EncoderLocation, ...]) -> tuple[TextSpec, ...]:
    """Specs of the text encoders. Raises CheckpointError if CLIP's tokenizer does not fit one of them."""
    texts = sdxl_texts(shapes) if encoders == SDXL_BOTH else (single_text(shapes, encoders),)
    if (smallest := min(text.vocabulary for text in texts)) < CLIP_TOKENS:
        raise CheckpointError(f"the text encoder has {smallest} tokens, CLIP's tokenizer {CLIP_TOKENS}")
    return texts


def single_text(shapes: Shapes, encoders: tuple[EncoderLocation, ...]) -> TextSpec:
    """Spec of the only text encoder.

    Stable Diffusion 2 does not use the last layer of its OpenCLIP encoder: the output of the layer before
    goes through the final norm. A file without the encoder's projection was written without that layer too.
    """
    if encoders == (CLIP,):
        return clip_text(shapes, CLIP.prefix)
    if encoders == (SDXL_REFINER,):
        return pooled_text(shapes, SDXL_REFINER)
    text = open_clip_text(shapes, OPEN_CLIP.prefix)
    projected = any(OPEN_CLIP.prefix + name in shapes for name in (PROJECTION, LINEAR_PROJECTION))
    complete = projected or text.layers == OPEN_CLIP_LAYERS
    return replace(text, layers=text.layers - 1) if complete else text


def sdxl_texts(shapes: Shapes) -> tuple[TextSpec, TextSpec]:
    """SDXL's encoders: penultimate layers without the final norm (Podell et al. 2023, section 2.1)."""
    first = replace(clip_text(shapes, SDXL_FIRST.prefix), skipped=1, final_norm=False)
    return first, pooled_text(shapes, SDXL_SECOND)


def pooled_text(shapes: Shapes, location: EncoderLocation) -> TextSpec:
    """SDXL's second encoder, which makes a pooled vector too."""
    linear = shapes.get(location.prefix + LINEAR_PROJECTION)
    pooled = linear[0] if linear else shapes[location.prefix + PROJECTION][1]
    text = open_clip_text(shapes, location.prefix)
    return replace(text, skipped=1, final_norm=False, pooled=pooled)


def clip_text(shapes: Shapes, prefix: str) -> TextSpec:
    """Spec of an encoder in the names of `transformers`, with or without its prefix text_model."""
    prefix += TEXT_MODEL if any(key.startswith(prefix + TEXT_MODEL) for key in shapes) else ""
    vocabulary, width = shapes[prefix + "embeddings.token_embedding.weight"]
    return TextSpec(
        vocabulary,
        width,
        layers=count_layers(shapes, prefix + "encoder.layers."),
        heads=width // HEAD_WIDTH,
        intermediate=shapes[prefix + "encoder.layers.0.mlp.fc1.weight"][0],
        tokens=shapes[prefix + "embeddings.position_embedding.weight"][0],
    )


def open_clip_text(shapes: Shapes, prefix: str) -> TextSpec:
    """Spec of an encoder in OpenCLIP's names, with all layers that the file contains."""
    vocabulary, width = shapes[prefix + "token_embedding.weight"]
    return TextSpec(
        vocabulary,
        width,
        layers=count_layers(shapes, prefix + "transformer.resblocks."),
        heads=width // HEAD_WIDTH,
        intermediate=shapes[prefix + "transformer.resblocks.0.mlp.c_fc.weight"][0],
        tokens=shapes[prefix + "positional_embedding"][0],
        activation="gelu",
        pad_id=OPEN_CLIP_PAD,
    )


def count_layers(shapes: Shapes, prefix: str) -> int:
    """The number of layers: one more than the highest number after a prefix."""
    numbers = [key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)]
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


def unet_spec(shapes: Shapes, texts: tuple[TextSpec, ...], hints: Hints, family: Family) -> UNetSpec:
    if hints.heads or hints.head_width:
        heads, width = hints.heads, hints.head_width or HEAD_WIDTH
    else:
        heads, width = family.heads, HEAD_WIDTH
    unet = below(shapes, UNET)
    spec = ldm.unet_spec(unet, heads, width)
    size_embedding, numbers = spec.added_width - texts[-1].pooled, 5 if family is FAMILIES[REFINER] else 6
    if spec.added_width and (size_embedding <= 0 or size_embedding % (2 * numbers)):
        raise ValueError(
            f"a vector of {spec.added_width} cannot consist of pooled text of {texts[-1].pooled} and "
            f"{numbers} embedded sizes"
        )
    size_width = size_embedding // numbers if spec.added_width else 0
    return replace(spec, size_width=size_width, cross_only=cross_only(unet, spec))


def cross_only(shapes: Shapes, spec: UNetSpec) -> tuple[bool, ...]:
    """Levels whose first attention is to the context, by the width of its keys; () if there are none.

    Not visible at a level that is as wide as the context; the only published model has no such level.
    """
    flags = []
    for level, width in enumerate(spec.channels):
        key = f"input_blocks.{1 + level * (spec.res_blocks + 1)}.1.transformer_blocks.0.attn1.to_k.weight"
        flags.append(width != spec.context_width and shapes.get(key, (0, 0))[1] == spec.context_width)
    return tuple(flags) if any(flags) else ()
