"""What GET /models, GET /health and the calls that change the served models return."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from models.spec import Spacing
from service.engine.events import LoadedModel


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
    dtype: Annotated[
        str | None,
        Field(
            description="Type of the UNet's weights; null if not loaded. A model that overflows in "
            "float16 becomes bfloat16, until it is unloaded"
        ),
    ]
    backend: Annotated[
        str | None,
        Field(description="Library that runs the UNet and the VAE: torch or openvino; null if not loaded"),
    ]


def state_of(name: str, loaded: LoadedModel | None) -> ModelState:
    """loaded: None if the model is not loaded."""
    if loaded is None:
        return ModelState(name=name, loaded=False, bytes=None, dtype=None, backend=None)
    return ModelState(loaded=True, **loaded._asdict())


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
