"""Request bodies of the native API. Unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from models.spec import Spacing
from service.engine.job import MAX_SEED, Decoder, PromptSyntax, Tiling
from service.requests.control_schemas import MAX_CONTROLS, MAX_REFERENCES, ControlInput, ReferenceInput
from service.requests.image_field import IMAGE, ImageInput
from service.requests.images import Format
from service.requests.phase_schemas import MAX_SIDE, MAX_TEXT, HiresInput, RefinerInput

MAX_N = 1024  # the operator may set a lower limit
MAX_BOXES = 64
MAX_LORA_WEIGHT = 10.0
LoraWeight = Annotated[float, Field(ge=-MAX_LORA_WEIGHT, le=MAX_LORA_WEIGHT)]


def not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


def label_or_error(value: object, read: ValidatorFunctionWrapHandler) -> object:
    try:
        return read(value)
    except ValidationError:
        raise ValueError("must be a label of the model, by its name or its number") from None


def within_seeds(seed: int) -> int:
    if seed > MAX_SEED:
        raise ValueError(f"must be at most {MAX_SEED}")
    return seed


# The OpenAPI document has no `maximum` for seeds: generated clients use signed 64-bit integers, which cannot
# represent it.
SeedInput = Annotated[int, Field(ge=-1), AfterValidator(within_seeds)]
LabelInput = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[str, Field(max_length=200)], WrapValidator(label_or_error)
]


class LabelBox(BaseModel):
    """The place of an object: upper left corner and size, as fractions of the image's width and height."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: Annotated[LabelInput, Field(description="A label of the model, by its name or its number")]
    x: Annotated[float, Field(ge=0, le=1)]
    y: Annotated[float, Field(ge=0, le=1)]
    w: Annotated[float, Field(gt=0, le=1)]
    h: Annotated[float, Field(gt=0, le=1)]


class VariationSeed(BaseModel):
    """A second seed, whose noise is mixed into that of `seed`: small strengths give similar images."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    seed: Annotated[
        SeedInput,
        Field(
            description="Second seed of image 0; image i uses seed + i. All start from the request's `seed`"
        ),
    ] = -1
    strength: Annotated[
        float, Field(ge=0, le=1, description="0: the noise of `seed` alone, 1: that of the second seed alone")
    ]


class FeatureCacheInput(BaseModel):
    """Deep features of the UNet that are reused between its calls (DeepCache): faster, less exact."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"interval": 3}]})

    interval: Annotated[
        int,
        Field(
            ge=1, le=10, description="Every interval-th UNet call computes them; 1: all calls, as without it"
        ),
    ] = 3
    branch: Annotated[
        int,
        Field(
            ge=0,
            le=100,
            description="Input blocks, and output blocks, that the other calls compute, less one; a larger "
            "number is slower and more exact. Limit: the input blocks of the model's UNet",
        ),
    ] = 0


