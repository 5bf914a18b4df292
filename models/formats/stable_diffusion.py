"""Stable Diffusion's models in single files, known by the names and shapes of their tensors. Free of torch.

What no tensor shows (heads, betas, the factor of latents, what is predicted, the picture's size) stands in a
table, from the configurations beside the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from models.errors import CheckpointError
from models.formats import ldm
from models.formats.ldm import CONDITION, FIRST_STAGE, UNET, Said, Shapes, below
from models.spec import (
    ALL_TASKS,
    Defaults,
    ModelSpec,
    Prediction,
    ScheduleSpec,
    TextSpec,
    UNetSpec,
    UpscalingSpec,
)

HEAD = 64  # channels of a head of every text encoder, and of UNets whose row does not say how many there are
PAD = 0  # OpenCLIP's encoders were trained with it; CLIP's with the end token
TOKENS = 49408  # in the vocabulary of CLIP's tokenizer, which these files do not hold
TOWER = 24  # layers of the one that Stable Diffusion 2 has
PROJECTION, TEXT = "text_projection", "text_model."
SIZES = 6  # numbers that SDXL's UNet is told of a picture


class Place(NamedTuple):
    """Where a text encoder is in a file, and in whose names."""

    prefix: str
    open_clip: bool


CLIP = Place(CONDITION + "transformer.", open_clip=False)
OPEN_CLIP = Place(CONDITION + "model.", open_clip=True)
FIRST, SECOND = (
    Place("conditioner.embedders.0.transformer.", open_clip=False),
    Place("conditioner.embedders.1.model.", open_clip=True),
)
REFINER = "conditioner.embedders.0.model."
NOISE_LEVELS = UNET + "label_emb.weight"
V_MARK = "v_pred"  # an empty tensor by which some files of others say what they predict
# And the words by which others do, in a safetensors file's header.
WORDS_KEY, WORDS = "modelspec.prediction_type", {"v": "v_prediction", "epsilon": "epsilon"}


@dataclass(frozen=True)
class Row:
    """What the tensors of a kind of model do not show."""

    side: int  # of pictures, in pixels
    heads: int | None = None  # at every level; None: as many as are 64 wide
    prediction: Prediction = "epsilon"
    scale_factor: float = 0.18215
    betas: tuple[float, float] = (0.00085, 0.012)
    inpaints: bool = False
    zero_null: bool = False
    upcast: bool = False  # D overflows float16
    guidance_scale: float = 7.5
    upscaling: UpscalingSpec | None = None
    noise_level: int = 0  # of upscaling, by default


SD_1, SD_2, SDXL, UPSCALER = (
    "Stable Diffusion 1.x",
    "Stable Diffusion 2.x",
    "Stable Diffusion XL",
    "Stable Diffusion x4 upscaler",
)
V, INPAINTING = " 768-v", " inpainting"
ROWS = {
    SD_1: Row(512, heads=8),
    SD_1 + INPAINTING: Row(512, heads=8, inpaints=True),
    SD_2: Row(512),
    SD_2 + V: Row(768, prediction="v_prediction"),
    SD_2 + INPAINTING: Row(512, inpaints=True),
    SDXL: Row(1024, scale_factor=0.13025, zero_null=True, upcast=True),
    SDXL + INPAINTING: Row(1024, scale_factor=0.13025, inpaints=True, zero_null=True, upcast=True),
    UPSCALER: Row(
        512,
        heads=8,
        prediction="v_prediction",
        scale_factor=0.08333,
        betas=(0.0001, 0.02),
        upcast=True,
        guidance_scale=9.0,
        upscaling=UpscalingSpec(ScheduleSpec(0.0001, 0.02), 350),
        noise_level=20,
    ),
}
# Whether a file of Stable Diffusion 2 predicts eps or v no tensor shows. The larger and last one of the
# published pair, and most of what was made from either, predict v.
ASSUMED: Prediction = "v_prediction"


def places(keys: Iterable[str]) -> tuple[Place, ...]:
    """Where a file's text encoders are; none in a file that is not of this family."""
    keys = tuple(keys)

    def held(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in keys)

    if held(FIRST.prefix, SECOND.prefix):
        return FIRST, SECOND
    if held(OPEN_CLIP.prefix):
        return (OPEN_CLIP,)
    return (CLIP,) if held(*(CLIP.prefix + part for part in (TEXT, "embeddings.", "encoder."))) else ()


def is_one(shapes: Shapes) -> bool:
    """Whether a file is of this family."""
    refines = any(key.startswith(REFINER) for key in shapes)
    return (refines or bool(places(shapes))) and UNET + "out.2.weight" in shapes


