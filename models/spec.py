"""What a model is, as frozen values: network shapes, schedule, defaults and tasks.

Free of torch, so that a process that only checks requests can use it. Widths are absolute channel counts
per level, finest level first.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Prediction = Literal["epsilon", "v_prediction"]
Spacing = Literal["leading", "trailing", "linspace"]
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

    With a context every attention is a spatial transformer; without one (context_width 0) it is a plain block
    of self-attention, and a depth says only whether it is there.
    """

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]  # width of each level
    res_blocks: int  # residual blocks a level going down; one more going up
    transformer_depth: tuple[
        int, ...
    ]  # transformer blocks after each residual block of a level; 0: no attention
    middle_depth: int  # transformer blocks in the middle block
    heads: tuple[int, ...]  # attention heads of each level; the middle block uses the last
    context_width: int  # 0: the UNet takes no context
    groups: int = 32  # of every GroupNorm
    linear_projection: bool = (
        False  # transformer in/out projections: linear (SD 2.x) or 1x1 convolutions (SD 1.x)
    )
    residual_resampling: bool = False  # residual blocks go down and up, not lone convolutions
    scale_shift_norm: bool = False  # the timestep scales and shifts the second norm's output
    noise_levels: int = 0  # that it knows, each by an embedding added to the timestep's; 0: none
    # Levels whose transformers attend to the context twice, and not to themselves; () where none does.
    cross_only: tuple[bool, ...] = ()
    added_width: int = 0  # of one vector that is told beside the timestep: pooled text, then sizes; 0: none
    size_width: int = 0  # that each of six numbers of sizes takes up in it (Podell et al. 2023, section 2.2)

    @property
    def factor(self) -> int:
        """Latent sides must be a multiple of this."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class AutoencoderSpec:
    """Shape of an autoencoder, with a Gaussian latent (KL) or a codebook (VQ) (section 3.1)."""

    channels: tuple[int, ...]  # width of each level
    res_blocks: int  # residual blocks a level in E; one more in D
    latent_channels: int
    scale_factor: float  # the diffusion model sees scale_factor * E(x)
    picture_channels: int = 3
    groups: int = 32
    sample_size: int = 512  # picture side it was trained at
    patch_size: int = 1  # E folds squares of so many pixels a side into channels first, D unfolds them last
    codes: int = 0  # in the codebook of a VQ autoencoder; 0: KL
    inner_channels: int | None = None  # of what E's and D's own networks give and take; None: the latent's
    attention_levels: tuple[int, ...] = ()  # levels with attention after each residual block, 0 the finest
    middle_attention: bool = True
    upcast: bool = False  # float16 cannot hold what is inside D: it runs in bfloat16 or float32 instead

    @property
    def z_channels(self) -> int:
        """Channels between E's own network and the latent (the reference's name for them)."""
        return self.inner_channels or self.latent_channels

    @property
    def factor(self) -> int:
        """Pixels a latent cell covers along one side (f in the paper)."""
        return self.patch_size * 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class ScheduleSpec:
    """Noise schedule, and which quantity the UNet predicts."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    timesteps: int = 1000
    prediction: Prediction = "epsilon"
    spacing: Spacing = "leading"
    steps_offset: int = 1  # added to each timestep of the leading spacing
    final_alpha_one: bool = False  # the last step goes to alpha_bar = 1 rather than to alpha_bar[0]


@dataclass(frozen=True)
class TextSpec:
    """Shape of a CLIP text transformer (Radford et al. 2021)."""

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
    projection: int = 0  # width of the one vector that a text comes to; 0: one vector a token
    skipped: int = 0  # layers at the end that the vectors of the tokens do not go through
    final_norm: bool = True  # the vectors of the tokens go through the last norm
    pooled: int = 0  # width of one vector of the whole text beside those of its tokens; 0: none


