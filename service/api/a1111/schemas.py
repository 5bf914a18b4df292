"""Request and response bodies of A1111's API.

As in A1111, every field may be null, and unknown fields are accepted. Fields have A1111's types; the values
that this service supports are checked later (checks.py, samplers.py, options.py).
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import to_json

from service.requests.image_field import IMAGE


def serialisable(value: Any) -> Any:
    """The value, to be repeated in a response. Raises ValueError for NaN, lone surrogates, deep nesting."""
    try:
        to_json(value)
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("must be valid JSON: no NaN, no lone surrogates, no deep nesting") from None
    return value


NEUTRAL_ONLY = Field(description="not supported: only values that do not change the image are accepted")
NO_EFFECT = Field(description="no effect")
Anything = Annotated[Any, AfterValidator(serialisable)]
AnyObject = Annotated[dict[str, Any], AfterValidator(serialisable)]
Side = Annotated[int, Field(ge=1)]
Blur = Annotated[int, Field(ge=0, le=64)]


class Body(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class Processing(Body):
    """The common fields of txt2img and img2img."""

    prompt: Annotated[
        str | None,
        Field(
            description="may name LoRAs as <lora:name:weight> or <lora:name:text encoder weight:UNet weight>"
        ),
    ] = None
    negative_prompt: str | None = None
    seed: Annotated[int | None, Field(ge=-1, description="-1: a random seed")] = None
    subseed: Annotated[int | None, Field(ge=-1, description="variation seed; -1: a random seed")] = None
    subseed_strength: Annotated[
        float | None, Field(description="0 to 1: how much of the variation seed's noise is mixed in")
    ] = None
    tiling: Annotated[
        bool | None, Field(description="true: copies of the image fit together without a seam")
    ] = None
    steps: int | None = None
    cfg_scale: float | None = None
    width: Side | None = None
    height: Side | None = None
    batch_size: Annotated[int | None, Field(ge=1)] = None
    n_iter: Annotated[int | None, Field(ge=1, description="batches; batch_size * n_iter images")] = None
    sampler_name: str | None = None
    sampler_index: Annotated[str | None, Field(description="older name of sampler_name")] = None
    scheduler: str | None = None
    eta: Annotated[float | None, Field(description="noise of DDIM's steps, 0 to 1; with Euler a 0 or 1")] = (
        None
    )
    override_settings: Annotated[
        AnyObject | None,
        Field(
            description="options of this request: sd_model_checkpoint, samples_format, "
            "CLIP_stop_at_last_layers"
        ),
    ] = None
    override_settings_restore_afterwards: Annotated[
        bool | None, Field(description="false: later requests use the checkpoint, too")
    ] = None
    disable_extra_networks: Annotated[
        bool | None, Field(description="true: ignore the LoRAs in the prompt")
    ] = None
    send_images: Annotated[bool | None, Field(description="false: the response has no images")] = None

    alwayson_scripts: Annotated[
        AnyObject | None,
        Field(
            description="controlnet: units as its extension takes them; other scripts are accepted only "
            "without arguments or switched off"
        ),
    ] = None
    infotext: Annotated[str | None, NEUTRAL_ONLY] = None
    refiner_checkpoint: Annotated[
        str | None, Field(description="name of a model that makes the last steps; the text None: no refiner")
    ] = None
    refiner_switch_at: Annotated[
        float | None, Field(description="fraction of the steps after which it takes over; 1: never")
    ] = None
    restore_faces: Annotated[bool | None, NEUTRAL_ONLY] = None
    s_churn: Annotated[float | None, NEUTRAL_ONLY] = None
    s_min_uncond: Annotated[float | None, NEUTRAL_ONLY] = None
    s_noise: Annotated[float | None, NEUTRAL_ONLY] = None
    script_name: Annotated[str | None, NEUTRAL_ONLY] = None
    seed_resize_from_h: Annotated[int | None, NEUTRAL_ONLY] = None
    seed_resize_from_w: Annotated[int | None, NEUTRAL_ONLY] = None
    token_merging_ratio: Annotated[float | None, NEUTRAL_ONLY] = None

    comments: Annotated[Anything, NO_EFFECT] = None
    do_not_save_grid: Annotated[bool | None, NO_EFFECT] = None
    do_not_save_samples: Annotated[bool | None, NO_EFFECT] = None
    firstpass_image: Annotated[str | None, NO_EFFECT] = None
    force_task_id: Annotated[str | None, NO_EFFECT] = None
    s_tmax: Annotated[float | None, NO_EFFECT] = None
    s_tmin: Annotated[float | None, NO_EFFECT] = None
    save_images: Annotated[bool | None, NO_EFFECT] = None
    script_args: Annotated[Anything, NO_EFFECT] = None
    styles: Annotated[list[str] | None, NO_EFFECT] = None
    token_merging_ratio_hr: Annotated[float | None, NO_EFFECT] = None


class TextToImage(Processing):
    """POST /sdapi/v1/txt2img."""

    enable_hr: Annotated[
        bool | None,
        Field(description="true: a second pass at a larger size; without it, hr_* have no effect"),
    ] = None
    denoising_strength: Annotated[float | None, Field(description="of the second pass; default: 0.75")] = None
    hr_scale: Annotated[float | None, Field(description="default: 2")] = None
    hr_upscaler: Annotated[
        str | None,
        Field(description="Latent (default) and its variants, Lanczos, Nearest, None or an upscaling model"),
    ] = None
    hr_second_pass_steps: Annotated[
        int | None, Field(ge=0, description="steps that the second pass runs; 0 or null: as the first")
    ] = None
    hr_resize_x: Annotated[int | None, Field(ge=0, description="width instead of hr_scale; 0: none")] = None
    hr_resize_y: Annotated[int | None, Field(ge=0, description="height instead of hr_scale; 0: none")] = None
    hr_prompt: Annotated[str | None, Field(description="empty: that of the first pass")] = None
    hr_negative_prompt: Annotated[str | None, Field(description="empty: that of the first pass")] = None
    hr_checkpoint_name: Annotated[str | None, NEUTRAL_ONLY] = None
    hr_sampler_name: Annotated[str | None, NEUTRAL_ONLY] = None
    hr_scheduler: Annotated[str | None, NEUTRAL_ONLY] = None
    hr_cfg: Annotated[float | None, NEUTRAL_ONLY] = None
    firstphase_width: Annotated[int | None, NEUTRAL_ONLY] = None
    firstphase_height: Annotated[int | None, NEUTRAL_ONLY] = None


class ImageToImage(Processing):
    """POST /sdapi/v1/img2img."""

    init_images: Annotated[list[str], Field(description=f"one image: {IMAGE}")]
    denoising_strength: Annotated[
        float | None, Field(description="0: the image is returned unchanged; default: 0.75")
    ] = None
    resize_mode: Annotated[
        int | None,
        Field(
            ge=0,
            le=3,
            description="of the image to width x height: 0: stretch; 1: crop; 2: fill; 3: not supported",
        ),
    ] = None
    mask: Annotated[
        str | None, Field(description=f"{IMAGE}; white (with transparency: opaque) pixels are repainted")
    ] = None
    mask_blur: Annotated[
        Blur | None, Field(description="in pixels; replaces mask_blur_x and mask_blur_y")
    ] = None
    mask_blur_x: Annotated[Blur | None, Field(description="in pixels; default: 4")] = None
    mask_blur_y: Annotated[Blur | None, Field(description="in pixels; default: 4")] = None
    mask_round: Annotated[
        bool | None, Field(description="false: opacities of the mask are not rounded to 0 or 1")
    ] = None
    inpainting_mask_invert: Annotated[int | None, Field(ge=0, le=1)] = None
    inpainting_fill: Annotated[
        int | None,
        Field(
            ge=0,
            le=3,
            description="initial content of the masked pixels: 0: the colours around them; 1: the image; "
            "2: latent noise; 3: latent zeros",
        ),
    ] = None
    inpaint_full_res: Annotated[
        bool | None, Field(description="true (default): process only the masked region, at width x height")
    ] = None
    inpaint_full_res_padding: Annotated[
        int | None, Field(ge=0, description="pixels added around the masked region; default: 0")
    ] = None
    include_init_images: Annotated[
        bool | None, Field(description="true: `parameters` contains init_images and mask")
    ] = None
    initial_noise_multiplier: Annotated[float | None, NEUTRAL_ONLY] = None
    latent_mask: Annotated[str | None, NEUTRAL_ONLY] = None
    image_cfg_scale: Annotated[
        float | None, Field(description="for InstructPix2Pix; no effect with other models")
    ] = None


class ProcessingResponse(BaseModel):
    """The response of txt2img and img2img."""

    images: Annotated[list[str], Field(description="files in base64")]
    parameters: Annotated[dict[str, Any], Field(description="the request")]
    info: Annotated[str, Field(description="JSON: seeds, prompts, infotexts and warnings")]


class Info(BaseModel):
    """The JSON in ProcessingResponse.info."""

    prompt: str
    all_prompts: list[str]
    negative_prompt: str
    all_negative_prompts: list[str]
    seed: int
    all_seeds: list[int]
    subseed: int
    all_subseeds: list[int]
    subseed_strength: float = 0
    width: int
    height: int
    sampler_name: str
    cfg_scale: float
    steps: int
    batch_size: int
    restore_faces: bool = False
    face_restoration_model: str | None = None
    sd_model_name: str
    sd_model_hash: str = ""
    sd_vae_name: str | None = None
    sd_vae_hash: str | None = None
    seed_resize_from_w: int = -1
    seed_resize_from_h: int = -1
    denoising_strength: float | None
    extra_generation_params: dict[str, Any] = {}
    index_of_first_image: int = 0
    infotexts: list[str]
    styles: list[str] = []
    job_timestamp: str
    clip_skip: int = 1
    is_using_inpainting_conditioning: bool = False
    version: str
    warnings: list[str]


class Extras(Body):
    """The common fields of extra-single-image and extra-batch-images."""

    resize_mode: Annotated[
        int | None,
        Field(
            ge=0,
            le=1,
            description="0: by the factor upscaling_resize; 1: to upscaling_resize_w x upscaling_resize_h",
        ),
    ] = None
    upscaling_resize: Annotated[float | None, Field(gt=0, le=16, description="default: 2")] = None
    upscaling_resize_w: Annotated[Side | None, Field(description="default: 512")] = None
    upscaling_resize_h: Annotated[Side | None, Field(description="default: 512")] = None
    upscaling_crop: Annotated[bool | None, Field(description="crop to width and height; default: true")] = (
        None
    )
    upscaler_1: Annotated[
        str | None, Field(description="a name from GET /sdapi/v1/upscalers; default: None")
    ] = None
    extras_upscaler_2_visibility: Annotated[float | None, NEUTRAL_ONLY] = None
    gfpgan_visibility: Annotated[float | None, NEUTRAL_ONLY] = None
    codeformer_visibility: Annotated[float | None, NEUTRAL_ONLY] = None
    show_extras_results: Annotated[
        bool | None, Field(description="false: the response has no image; default: true")
    ] = None
    upscaler_2: Annotated[Anything, NO_EFFECT] = None
    codeformer_weight: Annotated[Anything, NO_EFFECT] = None
    upscale_first: Annotated[Anything, NO_EFFECT] = None


class ExtraSingleImage(Extras):
    """POST /sdapi/v1/extra-single-image."""

    image: Annotated[str, Field(description=IMAGE)]


class FileData(Body):
    """One image of extra-batch-images."""

    data: Annotated[str, Field(description=IMAGE)]
    name: Annotated[str | None, NO_EFFECT] = None


class ExtraBatchImages(Extras):
    """POST /sdapi/v1/extra-batch-images."""

    imageList: list[FileData]  # noqa: N815 - A1111's name


class ExtraSingleResponse(BaseModel):
    html_info: str = ""
    image: Annotated[str, Field(description="a PNG file in base64")]


class ExtraBatchResponse(BaseModel):
    html_info: str = ""
    images: Annotated[list[str], Field(description="PNG files in base64")]


class PNGInfo(Body):
    """POST /sdapi/v1/png-info."""

    image: Annotated[str, Field(description=IMAGE)]


class PNGInfoResponse(BaseModel):
    info: Annotated[str, Field(description="the parameters in the file as text; empty if there are none")]
    items: Annotated[dict[str, Any], Field(description="other texts in the file")]
    parameters: Annotated[dict[str, str], Field(description="the parameters, by name")]


class ProgressState(BaseModel):
    """State of the oldest request of this API; other requests may wait or run at the same time."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str
    job_count: Annotated[int, Field(description="unfinished requests of this API")]
    job_timestamp: str
    job_no: int = 0
    sampling_step: int
    sampling_steps: int


