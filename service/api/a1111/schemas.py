"""Wire bodies of AUTOMATIC1111's API. Fields that are not served take the values that change nothing.

Every field may be null, as there. The limits of what is handed on are those of POST /generate.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import to_json

Off = Literal[False] | None


def repeatable(value: Any) -> Any:
    """Raises ValueError for what an answer cannot repeat as JSON: half a character, or lists too deep."""
    to_json({"parameters": {"value": value}})
    return value


Anything = Annotated[Any, AfterValidator(repeatable), Field(description="changes nothing")]
Zero = Annotated[float, Field(ge=0, le=0)] | None
One = Annotated[float, Field(ge=1, le=1)] | None
Empty = Annotated[str, Field(max_length=0)] | None
NoModel = Literal["", "None"] | None
Side = Annotated[int, Field(ge=1)] | None
PICTURE = "a PNG, JPEG or WebP file in base64 or as a data: URL"


class OverrideSettings(BaseModel):
    """Options for one request."""

    model_config = ConfigDict(extra="forbid")

    sd_model_checkpoint: str | None = None
    sd_vae: Literal["Automatic", "None"] | None = None
    CLIP_stop_at_last_layers: Annotated[int, Field(ge=1, le=1)] | None = None
    samples_format: Literal["png", "jpg", "jpeg", "webp"] | None = None


class Processing(BaseModel):
    """What txt2img and img2img have in common."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str | None = None
    negative_prompt: str | None = None
    seed: Annotated[int | None, Field(ge=-1, description="-1: drawn")] = None
    steps: int | None = None
    cfg_scale: float | None = None
    width: Side = None
    height: Side = None
    batch_size: Annotated[int | None, Field(ge=1)] = None
    n_iter: Annotated[int | None, Field(ge=1)] = None
    sampler_name: str | None = None
    sampler_index: Annotated[str | None, Field(description="older name of sampler_name")] = None
    scheduler: str | None = None
    eta: Annotated[float | None, Field(description="of DDIM; 1 for ancestral samplers")] = None
    override_settings: OverrideSettings | None = None
    override_settings_restore_afterwards: Literal[True] | None = None
    send_images: Literal[True] | None = None

    save_images: Off = None
    styles: Annotated[list[str], Field(max_length=0)] | None = None
    subseed_strength: Zero = None
    seed_resize_from_h: Annotated[int, Field(ge=-1, le=0)] | None = None
    seed_resize_from_w: Annotated[int, Field(ge=-1, le=0)] | None = None
    restore_faces: Off = None
    tiling: Off = None
    s_churn: Zero = None
    s_noise: One = None
    s_min_uncond: Zero = None
    script_name: NoModel = None
    alwayson_scripts: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    refiner_checkpoint: NoModel = None
    token_merging_ratio: Zero = None
    infotext: Empty = None
    force_task_id: None = None
    firstpass_image: None = None

    # Without what they belong to, which is refused above, they mean nothing.
    subseed: Anything = None
    s_tmin: Anything = None
    s_tmax: Anything = None
    script_args: Anything = None
    refiner_switch_at: Anything = None
    token_merging_ratio_hr: Anything = None
    do_not_save_samples: Anything = None
    do_not_save_grid: Anything = None
    disable_extra_networks: Off = None
    comments: Anything = None


class TextToImage(Processing):
    """POST /sdapi/v1/txt2img."""

    enable_hr: Off = None
    denoising_strength: Anything = None
    firstphase_width: Anything = None
    firstphase_height: Anything = None
    hr_scale: Anything = None
    hr_upscaler: Anything = None
    hr_second_pass_steps: Anything = None
    hr_resize_x: Anything = None
    hr_resize_y: Anything = None
    hr_checkpoint_name: Anything = None
    hr_sampler_name: Anything = None
    hr_scheduler: Anything = None
    hr_prompt: Anything = None
    hr_negative_prompt: Anything = None
    hr_cfg: Anything = None