@dataclass(frozen=True)
class TokenSpec:
    """Shape of a transformer over tokens: BERT's words, or boxes (Rombach et al. 2021, appendix E.2)."""

    vocabulary: int
    width: int
    layers: int  # attention and feed-forward each count for half of one
    tokens: int
    heads: int = 8
    head_width: int = 64  # of every head, whatever the width
    objects: int = 0  # boxes that its tokens can tell (models.boxes); 0: they are words


@dataclass(frozen=True)
class ClassSpec:
    """One learned vector a class."""

    classes: int  # the null class, if there is one, included
    width: int
    null: int | None = None  # the class that stands for none, the last; guidance compares with it


@dataclass(frozen=True)
class SegmentationSpec:
    """A map of classes, as channels beside the latent."""

    classes: int
    channels: int
    halvings: int = 2  # of the map's size, to the latent's


Condition = TokenSpec | ClassSpec | SegmentationSpec
CONDITIONS = {kind.__name__: kind for kind in (TokenSpec, ClassSpec, SegmentationSpec)}


@dataclass(frozen=True)
class Masking:
    """How a mask, and the picture that it hides parts of, are told to a UNet that takes both beside z.

    The defaults are those of Stable Diffusion's inpainting.
    """

    mask_first: bool = True  # before E(masked picture), else after it
    kept: float = 0.0  # what the mask is where the picture stays; 1 where it is painted anew
    hidden: float = 0.0  # what hidden pixels are shown as, of [-1, 1]
    nearest: bool = False  # a cell has the mask of one of its pixels; else it is painted where any of them is


@dataclass(frozen=True)
class UpscalingSpec:
    """How a low-resolution picture goes beside the latent: a pixel on each cell, with noise on it or not.

    The noise level is a timestep of a schedule of its own; the UNet is told which (Ho et al. 2022).
    """

    noise: ScheduleSpec | None = None  # None: the picture is taken as it is
    max_noise_level: int = 0
    # The latent is what E sees in the large picture less what it sees in the small one resampled, which is
    # told to the UNet too (Li et al. 2022 do so with pixels).
    residual: bool = False


@dataclass(frozen=True)
class Defaults:
    """What a request gets when it does not say."""

    width: int = 512
    height: int = 512
    steps: int = 25
    guidance_scale: float = 7.5
    sampler: str = "ddim"
    eta: float = 0.0
    noise_level: int = 0  # of upscaling