class ImageRequest(BaseModel):
    """The common fields of all requests for images. GET /models lists each model's defaults."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    negative_prompt: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    long_prompts: Annotated[
        Literal["cut", "chunk"],
        Field(description="A prompt longer than the context (77 tokens) is cut, or encoded in chunks of 75"),
    ] = "cut"
    prompt_weights: Annotated[
        bool,
        Field(
            description="true: (word:1.3), (word) and [word] change a word's weight; \\( is a literal bracket"
        ),
    ] = False
    model: Annotated[
        str | None, Field(max_length=200, description="Default: the first model that supports the task")
    ] = None
    steps: Annotated[
        int | None,
        Field(
            ge=1,
            le=1000,
            description="Steps of the sampler. A step is one UNet call; with heun, dpm2, dpm2_ancestral and "
            "dpmpp_sde it is two, except the last one. Limits, progress and previews count UNet calls.",
        ),
    ] = None
    guidance_scale: Annotated[
        float | None,
        Field(
            ge=0,
            le=50,
            description="Scale of classifier-free guidance; 1: no guidance, the default without a condition",
        ),
    ] = None
    seed: Annotated[
        SeedInput | None,
        Field(
            description="Seed of image 0, at most 2^64 - 1; image i uses seed + i. Missing or -1: a random "
            "seed below 2^53"
        ),
    ] = None
    n: Annotated[int, Field(ge=1, le=MAX_N, description="Number of images")] = 1
    sampler: Annotated[
        str | None, Field(max_length=50, description="Sampling method; GET /models lists the names")
    ] = None
    spacing: Annotated[
        Spacing | None,
        Field(
            description="Choice of the timesteps or noise levels of the steps. leading, trailing and "
            "linspace choose timesteps. karras, exponential, sgm_uniform, simple and beta choose noise "
            "levels over the whole schedule, as A1111's schedulers of these names do. tcd and "
            "dpmpp_2m_karras have their own timesteps and support none of these; lcm has its own by default. "
            "plms, and samplers whose "
            "names end in _karras or _exponential, support only leading, trailing and linspace."
        ),
    ] = None
    eta: Annotated[
        float | None,
        Field(
            ge=0,
            le=1,
            description="Noise added at each step of ddim (0: deterministic, 1: DDPM; default: the model's) "
            "or tcd (gamma in its paper; default: 0.3)",
        ),
    ] = None
    loras: Annotated[
        dict[str, LoraWeight],
        Field(
            default_factory=dict, description="Weight of each LoRA by its name; GET /models lists the names"
        ),
    ]
    lora_text_weights: Annotated[
        dict[str, LoraWeight],
        Field(
            default_factory=dict,
            description="Weights for the text encoders, of LoRAs for which they differ from those in `loras`",
        ),
    ]
    output_format: Format | None = None
    priority: Annotated[int, Field(ge=0, le=9, description="Larger values run sooner")] = 0
    timeout: Annotated[
        float | None, Field(gt=0, le=86_400, description="Seconds until the request fails with a 504")
    ] = None


class SceneRequest(ImageRequest):
    """Fields of /generate and /inpaint."""

    width: Annotated[int | None, Field(ge=1, le=MAX_SIDE, description="In pixels")] = None
    height: Annotated[int | None, Field(ge=1, le=MAX_SIDE, description="In pixels")] = None
    strength: Annotated[
        float | None,
        Field(
            gt=0, le=1, description="How much of the input image to change: the fraction of the steps to run"
        ),
    ] = None
    guidance_start: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="Fraction of the run at which guidance begins; without guidance, a step costs half",
        ),
    ] = 0.0
    guidance_end: Annotated[
        float, Field(gt=0, le=1, description="Fraction of the run at which guidance ends")
    ] = 1.0
    guidance_rescale: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="How far the contrast of the guided prediction is brought back to that of the "
            "conditional one (phi of Lin et al. 2023); about 0.7 for models with zero terminal SNR",
        ),
    ] = 0.0
    refiner: Annotated[
        RefinerInput | None,
        Field(description="Another model that makes the last steps, such as SDXL's refiner"),
    ] = None
    feature_cache: Annotated[
        FeatureCacheInput | None,
        Field(
            description="Reuses deep features of the UNet between its calls (DeepCache): faster, less exact",
            examples=[{"interval": 3, "branch": 0}],
        ),
    ] = None
    prompt_syntax: Annotated[
        PromptSyntax,
        Field(
            description="a1111: the prompts are in the syntax of AUTOMATIC1111's web UI: weights, BREAK, "
            "`a AND b :0.8`, [from:to:when], [a|b]; prompt_weights and long_prompts: chunk are implied"
        ),
    ] = "plain"
    clip_skip: Annotated[
        int | None,
        Field(
            ge=1,
            le=100,
            description="Last layer of the text encoders to use, counted from the model's own last one: "
            "1 is that layer, 2 the one before it. GET /models has the limit (max_clip_skip)",
        ),
    ] = None
    decoder: Annotated[
        Decoder,
        Field(description="tiny: decode the image with the tiny VAE given to the server: faster, less exact"),
    ] = "full"
    tiling: Annotated[
        Tiling,
        Field(description="Axes along which copies of the image fit together without a seam, for textures"),
    ] = "none"
    variation: Annotated[
        VariationSeed | None, Field(description="Mixes the noise of a second seed into that of `seed`")
    ] = None
    class_label: Annotated[
        LabelInput | None,
        Field(description="A label of the model, by its name or its number, instead of a prompt"),
    ] = None
    boxes: Annotated[
        list[LabelBox] | None,
        Field(
            min_length=1,
            max_length=MAX_BOXES,
            description="Layout by bounding boxes; later boxes cover earlier ones",
        ),
    ] = None
    segmentation: Annotated[
        ImageInput | None,
        Field(description=f"{IMAGE}: layout by label colours, black where there is no label"),
    ] = None
    controls: Annotated[
        list[ControlInput] | None,
        Field(
            max_length=MAX_CONTROLS,
            description="Control images for ControlNets and T2I-Adapters; the effects of several add up",
        ),
    ] = None
    reference_images: Annotated[
        list[ReferenceInput] | None,
        Field(max_length=MAX_REFERENCES, description="Images whose content or style the result follows"),
    ] = None


class GenerateRequest(SceneRequest):
    """A prompt or another condition, and optionally an image to start from."""

    prompt: Annotated[
        Annotated[str, Field(min_length=1, max_length=MAX_TEXT), AfterValidator(not_blank)] | None,
        Field(
            description="Optional with an image in another field, and with class_label, boxes or "
            "segmentation, whose labels' names then become the prompt"
        ),
    ] = None
    init_image: Annotated[ImageInput | None, Field(description=f"{IMAGE}; the image to start from")] = None
    hires: Annotated[
        HiresInput | None,
        Field(description="A second pass at a larger size; width and height stay those of the first"),
    ] = None
    image_guidance_scale: Annotated[
        float | None,
        Field(
            ge=0,
            le=50,
            description="How closely the result follows init_image, for models that edit images by "
            "instructions (InstructPix2Pix); default: 1.5",
        ),
    ] = None


class Extend(BaseModel):
    """Pixels to paint beyond each side of an image."""

    model_config = ConfigDict(extra="forbid", strict=True)

    left: Annotated[int, Field(ge=0, le=MAX_SIDE)] = 0
    top: Annotated[int, Field(ge=0, le=MAX_SIDE)] = 0
    right: Annotated[int, Field(ge=0, le=MAX_SIDE)] = 0
    bottom: Annotated[int, Field(ge=0, le=MAX_SIDE)] = 0

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom."""
        return self.left, self.top, self.right, self.bottom