class ImageToImage(Processing):
    """POST /sdapi/v1/img2img."""

    init_images: Annotated[list[str], Field(min_length=1, max_length=1, description=PICTURE)]
    denoising_strength: Annotated[float | None, Field(description="default: 0.75")] = None
    mask: Annotated[str | None, Field(description=f"{PICTURE}; white, or what is opaque: paint anew")] = None
    mask_blur: Annotated[int | None, Field(ge=0, le=64, description="pixels; default: 4")] = None
    mask_blur_x: Annotated[int, Field(ge=4, le=4)] | None = None
    mask_blur_y: Annotated[int, Field(ge=4, le=4)] | None = None
    mask_round: Literal[True] | None = None
    inpainting_mask_invert: Annotated[int | None, Field(ge=0, le=1)] = None
    inpainting_fill: Annotated[
        int | None, Field(ge=0, le=1, description="0: start from the colours around; 1: from the picture")
    ] = None
    inpaint_full_res: Annotated[
        bool | None, Field(description="paint the masked region alone, at width x height; default: true")
    ] = None
    inpaint_full_res_padding: Annotated[int | None, Field(ge=0, description="pixels around it")] = None
    include_init_images: Annotated[bool | None, Field(description="repeat them in `parameters`")] = None
    resize_mode: Annotated[int, Field(ge=0, le=0)] | None = None
    initial_noise_multiplier: One = None
    latent_mask: None = None
    image_cfg_scale: Anything = None


class Made(BaseModel):
    """The answer of both."""

    images: Annotated[list[str], Field(description="files in base64")]
    parameters: Annotated[dict[str, Any], Field(description="the request")]
    info: Annotated[str, Field(description="JSON: the seeds, prompts and infotexts of the pictures")]


class Info(BaseModel):
    """What Made.info says."""

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
    sd_model_hash: str | None = None
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


class ExtraSingleImage(BaseModel):
    """POST /sdapi/v1/extra-single-image."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    image: Annotated[str, Field(description=PICTURE)]
    resize_mode: Annotated[
        int | None, Field(ge=0, le=1, description="0: by upscaling_resize; 1: to width and height")
    ] = None
    upscaling_resize: Annotated[float | None, Field(gt=0, le=16, description="default: 2")] = None
    upscaling_resize_w: Side = None
    upscaling_resize_h: Side = None
    upscaling_crop: bool | None = None
    upscaler_1: Annotated[str | None, Field(description="of GET /sdapi/v1/upscalers; default: None")] = None
    upscaler_2: Anything = None
    extras_upscaler_2_visibility: Zero = None
    gfpgan_visibility: Zero = None
    codeformer_visibility: Zero = None
    codeformer_weight: Anything = None
    show_extras_results: Literal[True] | None = None
    upscale_first: Anything = None


class ExtraResult(BaseModel):
    html_info: str = ""
    image: Annotated[str, Field(description="a PNG file in base64")]


class ProgressState(BaseModel):
    """Counters of the request that is shown; the others of this API wait or run beside it."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str
    job_count: Annotated[int, Field(description="requests of this API under way")]
    job_timestamp: str
    job_no: int = 0
    sampling_step: int
    sampling_steps: int


class ProgressAnswer(BaseModel):
    progress: Annotated[float, Field(description="0 to 1, of the oldest request of this API under way")]
    eta_relative: Annotated[float, Field(description="seconds; 0: not known")]
    state: ProgressState
    current_image: Annotated[str | None, Field(description="a PNG file in base64")] = None
    textinfo: str | None = None


class Options(BaseModel):
    """Those of the options that there are here; all but the first take no other value."""

    model_config = ConfigDict(extra="forbid")

    sd_model_checkpoint: str
    sd_checkpoint_hash: Literal[""] = ""
    sd_vae: Literal["Automatic"] = "Automatic"
    CLIP_stop_at_last_layers: Annotated[int, Field(ge=1, le=1)] = 1
    samples_format: Literal["png"] = "png"
    enable_pnginfo: Literal[True] = True
    eta_ddim: Annotated[float, Field(ge=0, le=0)] = 0.0
    eta_ancestral: Annotated[float, Field(ge=1, le=1)] = 1.0
    img2img_fix_steps: Literal[False] = False


class NewOptions(OverrideSettings):
    """What POST /sdapi/v1/options takes."""

    sd_model_checkpoint: Annotated[str | None, Field(description="of GET /sdapi/v1/sd-models")] = None
    sd_checkpoint_hash: Literal[""] | None = None
    samples_format: Literal["png"] | None = None
    enable_pnginfo: Literal[True] | None = None
    eta_ddim: Zero = None
    eta_ancestral: One = None
    img2img_fix_steps: Off = None


class SDModel(BaseModel):
    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None


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


class LoRAItem(BaseModel):
    name: str
    alias: str
    path: str
    metadata: dict[str, Any] = {}


class ScriptsList(BaseModel):
    txt2img: list[str] = []
    img2img: list[str] = []


class Embeddings(BaseModel):
    loaded: dict[str, Any] = {}
    skipped: dict[str, Any] = {}


class Memory(BaseModel):
    """Of the worker's device; this process does not see it."""

    ram: dict[str, Any] = {"error": "not measured"}
    cuda: dict[str, Any] = {"error": "not measured"}