def recognise(
    shapes: Shapes, name: str, betas: tuple[float, float] | None = None, said: Said | None = None
) -> ModelSpec:
    """What the model is; betas: the first and the last where the file holds them.

    Raises CheckpointError for tensors that make none.
    """
    said = said or Said()
    if not places(shapes):
        raise CheckpointError(f"{name} is SDXL's refiner, which is not supported: SDXL's base model is")
    try:
        return whole_model(shapes, name, betas, said)
    except KeyError as error:
        raise CheckpointError(f"{name}: {error} is missing") from error
    except (IndexError, ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{name}: tensors of no known structure: {error}") from error


def whole_model(shapes: Shapes, name: str, betas: tuple[float, float] | None, said: Said) -> ModelSpec:
    row = ROWS[kind(shapes, said.prediction)]
    texts = text_specs(shapes)
    schedule = said.schedule or ScheduleSpec(*row.betas)
    if betas:
        schedule = replace(schedule, beta_start=betas[0], beta_end=betas[1])
    return ModelSpec(
        name=name,
        unet=unet_spec(shapes, texts, said, row),
        autoencoder=replace(
            ldm.autoencoder_spec(below(shapes, FIRST_STAGE), row.side, said.scale_factor or row.scale_factor),
            upcast=row.upcast,
        ),
        schedule=replace(schedule, prediction=said.prediction or row.prediction),
        texts=texts,
        defaults=Defaults(row.side, row.side, guidance_scale=row.guidance_scale, noise_level=row.noise_level),
        tasks=("upscaling",) if row.upscaling else ALL_TASKS[:3],
        mask_channels=row.inpaints,
        upscaling=row.upscaling,
        zero_null=row.zero_null,
    )


def kind(shapes: Shapes, prediction: Prediction | None) -> str:
    """The row of a model; prediction: as far as it is known."""
    found = places(shapes)
    if NOISE_LEVELS in shapes:
        return UPSCALER
    latent, beside = shapes[UNET + "out.2.weight"][0], shapes[UNET + "input_blocks.0.0.weight"][1]
    inpaints = beside == 2 * latent + 1
    if found == (OPEN_CLIP,) and not inpaints:
        return SD_2 + (V if (prediction or ASSUMED) == "v_prediction" else "")
    family = {(CLIP,): SD_1, (OPEN_CLIP,): SD_2, (FIRST, SECOND): SDXL}[found]
    return family + (INPAINTING if inpaints else "")


def is_open(shapes: Shapes) -> bool:
    """Whether no tensor shows what a file's UNet predicts, and there is more than one known answer."""
    return places(shapes) == (OPEN_CLIP,) and kind(shapes, "v_prediction") == SD_2 + V


def text_specs(shapes: Shapes) -> tuple[TextSpec, ...]:
    """Of the text encoders. Raises CheckpointError where CLIP's tokenizer does not fit."""
    texts = both_texts(shapes) if places(shapes) == (FIRST, SECOND) else (only_text(shapes),)
    if (smallest := min(text.vocabulary for text in texts)) < TOKENS:
        raise CheckpointError(f"its text encoder has {smallest} tokens, CLIP's tokenizer {TOKENS}")
    return texts


def only_text(shapes: Shapes) -> TextSpec:
    """Of a whole OpenCLIP tower, with its projection, the last layer is not used: what comes before it goes
    through the last norm. One that was written without a projection was written without that layer too."""
    if places(shapes) == (CLIP,):
        return clip_text(shapes, CLIP.prefix)
    text = open_clip_text(shapes, OPEN_CLIP.prefix)
    whole = OPEN_CLIP.prefix + PROJECTION in shapes or text.layers == TOWER
    return replace(text, layers=text.layers - 1) if whole else text


def both_texts(shapes: Shapes) -> tuple[TextSpec, TextSpec]:
    """SDXL's: what comes before the last layer, with no norm (Podell et al. 2023, section 2.1)."""
    first = replace(clip_text(shapes, FIRST.prefix), skipped=1, final_norm=False)
    second = replace(open_clip_text(shapes, SECOND.prefix), skipped=1, final_norm=False)
    return first, replace(second, pooled=shapes[SECOND.prefix + PROJECTION][1])


def clip_text(shapes: Shapes, prefix: str) -> TextSpec:
    """In the names of `transformers`, with or without one more prefix."""
    prefix += TEXT if any(key.startswith(prefix + TEXT) for key in shapes) else ""
    vocabulary, width = shapes[prefix + "embeddings.token_embedding.weight"]
    return TextSpec(
        vocabulary,
        width,
        layers=highest(shapes, prefix + "encoder.layers."),
        heads=width // HEAD,
        intermediate=shapes[prefix + "encoder.layers.0.mlp.fc1.weight"][0],
        tokens=shapes[prefix + "embeddings.position_embedding.weight"][0],
    )


def open_clip_text(shapes: Shapes, prefix: str) -> TextSpec:
    """In OpenCLIP's own names, with every layer that is there."""
    vocabulary, width = shapes[prefix + "token_embedding.weight"]
    return TextSpec(
        vocabulary,
        width,
        layers=highest(shapes, prefix + "transformer.resblocks."),
        heads=width // HEAD,
        intermediate=shapes[prefix + "transformer.resblocks.0.mlp.c_fc.weight"][0],
        tokens=shapes[prefix + "positional_embedding"][0],
        activation="gelu",
        pad_id=PAD,
    )


def highest(shapes: Shapes, prefix: str) -> int:
    """One more than the highest number after a prefix."""
    numbers = [key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)]
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


def unet_spec(shapes: Shapes, texts: tuple[TextSpec, ...], said: Said, row: Row) -> UNetSpec:
    if said.heads or said.head_width:
        heads, width = said.heads, said.head_width or HEAD
    else:
        heads, width = row.heads, HEAD
    held = below(shapes, UNET)
    spec = ldm.unet_spec(held, heads, width)
    told = spec.added_width - texts[-1].pooled
    if spec.added_width and (told <= 0 or told % (2 * SIZES)):
        raise ValueError(f"a vector of {spec.added_width} is none of a text of {texts[-1].pooled} and sizes")
    sizes = told // SIZES if spec.added_width else 0
    return replace(spec, size_width=sizes, cross_only=cross_only(held, spec))


def cross_only(shapes: Shapes, spec: UNetSpec) -> tuple[bool, ...]:
    """Levels whose first attention has keys of the context's width; () where none does.

    Where a level is as wide as the context, nothing shows it: the one published model has none of these.
    """
    each = []
    for level, width in enumerate(spec.channels):
        key = f"input_blocks.{1 + level * (spec.res_blocks + 1)}.1.transformer_blocks.0.attn1.to_k.weight"
        each.append(width != spec.context_width and shapes.get(key, (0, 0))[1] == spec.context_width)
    return tuple(each) if any(each) else ()
