"""Requests with all defaults filled in, from which jobs and the parameters in image files are made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ConfigDict

from models.conditioning.boxes import Box as NumberedBox
from models.spec import Spacing
from models.tiles import Tiles
from service.engine.job import (
    Decoder,
    FeatureCache,
    Hires,
    Job,
    JobControl,
    JobReference,
    LatentFill,
    LoraWeights,
    PromptSyntax,
    Refiner,
    Tiling,
    Variation,
)
from service.requests.control_schemas import ControlSettings, ReferenceSettings
from service.requests.extras import EXTRAS
from service.requests.images import Format
from service.requests.inpainting import Paste
from service.requests.metadata import DigitalSource
from service.requests.phase_schemas import HiresInput, RefinerInput
from service.requests.schemas import Area, Extend, FeatureCacheInput, Fill, LabelBox, VariationSeed


class Parameters(BaseModel):
    """The fields of a request that decide its images, without input images. None: left out of files.

    Image files contain them as JSON. Posting them again, with the input images, gives the same images.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    prompt: str | None
    negative_prompt: str | None
    width: int | None
    height: int | None
    steps: int
    guidance_scale: float
    seed: int
    n: int
    sampler: str
    eta: float
    strength: float | None = None
    class_label: int | None = None
    spacing: Spacing | None = None
    long_prompts: str | None = None
    prompt_weights: bool | None = None
    scale: int | None = None
    noise_level: int | None = None
    boxes: list[LabelBox] | None = None
    loras: dict[str, float] | None = None
    lora_text_weights: dict[str, float] | None = None
    guidance_start: float | None = None
    guidance_end: float | None = None
    guidance_rescale: float | None = None
    image_guidance_scale: float | None = None
    refiner: RefinerInput | None = None
    hires: HiresInput | None = None
    prompt_syntax: PromptSyntax | None = None
    decoder: Decoder | None = None
    tiling: Tiling | None = None
    clip_skip: int | None = None
    variation: VariationSeed | None = None
    feature_cache: FeatureCacheInput | None = None
    mask_blur: int | None = None
    area: Area | None = None
    padding: int | None = None
    fill: Fill | None = None
    extend: Extend | None = None
    controls: list[ControlSettings] | None = None
    reference_images: list[ReferenceSettings] | None = None

    @property
    def lora_weights(self) -> tuple[LoraWeights, ...]:
        """The LoRAs as in ModelKey."""
        text = self.lora_text_weights or {}
        names = sorted((self.loras or {}).items())
        return tuple(LoraWeights(name, weight, text.get(name, weight)) for name, weight in names)

    def of_image(self, index: int) -> dict[str, Any]:
        """The parameters of a request for image `index` alone, as plain values."""
        variation = self.variation
        if variation:
            variation = variation.model_copy(update={"seed": variation.seed + index})
        changes = {"seed": self.seed_of(index), "n": 1, "variation": variation}
        return self.model_copy(update=changes).model_dump(exclude_none=True)

    @property
    def extras(self) -> dict[str, object]:
        """The fields that only some models support; None for those without effect."""
        return {name: getattr(self, name) for name in EXTRAS}

    def seed_of(self, index: int) -> int:
        """The seed of image `index`: with a variation all images have the same."""
        return self.seed + (0 if self.variation else index)


@dataclass(frozen=True)
class Previews:
    """The previews of a running job. every: steps between two previews of an image; 0: no previews.

    decoded: at full size from the VAE decoder, instead of small ones from a projection of the latent.
    """

    every: int = 0
    decoded: bool = False
    format: Format = "jpeg"


NO_PREVIEWS = Previews()


@dataclass(frozen=True)
class Inputs:
    """Input images, layouts and controls, in the formats that Job describes.

    paste: where a repainted image is pasted.
    """

    image: bytes = b""
    mask: bytes = b""
    regions: bytes = b""
    boxes: tuple[NumberedBox, ...] = ()
    paste: Paste | None = None
    controls: tuple[JobControl, ...] = ()
    references: tuple[JobReference, ...] = ()


