"""Request and response bodies of the native API. Unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

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
from service.worker.progress import Stage

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


class ErrorDetail(BaseModel):
    type: str
    message: str
    param: str | None
    code: str
    request_id: str


class ImageResult(BaseModel):
    data: Annotated[str, Field(description="The file in base64")]
    media_type: str
    seed: int
    width: int
    height: int


class Timings(BaseModel):
    """Durations of the parts of a request, in seconds."""

    queue: float
    denoise: float
    decode: float
    total: float


class GenerateResponse(BaseModel):
    id: str
    model: str
    created: Annotated[int, Field(description="Seconds since 1970")]
    images: list[ImageResult]
    timings: Timings
    warnings: list[str]


class JobBody(BaseModel):
    """The common fields of all jobs."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SceneJob(JobBody):
    """A job that can send previews."""

    preview_every: Annotated[
        int, Field(ge=0, le=1000, description="Steps between two previews of an image; 0: no previews")
    ] = 0
    preview_decoded: Annotated[
        bool, Field(description="true: previews at full size from the VAE decoder, which is slower")
    ] = False
    preview_format: Format = "jpeg"


class GenerateJob(SceneJob):
    task: Literal["generate"]
    request: GenerateRequest


class InpaintJob(SceneJob):
    task: Literal["inpaint"]
    request: InpaintRequest


class UpscaleJob(JobBody):
    task: Literal["upscale"]
    request: UpscaleRequest


AnyJob = GenerateJob | InpaintJob | UpscaleJob
JobRequest = Annotated[AnyJob, Field(discriminator="task")]


class JobStatus(BaseModel):
    """The state of a job."""

    id: str
    task: Literal["generate", "inpaint", "upscale"]
    status: Stage
    created: Annotated[int, Field(description="Seconds since 1970")]
    position: Annotated[int | None, Field(description="Position in the queue; 1 is next")]
    estimate: Annotated[
        float | None, Field(description="Estimated seconds until the end of a queued job, if known")
    ]
    step: Annotated[int, Field(description="UNet calls done, of all images together")]
    steps: Annotated[int, Field(description="UNet calls in total; 0 before the job has started")]
    result: Annotated[GenerateResponse | None, Field(description="Present once the job is done")]
    error: Annotated[ErrorDetail | None, Field(description="Present once the job has failed")]


class JobPreview(BaseModel):
    """A preview of an image of a running job."""

    index: Annotated[int, Field(description="Index of the image")]
    step: Annotated[int, Field(description="UNet calls done of that image")]
    data: Annotated[str, Field(description="The file in base64")]
    media_type: str
    width: int
    height: int


class ModelDefaults(BaseModel):
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    spacing: Annotated[Spacing | None, Field(description="null: the sampler's own timesteps")]
    eta: float
    noise_level: int


class FewStepSettings(BaseModel):
    """How a model or a LoRA that was distilled to few steps is usually run."""

    kind: str
    steps: int
    guidance_scale: float
    sampler: str
    spacing: Annotated[Spacing | None, Field(description="null: the sampler's own timesteps")]
    eta: float


class ModelLimits(BaseModel):
    size_multiple: Annotated[int, Field(description="Width and height must be multiples of this")]
    max_pixels: Annotated[int, Field(description="Largest width * height")]
    max_steps: int
    max_n: int
    max_work: Annotated[int, Field(description="Largest n * UNet calls * width * height")]
    max_clip_skip: Annotated[int, Field(description="Largest clip_skip; 1: the model has none")]


class Label(BaseModel):
    """A label for class_label, boxes and segmentation. The name of a label without a name is its number."""

    name: str
    colour: Annotated[str, Field(description="Its colour in `segmentation`, as #rrggbb")]


class Upscaling(BaseModel):
    scale: int
    max_noise_level: Annotated[int, Field(description="0: the model adds no noise")]


class Control(BaseModel):
    name: str
    kind: Annotated[str, Field(description="ControlNet or T2I-Adapter")]
    types: Annotated[
        list[str], Field(description="Values of `type`, of which each use needs one; empty: it has one type")
    ]
    inpainting: Annotated[bool, Field(description="Needs a mask, so it is only for POST /inpaint")]


