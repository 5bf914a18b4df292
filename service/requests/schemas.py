"""Wire bodies. What is not named here is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import CoreSchema, core_schema

from models.spec import Spacing
from service.engine.job import MAX_SEED
from service.requests.images import Format, ImageSource
from service.worker.progress import Stage

MAX_SIDE = 8192
MAX_N = 1024  # the operator's own limit comes on top
MAX_TEXT = 4000
MAX_BOXES = 64
MAX_WEIGHT = 10.0  # of a LoRA


def not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


PICTURE = "a PNG, JPEG or WebP file in base64 or as a data: URL"


class _ImageSourceSchema:
    """On the wire an image is text; inside the service it may also be a file's bytes or pixels."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self.validate, core_schema.str_schema(strict=True))

    @staticmethod
    def validate(value: object, read_text: ValidatorFunctionWrapHandler) -> object:
        return value if isinstance(value, bytes | Image.Image) else read_text(value)


def label_or_error(value: object, read: ValidatorFunctionWrapHandler) -> object:
    try:
        return read(value)
    except ValidationError:
        raise ValueError("must be a label of the model, by its name or its number") from None


def within_seeds(seed: int) -> int:
    if seed > MAX_SEED:
        raise ValueError(f"must be at most {MAX_SEED}")
    return seed


# The API document has no `maximum` for it: clients generated from it use signed
# 64-bit integers, which cannot hold it.
SeedInput = Annotated[int, Field(ge=-1), AfterValidator(within_seeds)]
LabelInput = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[str, Field(max_length=200)], WrapValidator(label_or_error)
]
ImageInput = Annotated[ImageSource, _ImageSourceSchema()]


class LabelBox(BaseModel):
    """Where an object goes: the upper left corner and the size, as parts of the picture's sides."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: Annotated[LabelInput, Field(description="a label of the model, by its name or its number")]
    x: Annotated[float, Field(ge=0, le=1)]
    y: Annotated[float, Field(ge=0, le=1)]
    w: Annotated[float, Field(gt=0, le=1)]
    h: Annotated[float, Field(gt=0, le=1)]


class ImageRequest(BaseModel):
    """What all requests for pictures have in common. Defaults are the model's: GET /models tells them."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    negative_prompt: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    long_prompts: Annotated[
        Literal["cut", "chunk"],
        Field(
            description="of more than the model reads at once (77 tokens): left out, or read in chunks of 75"
        ),
    ] = "cut"
    prompt_weights: Annotated[
        bool,
        Field(
            description="whether (word:1.3), (word) for 1.1, [word] for 1 / 1.1 weigh words; \\( is a bracket"
        ),
    ] = False
    model: Annotated[str | None, Field(max_length=200, description="default: the first that does this")] = (
        None
    )
    steps: Annotated[int | None, Field(ge=1, le=1000)] = None
    guidance_scale: Annotated[
        float | None, Field(ge=0, le=50, description="1: none, the default where nothing is asked for")
    ] = None
    seed: Annotated[
        SeedInput | None,
        Field(
            description="Seed of image 0; image i has seed + i. Missing or -1: drawn at random, below 2^53. "
            "Seeds up to 2^64 - 1 are accepted."
        ),
    ] = None
    n: Annotated[int, Field(ge=1, le=MAX_N, description="pictures")] = 1
    sampler: Annotated[str | None, Field(max_length=50)] = None
    spacing: Annotated[
        Spacing | None,
        Field(description="of the timesteps; lcm and dpmpp_2m_karras have their own"),
    ] = None
    eta: Annotated[float | None, Field(ge=0, le=1, description="0: DDIM; 1: DDPM")] = None
    loras: Annotated[
        dict[str, Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]],
        Field(default_factory=dict, description="name -> weight, of the model's LoRAs (GET /models)"),
    ]
    output_format: Format | None = None
    priority: Annotated[int, Field(ge=0, le=9, description="larger runs sooner")] = 0
    timeout: Annotated[float | None, Field(gt=0, le=86_400, description="seconds until a 504")] = None


class SceneRequest(ImageRequest):
    """What requests for pictures of something have in common."""

    width: Annotated[int | None, Field(ge=1, le=MAX_SIDE, description="pixels")] = None
    height: Annotated[int | None, Field(ge=1, le=MAX_SIDE, description="pixels")] = None
    strength: Annotated[
        float | None,
        Field(gt=0, le=1, description="of a run from a picture: the share of the steps it takes"),
    ] = None
    class_label: Annotated[
        LabelInput | None,
        Field(description="number or name of a label of the model, instead of a prompt"),
    ] = None
    boxes: Annotated[
        list[LabelBox] | None,
        Field(min_length=1, max_length=MAX_BOXES, description="what goes where; later ones lie on top"),
    ] = None
    segmentation: Annotated[
        ImageInput | None,
        Field(description=f"{PICTURE}: the colours of labels where they go, black elsewhere"),
    ] = None


class GenerateRequest(SceneRequest):
    """What to make, from noise or from a picture."""

    prompt: Annotated[
        Annotated[str, Field(min_length=1, max_length=MAX_TEXT), AfterValidator(not_blank)] | None,
        Field(
            description="may be missing where class_label, boxes or segmentation say what to make: labels' "
            "names are it then"
        ),
    ] = None
    init_image: Annotated[ImageInput | None, Field(description=f"{PICTURE}, that the run starts from")] = None