@dataclass(frozen=True)
class ResolvedRequest:
    """A request that can run. width, height: size of the images that the client gets.

    The job generates a canvas of canvas_width x canvas_height; the client gets its upper left part, if
    `inputs.paste` is not None pasted into the image that it sent. When
    upscaling, the canvas consists of tiles and is `model_scale` times the size of the input; the client gets
    it at parameters.scale.
    """

    id: str
    parameters: Parameters
    width: int
    height: int
    canvas_width: int
    canvas_height: int
    format: Format
    hires: Hires | None = None
    priority: int = 0
    region: bool = False  # the whole canvas is a region of the image that the client gets
    label_name: str = ""  # the name of parameters.class_label, for models that read prompts
    model_scale: int = 0  # 0: the request does not upscale
    tiles: Tiles | None = None
    inputs: Inputs = field(default=Inputs(), repr=False)
    warnings: tuple[str, ...] = ()
    previews: Previews = NO_PREVIEWS
    latent_fill: LatentFill = "image"
    has_provenance: bool = True  # files state that a model made the image
    embeds_guidance: bool = False  # as in ModelSpec: the guidance scale costs no second row

    @property
    def prompt(self) -> str:
        """The prompt that the model reads; if a class was requested, the name of its label."""
        return self.label_name or self.parameters.prompt or ""

    @property
    def negative_prompt(self) -> str:
        return self.parameters.negative_prompt or ""

    @property
    def task(self) -> str:
        """One of ModelSpec.tasks."""
        if self.model_scale:
            return "upscaling"
        if self.inputs.mask:
            return "inpainting"
        if self.inputs.image:
            return "image-to-image"
        if self.inputs.regions or self.inputs.boxes:
            return "layout-to-image"
        if self.parameters.class_label is not None:
            return "class-to-image"
        conditioned = self.prompt or self.inputs.controls or self.inputs.references
        return "text-to-image" if conditioned else "unconditional"

    def to_job(self) -> Job:
        """The job for the engine."""
        parameters, inputs = self.parameters, self.inputs
        variation, refiner = parameters.variation, parameters.refiner
        cache = parameters.feature_cache
        return Job(
            id=self.id,
            model=parameters.model,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            width=self.canvas_width,
            height=self.canvas_height,
            steps=parameters.steps,
            guidance_scale=1.0 if self.embeds_guidance else parameters.guidance_scale,
            seed=parameters.seed,
            n=parameters.n,
            sampler=parameters.sampler,
            eta=parameters.eta,
            priority=self.priority,
            strength=1.0 if parameters.strength is None else parameters.strength,
            image=inputs.image,
            mask=inputs.mask,
            regions=inputs.regions,
            scale=self.model_scale,
            noise_level=parameters.noise_level or 0,
            preview_every=self.previews.every,
            preview_decoded=self.previews.decoded,
            class_label=parameters.class_label,
            boxes=inputs.boxes,
            spacing=parameters.spacing,
            long_prompts=parameters.long_prompts or "cut",
            prompt_syntax=parameters.prompt_syntax or "plain",
            prompt_weights=bool(parameters.prompt_weights),
            loras=parameters.lora_weights,
            image_guidance=parameters.image_guidance_scale,
            embedded_guidance=parameters.guidance_scale if self.embeds_guidance else 1.0,
            latent_fill=self.latent_fill,
            keeps_pixels=inputs.paste is None,
            variation=Variation(variation.seed, variation.strength) if variation else None,
            decoder=parameters.decoder or "full",
            tiling=parameters.tiling or "none",
            clip_skip=parameters.clip_skip or 1,
            controls=tuple(control for control in inputs.controls if control.scale),
            references=tuple(reference for reference in inputs.references if reference.scale),
            guidance_start=parameters.guidance_start or 0.0,
            guidance_end=1.0 if parameters.guidance_end is None else parameters.guidance_end,
            guidance_rescale=parameters.guidance_rescale or 0.0,
            refiner=Refiner(refiner.model, refiner.switch_at) if refiner else None,
            hires=self.hires,
            feature_cache=FeatureCache(cache.interval, cache.branch) if cache else None,
        )

    @property
    def digital_source(self) -> DigitalSource | None:
        """What files state about the origin of the images; None: nothing."""
        if not self.has_provenance:
            return None
        return "compositeWithTrainedAlgorithmicMedia" if self.inputs.image else "trainedAlgorithmicMedia"

    @property
    def final_canvas(self) -> tuple[int, int]:
        """(width, height) of the images that the job makes: with hires, of its second pass."""
        return (
            (self.hires.width, self.hires.height) if self.hires else (self.canvas_width, self.canvas_height)
        )

    @property
    def used_size(self) -> tuple[int, int]:
        """(width, height) of the part of the canvas that the client gets."""
        return (self.canvas_width, self.canvas_height) if self.region else (self.width, self.height)

    def with_warnings(self, warnings: Iterable[str]) -> ResolvedRequest:
        """The request with more warnings for the client."""
        return replace(self, warnings=(*self.warnings, *warnings))

    def without_inputs(self) -> ResolvedRequest:
        """The request without its input images, which only the job needs."""
        return replace(self, inputs=Inputs())


def with_parameters(resolved: ResolvedRequest, **changes: Any) -> ResolvedRequest:
    return replace(resolved, parameters=resolved.parameters.model_copy(update=changes))


def with_inputs(resolved: ResolvedRequest, **changes: Any) -> ResolvedRequest:
    return replace(resolved, inputs=replace(resolved.inputs, **changes))