class ModelState(BaseModel):
    name: str
    loaded: Annotated[
        bool, Field(description="Whether the weights are in memory; otherwise the first request loads them")
    ]
    bytes: Annotated[int | None, Field(description="Size of the weights in memory; null if not loaded")]


class Model(ModelState):
    tasks: list[str]
    inpainting: Annotated[
        Literal["mask channels", "blending"] | None,
        Field(
            description="mask channels: the UNet reads the mask; blending: each step restores unmasked pixels"
        ),
    ]
    upscaling: Annotated[Upscaling | None, Field(description="For upscaling models")]
    inputs: Annotated[
        list[str],
        Field(description="Supported inputs, of prompt, class_label, boxes and segmentation"),
    ]
    guided: Annotated[
        bool,
        Field(description="Whether a guidance_scale other than 1 is supported"),
    ]
    label_count: Annotated[int, Field(description="Number of labels")]
    labels: Annotated[
        list[Label],
        Field(
            description="In the order of their numbers, from 0; empty if labels have no names and no colours"
        ),
    ]
    few_step: Annotated[
        FewStepSettings | None,
        Field(description="Usual settings of a model that was distilled to few steps; its defaults"),
    ]
    loras: Annotated[list[str], Field(description="Names for `loras`")]
    lora_settings: Annotated[
        dict[str, FewStepSettings],
        Field(
            description="Usual settings of each few-step LoRA; they are not applied: requests with the LoRA "
            "set steps, sampler and guidance_scale themselves"
        ),
    ]
    embeddings: Annotated[
        list[str], Field(description="Names of textual inversion embeddings, which prompts can use as words")
    ]
    decoders: Annotated[list[str], Field(description="Values of `decoder`")]
    extras: Annotated[
        list[str], Field(description="Optional fields of requests that this model supports, by name")
    ]
    controls: Annotated[list[str], Field(description="Names for `controls`")]
    control_details: Annotated[list[Control], Field(description="What each of `controls` is")]
    reference_adapters: Annotated[list[str], Field(description="Names for `reference_images`")]
    defaults: ModelDefaults
    limits: ModelLimits
    samplers: list[str]
    spacings: Annotated[
        list[Spacing], Field(description="Values of `spacing`; some samplers support only a part of them")
    ]


class ModelList(BaseModel):
    models: list[Model]


class ReplicaHealth(BaseModel):
    """A replica, which runs a worker process on one device."""

    replica: Annotated[int, Field(description="Its number, from 0: the label `replica` of metrics and logs")]
    device: str
    status: Annotated[
        Literal["ok", "loading", "failed"],
        Field(
            description="loading: its worker is starting; failed: its worker does not respond or cannot start"
        ),
    ]
    jobs: Annotated[int, Field(description="Jobs that it runs or that wait for it")]


class IgnoredFile(BaseModel):
    file: Annotated[str, Field(description="Path below the folder that was given to the service")]
    reason: str


class Rescan(BaseModel):
    models: list[ModelState]
    added: Annotated[list[str], Field(description="Models that were not served before")]
    removed: Annotated[
        list[str], Field(description="Models that are not served any more; their jobs under way still finish")
    ]
    loras: Annotated[list[str], Field(description="LoRAs that at least one model can use")]
    embeddings: Annotated[list[str], Field(description="Embeddings that at least one model can use")]
    ignored: Annotated[list[IgnoredFile], Field(description="Files that cannot be used")]


class Health(BaseModel):
    status: Literal["ok", "loading", "draining", "failed"]
    models: list[str]
    jobs: Annotated[int, Field(description="Requests accepted and not yet answered")]
    capacity: int
    replicas: list[ReplicaHealth]


class ErrorBody(BaseModel):
    error: ErrorDetail


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error body for each status, as FastAPI's `responses`."""
    return {status: {"model": ErrorBody} for status in statuses}