Area = Literal["whole", "masked"]
Fill = Literal["original", "blur", "noise", "empty"]


class InpaintRequest(SceneRequest):
    """An image and a mask, or sides to extend it by. Where the mask is black, the image stays unchanged."""

    prompt: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    image: Annotated[ImageInput, Field(description=IMAGE)]
    mask: Annotated[
        ImageInput | None,
        Field(
            description=f"{IMAGE}, of the size of image; white marks the pixels to repaint. Optional with "
            "extend"
        ),
    ] = None
    mask_blur: Annotated[
        int, Field(ge=0, le=256, description="Pixels over which the repainted part fades into the image")
    ] = 0
    area: Annotated[
        Area,
        Field(
            description="masked: generate only a region around the mask, at width x height, and paste it "
            "into the image; for small details of large images"
        ),
    ] = "whole"
    padding: Annotated[
        int, Field(ge=0, le=MAX_SIDE, description="Pixels around the mask that area: masked includes")
    ] = 32
    fill: Annotated[
        Fill,
        Field(
            description="Initial content of the masked pixels: the image itself (original), the blurred "
            "colours around them (blur), noise, or zeros (empty). At strength 1 it matters little"
        ),
    ] = "original"
    extend: Annotated[
        Extend | None, Field(description="Outpainting: pixels to paint beyond the sides of the image")
    ] = None


class UpscaleRequest(ImageRequest):
    """An image to upscale."""

    prompt: Annotated[
        str, Field(max_length=MAX_TEXT, description="What the image shows, for models that take prompts")
    ] = ""
    image: Annotated[ImageInput, Field(description=IMAGE)]
    scale: Annotated[
        int | None,
        Field(
            ge=2,
            le=16,
            description="Default and maximum: the model's own scale; for less, its result is resized",
        ),
    ] = None
    noise_level: Annotated[
        int | None,
        Field(
            ge=0,
            le=1000,
            description="Noise added to the input to hide its flaws: more freedom, less fidelity",
        ),
    ] = None


AnyRequest = GenerateRequest | InpaintRequest | UpscaleRequest