class InpaintRequest(SceneRequest):
    """What to paint anew. The answer has the picture's size, and is the picture where the mask is black."""

    prompt: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    image: Annotated[ImageInput, Field(description=PICTURE)]
    mask: Annotated[ImageInput, Field(description=f"{PICTURE}, of the size of image; white: paint anew")]


class UpscaleRequest(ImageRequest):
    """What to enlarge."""

    prompt: Annotated[
        str, Field(max_length=MAX_TEXT, description="what it shows, for models that read prompts")
    ] = ""
    image: Annotated[ImageInput, Field(description=PICTURE)]
    scale: Annotated[
        int | None,
        Field(ge=2, le=16, description="default: the model's own; for less, its picture is made smaller"),
    ] = None
    noise_level: Annotated[
        int | None,
        Field(
            ge=0, le=1000, description="noise to hide the picture's faults in: more freedom, less fidelity"
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
    data: Annotated[str, Field(description="the file, in base64")]
    media_type: str
    seed: int
    width: int
    height: int


class Timings(BaseModel):
    """Seconds."""

    queue: float
    denoise: float
    decode: float
    total: float


class GenerateResponse(BaseModel):
    id: str
    model: str
    created: Annotated[int, Field(description="seconds since 1970")]
    images: list[ImageResult]
    timings: Timings
    warnings: list[str]


class JobBody(BaseModel):
    """What all requests for jobs have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SceneJob(JobBody):
    """A job that can be watched."""

    preview_every: Annotated[
        int, Field(ge=0, le=1000, description="steps between two previews of a picture; 0: none")
    ] = 0
    preview_decoded: Annotated[
        bool, Field(description="previews at full size through the decoder, which takes its time")
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
    """Where a job stands."""

    id: str
    task: Literal["generate", "inpaint", "upscale"]
    status: Stage
    created: Annotated[int, Field(description="seconds since 1970")]
    position: Annotated[int | None, Field(description="in the queue; 1 begins next")]
    estimate: Annotated[float | None, Field(description="seconds until it ends, while it waits and if known")]
    step: Annotated[int, Field(description="steps done, of all its pictures together")]
    steps: Annotated[int, Field(description="steps it takes; 0 before it begins")]
    result: Annotated[GenerateResponse | None, Field(description="once it is done")]
    error: Annotated[ErrorDetail | None, Field(description="once it has failed")]


class JobPreview(BaseModel):
    """What a picture looks like on the way."""

    index: Annotated[int, Field(description="which of the job's pictures")]
    step: Annotated[int, Field(description="steps of that picture done")]
    data: Annotated[str, Field(description="the file, in base64")]
    media_type: str
    width: int
    height: int


class ModelDefaults(BaseModel):
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    spacing: Spacing
    eta: float
    noise_level: int


class ModelLimits(BaseModel):
    size_multiple: Annotated[int, Field(description="width and height must be multiples of it")]
    max_pixels: Annotated[int, Field(description="width * height")]
    max_steps: int
    max_n: int
    max_work: Annotated[int, Field(description="n * steps * width * height")]


class Label(BaseModel):
    """What class_label, boxes and segmentation can name; one without a name is called by its number."""

    name: str
    colour: Annotated[str, Field(description="of its regions in `segmentation`, as #rrggbb")]


class Upscaling(BaseModel):
    scale: int
    max_noise_level: Annotated[int, Field(description="0: the model takes pictures as they are")]


class Model(BaseModel):
    name: str
    tasks: list[str]
    inpainting: Annotated[
        Literal["mask channels", "blending"] | None,
        Field(description="how: the network sees the mask, or what is known is put back after each step"),
    ]
    upscaling: Annotated[Upscaling | None, Field(description="by how much, if it does")]
    inputs: Annotated[
        list[str],
        Field(description="prompt, class_label, boxes, segmentation: those that it heeds"),
    ]
    guided: Annotated[bool, Field(description="whether guidance_scale may be anything but 1")]
    label_count: Annotated[int, Field(description="numbers below it are labels")]
    labels: Annotated[
        list[Label],
        Field(description="label i is the i-th, counted from 0; none are listed that are numbers alone"),
    ]
    loras: Annotated[list[str], Field(description="that `loras` can name")]
    embeddings: Annotated[list[str], Field(description="words of prompts that it has learned")]
    defaults: ModelDefaults
    limits: ModelLimits
    samplers: list[str]
    spacings: Annotated[list[Spacing], Field(description="for all samplers but lcm and dpmpp_2m_karras")]


class ModelList(BaseModel):
    models: list[Model]


class Health(BaseModel):
    status: Literal["ok", "loading", "draining", "failed"]
    models: list[str]
    jobs: Annotated[int, Field(description="accepted and not answered")]
    capacity: int


class ErrorBody(BaseModel):
    error: ErrorDetail


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error model for each status, as FastAPI's `responses`."""
    return {status: {"model": ErrorBody} for status in statuses}