class ProgressResponse(BaseModel):
    progress: Annotated[float, Field(description="0 to 1, of the oldest request of this API")]
    eta_relative: Annotated[float, Field(description="seconds left; 0: unknown")]
    state: ProgressState
    current_image: Annotated[str | None, Field(description="a PNG file in base64")] = None
    textinfo: str | None = None


class Options(BaseModel):
    """The options with their current values."""

    model_config = ConfigDict(extra="allow")

    sd_model_checkpoint: str
    sd_checkpoint_hash: str = ""
    samples_format: str


class OptionsUpdate(BaseModel):
    """POST /sdapi/v1/options. Unsupported options are accepted only with values that do not change images."""

    model_config = ConfigDict(extra="allow")

    sd_model_checkpoint: Annotated[
        str | None,
        Field(description="a model from GET /sdapi/v1/sd-models, used by requests without a model"),
    ] = None
    samples_format: Annotated[str | None, Field(description="png, jpg or webp")] = None


class Empty(BaseModel):
    """{}"""


class SDModel(BaseModel):
    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None


class VAEItem(BaseModel):
    model_name: str
    filename: str


class SamplerItem(BaseModel):
    name: str
    aliases: list[str]
    options: dict[str, str] = {}


class SchedulerItem(BaseModel):
    name: str
    label: str
    aliases: list[str] | None = None
    default_rho: float = -1
    need_inner_model: bool = False


class UpscalerItem(BaseModel):
    name: str
    model_name: str | None = None
    model_path: str | None = None
    model_url: str | None = None
    scale: float | None = None


class LatentUpscaleMode(BaseModel):
    name: str


class LoRAItem(BaseModel):
    name: str
    alias: str
    path: str
    metadata: dict[str, Any] = {}


class ScriptsList(BaseModel):
    txt2img: list[str] = []
    img2img: list[str] = []


class EmbeddingItem(BaseModel):
    """A textual inversion embedding. The number of its vectors is unknown to this process."""

    step: int | None = None
    sd_checkpoint: str | None = None
    sd_checkpoint_name: str | None = None
    shape: int
    vectors: int


class Embeddings(BaseModel):
    loaded: Annotated[dict[str, EmbeddingItem], Field(description="of the chosen model, by name")]
    skipped: Annotated[dict[str, EmbeddingItem], Field(description="of other models, by name")]


class Memory(BaseModel):
    """Statistics that A1111 measures and this service does not."""

    ram: dict[str, Any] = {"error": "not available"}
    cuda: dict[str, Any] = {"error": "not available"}