@dataclass(frozen=True)
class ModelSpec:
    """One servable latent diffusion model.

    tasks: what it can be asked for. A UNet that takes latents and nothing beside them inpaints by blending:
    after each step, what is known is put back where the mask keeps it (models.samplers.keep). labels: names
    that classes, boxes and regions are called by; label i is number i.
    """

    name: str
    unet: UNetSpec | None  # None: a first stage alone
    autoencoder: AutoencoderSpec
    schedule: ScheduleSpec
    texts: tuple[TextSpec, ...]  # of CLIP; the widths of several add up to the context's
    defaults: Defaults = field(default_factory=Defaults)
    tasks: tuple[str, ...] = ALL_TASKS[:3]
    upscaling: UpscalingSpec | None = None  # it enlarges a picture by the autoencoder's factor
    mask_channels: bool = False  # the UNet takes a mask and the latent of the masked picture after z
    masking: Masking = Masking()  # how, if it does
    layout_channels: int = 0  # that tell the UNet which label belongs where, after those
    labels: tuple[str, ...] = ()
    condition: Condition | None = None  # any other conditioner with weights of its own
    zero_null: bool = False  # guidance compares with a context of zeros where nothing is unwanted
    loras: tuple[str, ...] = ()  # names of the changes of its weights that requests can ask for
    embeddings: tuple[str, ...] = ()  # words of prompts that it has learned beside its own

    @property
    def beside(self) -> int:
        """Channels that the UNet takes beside z."""
        masked = self.mask_channels * (1 + self.autoencoder.latent_channels)
        low = self.autoencoder.picture_channels if self.upscaling else 0
        resampled = self.autoencoder.latent_channels if self.upscaling and self.upscaling.residual else 0
        return masked + self.layout_channels + low + resampled

    @property
    def context_shape(self) -> tuple[int, int] | None:
        """(L, C) of the context that the UNet is given; None where it is given none."""
        if self.texts:
            return (1 if self.texts[0].projection else self.texts[0].tokens), self.unet.context_width
        if isinstance(self.condition, TokenSpec):
            return self.condition.tokens, self.condition.width
        return (1, self.condition.width) if isinstance(self.condition, ClassSpec) else None

    @property
    def lacks_context(self) -> bool:
        """Whether its UNet expects a context and nothing makes one: its text encoder lies elsewhere."""
        return bool(self.unet and self.unet.context_width and not (self.texts or self.condition))

    @property
    def reads_prompts(self) -> bool:
        """Whether words tell it anything."""
        return bool(self.texts) or self.reads_words

    @property
    def reads_words(self) -> bool:
        """Whether prompts are told in BERT's words, which its file does not hold."""
        return isinstance(self.condition, TokenSpec) and not self.condition.objects

    @property
    def guided(self) -> bool:
        """Whether it knows a null condition, which guidance compares with."""
        return self.reads_prompts or (
            isinstance(self.condition, ClassSpec) and self.condition.null is not None
        )

    @property
    def inputs(self) -> tuple[str, ...]:
        """What tells it what to make, by the names of a request's fields."""
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
        """Labels that there are, whether they have names or are numbers alone."""
        if isinstance(self.condition, ClassSpec):
            return self.condition.classes - (self.condition.null is not None)
        if isinstance(self.condition, SegmentationSpec):
            return self.condition.classes
        if isinstance(self.condition, TokenSpec) and self.condition.objects:
            return self.condition.vocabulary - 1  # the last token stands for no object
        return len(self.labels)

    @property
    def labels_pixels(self) -> bool:
        """Whether maps of labels are of the picture's own size, and leave no pixel without a label."""
        return isinstance(self.condition, SegmentationSpec)

    @property
    def label_cell(self) -> int:
        """Pixels along a side of what has one label in a map of labels."""
        halvings = self.condition.halvings if self.labels_pixels else 0
        return self.autoencoder.factor // 2**halvings

    @property
    def size_multiple(self) -> int:
        """Picture sides must be a multiple of this: the autoencoder's factor times the UNet's."""
        return self.autoencoder.factor * (self.unet.factor if self.unet else 1)

    @property
    def tile(self) -> int:
        """Cells of a side of the tiles in which pictures are enlarged."""
        return self.defaults.width // self.autoencoder.factor

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, rows, columns) of the latent of a width x height picture."""
        f = self.autoencoder.factor
        return (self.autoencoder.latent_channels, height // f, width // f)

    def to_dict(self) -> dict[str, Any]:
        """As plain containers, for a message between processes."""
        kind = {} if self.condition is None else {"kind": type(self.condition).__name__}
        return asdict(self) | kind

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> ModelSpec:
        """The inverse of to_dict; lists become tuples again."""

        def build(kind: type, values: dict[str, Any] | None) -> Any:
            return values and kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

        return cls(
            name=d["name"],
            unet=build(UNetSpec, d["unet"]),
            autoencoder=build(AutoencoderSpec, d["autoencoder"]),
            schedule=build(ScheduleSpec, d["schedule"]),
            texts=tuple(build(TextSpec, text) for text in d["texts"]),
            defaults=build(Defaults, d["defaults"]),
            tasks=tuple(d["tasks"]),
            mask_channels=d["mask_channels"],
            masking=build(Masking, d["masking"]),
            layout_channels=d["layout_channels"],
            labels=tuple(d["labels"]),
            loras=tuple(d["loras"]),
            embeddings=tuple(d["embeddings"]),
            upscaling=d["upscaling"]
            and UpscalingSpec(**d["upscaling"] | {"noise": build(ScheduleSpec, d["upscaling"]["noise"])}),
            condition=build(CONDITIONS[d["kind"]], d["condition"]) if "kind" in d else None,
            zero_null=d["zero_null"],
        )
