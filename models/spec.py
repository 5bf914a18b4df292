"""The shape of a model as frozen dataclasses: networks, schedule, defaults and tasks.

Imports no torch, so that a process that only checks requests can use it. Widths are absolute channel counts
per level, finest level first.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

# sample: x_0 itself; edm: the F of Karras et al. 2022 (table 1), which is -v.
Prediction = Literal["epsilon", "v_prediction", "sample", "edm"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]
NoiseSpacing = Literal["karras", "exponential", "sgm_uniform", "simple", "beta"]
Spacing = Literal[TimestepSpacing, NoiseSpacing]
BetaSchedule = Literal["scaled_linear", "linear"]

ALL_TASKS = (
    "text-to-image",
    "image-to-image",
    "inpainting",
    "class-to-image",
    "layout-to-image",
    "unconditional",
    "upscaling",
)


@dataclass(frozen=True)
class UNetSpec:
    """Shape of a time-conditional UNet (Rombach et al. 2021, appendix E).

    With a context every attention is a spatial transformer. Without one (context_width 0) it is a plain block
    of self-attention, present where the depth is not 0.
    """

    in_channels: int  # of z and the concat channels
    out_channels: int
    channels: tuple[int, ...]  # width of each level
    res_blocks: int  # residual blocks per level going down; one more going up
    transformer_depth: tuple[int, ...]  # per residual block of each level; 0: no attention
    middle_depth: int  # transformer blocks in the middle block
    heads: tuple[int, ...]  # attention heads of each level; the middle block uses the last
    context_width: int  # 0: the UNet takes no context
    groups: int = 32  # of every GroupNorm
    linear_projection: bool = False  # in transformers: linear (SD 2.x) or 1x1 convolutions (SD 1.x)
    residual_resampling: bool = False  # residual blocks halve and double the size, not single convolutions
    scale_shift_norm: bool = False  # the timestep embedding scales and shifts the second norm's output
    noise_levels: int = 0  # size of the table of noise level embeddings, added to the timestep's; 0: none
    cross_only: tuple[bool, ...] = ()  # levels where both attentions are to the context; (): no level
    added_width: int = 0  # width of the pooled vector (text, then sizes); 0: none
    # Transformer blocks per residual block of each level going up, finest level first; (): transformer_depth.
    up_depths: tuple[tuple[int, ...], ...] = ()
    middle_res_blocks: int = 2  # before and after the middle transformer; smaller UNets have one or none
    size_width: int = 0  # embedding width of each of SDXL's sizes (Podell et al. 2023, section 2.2)
    guidance_width: int = 0  # embedding width of the guidance scale, an input (Luo et al. 2023); 0: no input

    @property
    def factor(self) -> int:
        """Cells of the latent along one side of a cell of the coarsest level."""
        return 1 << (len(self.channels) - 1)

    @property
    def blocks(self) -> int:
        """Input blocks, of which each has a skip connection to one of as many output blocks."""
        return len(self.channels) * (self.res_blocks + 1)

    def up_depth(self, level: int, block: int) -> int:
        """Transformer blocks after a residual block of a level going up."""
        return self.up_depths[level][block] if self.up_depths else self.transformer_depth[level]

    @property
    def side_multiple(self) -> int:
        """Latent sides must be a multiple of this: only lone convolutions can halve odd sides."""
        return self.factor if self.residual_resampling else 1


@dataclass(frozen=True)
class AutoencoderSpec:
    """Shape of an autoencoder with a Gaussian latent (KL) or a codebook (VQ).

    Rombach et al. 2021, section 3.1.
    """

    channels: tuple[int, ...]  # width of each level
    res_blocks: int  # residual blocks per level of the encoder; one more in the decoder
    latent_channels: int
    scale_factor: float  # the diffusion model sees scale_factor * E(x), normalised with latents_mean and _std
    image_channels: int = 3
    groups: int = 32
    sample_size: int = 512  # side of the images that it was trained on
    patch_size: int = 1  # side of the squares that are folded into channels at the encoder's start
    codes: int = 0  # size of the codebook of a VQ autoencoder; 0: KL
    inner_channels: int | None = None  # between quant_conv and the encoder or decoder; None: latent_channels
    attention_levels: tuple[int, ...] = ()  # levels with attention after each residual block, 0 the finest
    middle_attention: bool = True
    latents_mean: tuple[float, ...] = ()  # of each channel of E(x), subtracted first; (): none
    latents_std: tuple[float, ...] = ()  # E(x) is divided by them
    upcast: bool = False  # activations overflow float16: runs in bfloat16 or float32 instead

    @property
    def z_channels(self) -> int:
        """Channels between the encoder and quant_conv (the reference's name for them)."""
        return self.inner_channels or self.latent_channels

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent cell (f in the paper)."""
        return self.patch_size << (len(self.channels) - 1)


@dataclass(frozen=True)
class ScheduleSpec:
    """Noise schedule, and which quantity the UNet predicts."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    timesteps: int = 1000
    prediction: Prediction = "epsilon"
    spacing: TimestepSpacing = "leading"
    steps_offset: int = 1  # added to each timestep of the leading spacing
    final_alpha_one: bool = False  # the last step goes to alpha_bar = 1 instead of alpha_bar[0]
    # Of models that were trained on noise levels (Karras et al. 2022), not on betas: the smallest and the
    # largest, for data with the standard deviation sigma_data. Each timestep is one of these levels.
    sigma_range: tuple[float, ...] = ()
    sigma_data: float = 1.0
    first_timestep: int | None = None  # at which runs begin; None: the last of the schedule
    zero_terminal_snr: bool = False  # betas are rescaled, so that alpha_bar is 0 at the last timestep

    @property
    def visited(self) -> int:
        """How many timesteps runs choose from: those up to first_timestep."""
        return self.timesteps if self.first_timestep is None else self.first_timestep + 1


@dataclass(frozen=True)
class TextSpec:
    """Shape of a CLIP text transformer (Radford et al. 2021), and what its output is."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    intermediate: int
    tokens: int  # context length, begin and end tokens included
    activation: str = "quick_gelu"
    eos_id: int = 49407
    bos_id: int = 49406
    pad_id: int = 49407
    projection: int = 0  # the output is one projected vector of this width per text; 0: one vector per token
    skipped: int = 0  # last layers that token vectors do not pass (1: the penultimate layer's output)
    final_norm: bool = True  # the token vectors go through the final LayerNorm
    pooled: int = 0  # width of a pooled vector in addition to the token vectors; 0: none


@dataclass(frozen=True)
class TokenSpec:
    """Shape of a transformer over tokens of text (BERT's) or of boxes (Rombach et al. 2021, appendix E.2)."""

    vocabulary: int
    width: int
    layers: int  # one layer is attention and feed-forward
    tokens: int
    heads: int = 8
    head_width: int = 64  # of every head, whatever the width
    objects: int = 0  # most boxes of a layout, see models.conditioning.boxes; 0: the tokens are text


@dataclass(frozen=True)
class ClassSpec:
    """A table of class embeddings."""

    classes: int  # the null class included, if there is one
    width: int
    null: int | None = None  # the null class, which is the last; None: no guidance


@dataclass(frozen=True)
class SegmentationSpec:
    """A segmentation map, as concat channels."""

    classes: int
    channels: int
    halvings: int = 2  # how often the map is halved, down to the latent's size


Condition = TokenSpec | ClassSpec | SegmentationSpec
CONDITIONS = {kind.__name__: kind for kind in (TokenSpec, ClassSpec, SegmentationSpec)}


@dataclass(frozen=True)
class Masking:
    """How a UNet with mask channels takes the mask and the masked image.

    The defaults are those of Stable Diffusion's inpainting models.
    """

    mask_first: bool = True  # the mask is the channel before the masked image's latent, else after it
    unmasked_value: float = 0.0  # of the mask where the image is kept; it is 1 where the image is repainted
    masked_pixel: float = 0.0  # what masked pixels are set to before encoding, of [-1, 1]
    nearest: bool = False  # a cell takes the mask of one pixel; else it is masked if any of its pixels is


@dataclass(frozen=True)
class UpscalingSpec:
    """How a low-resolution image conditions an upscaler: as concat channels, one pixel per latent cell."""

    # Schedule of the noise that is added to the low-resolution image. A noise level is a timestep of this
    # schedule and an input of the UNet (Ho et al. 2022). None: no noise is added.
    noise: ScheduleSpec | None = None
    max_noise_level: int = 0
    # The UNet denoises the large image's latent minus that of the small image resampled to the full size;
    # the subtracted latent is a part of the concat channels (Li et al. 2022 do so with pixels).
    residual: bool = False
    # At noise level 0 no noise is added, and the enlarged image is corrected so that it, shrunk again, is
    # about the small one, and as smooth where that is smooth: see follow_low_resolution() in
    # models/enlargement.py.
    back_projection: bool = False


@dataclass(frozen=True)
class Defaults:
    """Values of the fields that a request leaves out."""

    width: int = 512
    height: int = 512
    steps: int = 25
    guidance_scale: float = 7.5
    sampler: str = "ddim"
    eta: float = 0.0
    noise_level: int = 0  # of upscaling
    spacing: Spacing | None = None  # of the default sampler; None: see samplers.default_spacing()


@dataclass(frozen=True)
class FewStep:
    """How a model or a LoRA that was distilled to few steps is usually run."""

    kind: str
    steps: int
    guidance_scale: float
    sampler: str
    spacing: Spacing | None = None  # None: the sampler's own
    eta: float = 0.0
    first_timestep: int | None = None  # of a model for one step at another timestep than the last


NEIGHBOURS = "neighbours"  # the reference adapter of models that take images beside the prompt


class ControlOption(NamedTuple):
    """A control that requests can use with a model.

    kind: such as "ControlNet"; types: the control types of a network for several, of which every use names
    one; inpainting: its image is the input image, with the mask marked in it; every_step: its network runs
    at every step, not once; conditional_only: it acts on conditional predictions alone.
    """

    name: str
    kind: str
    types: tuple[str, ...] = ()
    inpainting: bool = False
    every_step: bool = True
    conditional_only: bool = False

    def needs_mask(self, type_: str | None) -> bool:
        """Whether a use with this control type works with a mask alone."""
        return self.inpainting or type_ == "inpaint"


def as_tuples(value: Any) -> Any:
    """A value with tuples in place of lists, which messages between processes have."""
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class ModelSpec:
    """One servable latent diffusion model.

    tasks: the tasks that it supports. A UNet without mask channels inpaints by blending latents: after each
    step the given image is restored outside the mask (models.sampling.step.blend_unmasked). labels: names of
    classes, boxes and regions, by index.
    """

    name: str
    unet: UNetSpec | None  # None: an autoencoder alone
    autoencoder: AutoencoderSpec
    schedule: ScheduleSpec
    texts: tuple[TextSpec, ...]  # CLIP text encoders; their widths add up to the context's
    defaults: Defaults = field(default_factory=Defaults)
    tasks: tuple[str, ...] = ALL_TASKS[:3]
    upscaling: UpscalingSpec | None = None  # an upscaler, which enlarges by the autoencoder's factor
    mask_channels: bool = False  # the UNet takes a mask and the masked image's latent as concat channels
    masking: Masking = Masking()  # the form of these channels
    edits: bool = False  # the UNet takes the latent of an image to edit as concat channels (InstructPix2Pix)
    layout_channels: int = 0  # concat channels of the layout, which follow the mask channels
    labels: tuple[str, ...] = ()
    condition: Condition | None = None  # shape of a conditioner other than CLIP
    zero_null: bool = False  # an empty negative prompt has a context of zeros
    # SDXL's refiner: the second text encoder alone, and an aesthetic score in place of the target size.
    aesthetic_score: bool = False
    loras: tuple[str, ...] = ()  # names of the LoRAs that requests can use
    lora_warnings: tuple[str, ...] = ()  # for each of them: what of its file the model ignores, or ""
    lora_settings: tuple[FewStep | None, ...] = ()  # for each of them: its usual settings, if it is few-step
    tiny_decoder: bool = False  # a tiny VAE was given, which decodes the model's latents too
    embeddings: tuple[str, ...] = ()  # names of textual inversion embeddings: words that prompts can use
    controls: tuple[ControlOption, ...] = ()  # ControlNets and T2I-Adapters that requests can use
    reference_adapters: tuple[str, ...] = ()  # names of the IP-Adapters that requests can use
    few_step: FewStep | None = None  # usual settings of a model that was distilled to few steps

    @property
    def unet_spec(self) -> UNetSpec:
        """The UNet's shape. Raises ValueError for an autoencoder alone."""
        if self.unet is None:
            raise ValueError(f"{self.name} is an autoencoder alone and has no UNet")
        return self.unet

    @property
    def concat_channels(self) -> int:
        """Channels that the UNet takes after those of z."""
        masked = self.mask_channels * (1 + self.autoencoder.latent_channels)
        low = self.autoencoder.image_channels if self.upscaling else 0
        resampled = self.autoencoder.latent_channels if self.upscaling and self.upscaling.residual else 0
        edited = self.autoencoder.latent_channels if self.edits else 0
        return masked + self.layout_channels + low + resampled + edited

    @property
    def context_shape(self) -> tuple[int, int] | None:
        """(L, C) of the UNet's context; None where it takes none."""
        if self.texts:
            return (1 if self.texts[0].projection else self.texts[0].tokens), self.unet_spec.context_width
        if isinstance(self.condition, TokenSpec):
            return self.condition.tokens, self.condition.width
        return (1, self.condition.width) if isinstance(self.condition, ClassSpec) else None

    @property
    def takes_neighbours(self) -> bool:
        """Whether its context may have vectors of images beside the prompt's (retrieval-augmented models)."""
        return bool(self.texts and self.texts[0].projection)

    @property
    def lacks_text_encoder(self) -> bool:
        """Whether the UNet takes a context but no conditioner is known: a text encoder is missing."""
        return bool(self.unet and self.unet.context_width and not (self.texts or self.condition))

    @property
    def reads_prompts(self) -> bool:
        """Whether the model is conditioned on text."""
        return bool(self.texts) or self.uses_bert_tokens

    @property
    def max_clip_skip(self) -> int:
        """Largest clip_skip of a prompt: at least one layer of every text encoder remains; 1: none."""
        if not self.texts or any(text.projection for text in self.texts):
            return 1
        return max(1, min(text.layers - text.skipped for text in self.texts) - 1)

    @property
    def uses_bert_tokens(self) -> bool:
        """Whether prompts are tokenized with BERT's vocabulary, which is not in the model's file."""
        return isinstance(self.condition, TokenSpec) and not self.condition.objects

    @property
    def guided(self) -> bool:
        """Whether the model supports classifier-free guidance: it has a null condition."""
        return self.reads_prompts or (
            isinstance(self.condition, ClassSpec) and self.condition.null is not None
        )

    @property
    def encoder_numbers(self) -> tuple[int, ...]:
        """Which of SDXL's two text encoders each text encoder is; an only one is the first."""
        return (1,) if self.aesthetic_score else tuple(range(len(self.texts)))

    @property
    def size_numbers(self) -> int:
        """How many numbers of size, crop and aesthetic score are embedded, by UNets with a size_width."""
        return 5 if self.aesthetic_score else 6

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the UNet: one row an image, and no negative prompt."""
        return bool(self.unet and self.unet.guidance_width)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Fields of a request that condition the model; the first is the main one."""
        if isinstance(self.condition, ClassSpec):
            return ("class_label",)
        if self.labels_pixels:
            return ("segmentation",)
        if isinstance(self.condition, TokenSpec) and self.condition.objects:
            return ("boxes",)
        named = ("class_label",) if "class-to-image" in self.tasks and self.labels else ()
        placed = ("boxes", "segmentation") if self.layout_channels else ()
        return ("prompt",) * self.reads_prompts + named + placed

    @property
    def label_count(self) -> int:
        """How many labels there are, named or not."""
        if isinstance(self.condition, ClassSpec):
            return self.condition.classes - (self.condition.null is not None)
        if isinstance(self.condition, SegmentationSpec):
            return self.condition.classes
        if isinstance(self.condition, TokenSpec) and self.condition.objects:
            return self.condition.vocabulary - 1  # the last token means "no object"
        return len(self.labels)

    @property
    def labels_pixels(self) -> bool:
        """Whether a segmentation map must have the image's size and a label for every pixel."""
        return isinstance(self.condition, SegmentationSpec)

    @property
    def label_cell(self) -> int:
        """Side in pixels of one cell of a segmentation map."""
        halvings = self.condition.halvings if isinstance(self.condition, SegmentationSpec) else 0
        return self.autoencoder.factor >> halvings

    @property
    def size_multiple(self) -> int:
        """Image sides must be a multiple of this: the autoencoder's factor times the UNet's side_multiple."""
        return self.autoencoder.factor * (self.unet.side_multiple if self.unet else 1)

    @property
    def tile(self) -> int:
        """Side, in latent cells, of the tiles in which images are upscaled."""
        return self.defaults.width // self.autoencoder.factor

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, rows, columns) of the latent of a width x height image."""
        f = self.autoencoder.factor
        return (self.autoencoder.latent_channels, height // f, width // f)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for a message between processes."""
        kind = {} if self.condition is None else {"kind": type(self.condition).__name__}
        return asdict(self) | kind

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> ModelSpec:
        """The inverse of to_dict; lists become tuples again."""

        def build(kind: type, values: dict[str, Any] | None) -> Any:
            return values and kind(**{key: as_tuples(value) for key, value in values.items()})

        return cls(
            name=d["name"],
            unet=build(UNetSpec, d["unet"]),
            autoencoder=build(AutoencoderSpec, d["autoencoder"]),
            schedule=build(ScheduleSpec, d["schedule"]),
            texts=tuple(build(TextSpec, text) for text in d["texts"]),
            defaults=build(Defaults, d["defaults"]),
            tasks=tuple(d["tasks"]),
            mask_channels=d["mask_channels"],
            edits=d["edits"],
            masking=build(Masking, d["masking"]),
            layout_channels=d["layout_channels"],
            labels=tuple(d["labels"]),
            loras=tuple(d["loras"]),
            lora_warnings=tuple(d["lora_warnings"]),
            lora_settings=tuple(build(FewStep, each) for each in d["lora_settings"]),
            tiny_decoder=d["tiny_decoder"],
            embeddings=tuple(d["embeddings"]),
            controls=tuple(ControlOption(*as_tuples(control)) for control in d["controls"]),
            reference_adapters=tuple(d["reference_adapters"]),
            upscaling=d["upscaling"]
            and UpscalingSpec(**d["upscaling"] | {"noise": build(ScheduleSpec, d["upscaling"]["noise"])}),
            condition=build(CONDITIONS[d["kind"]], d["condition"]) if "kind" in d else None,
            zero_null=d["zero_null"],
            few_step=build(FewStep, d["few_step"]),
            aesthetic_score=d["aesthetic_score"],
        )
