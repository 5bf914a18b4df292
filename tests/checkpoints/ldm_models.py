"""The latent diffusion paper's models with random weights, at their published width or narrow.

Shapes are those of the configurations that were published with the checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from models.networks.autoencoder import Autoencoder
from models.spec import AutoencoderSpec, ClassSpec, Condition, SegmentationSpec, TokenSpec, UNetSpec
from tests.checkpoints.ldm_files import published
from tests.checkpoints.tiny import byte_tokenizer, fill_randomly

# Of narrow models:
NARROW = 32  # channels of the finest level of UNets and autoencoders
CONTEXT = 16  # width of the context
LAYERS = 2  # of the token transformer


def first_stage(mult: tuple[int, ...], latent: int, codes: int = 0, **options) -> AutoencoderSpec:
    """An autoencoder with 128 channels at the finest level, for images of 256x256."""
    return AutoencoderSpec(
        channels=tuple(128 * m for m in mult), res_blocks=2, latent_channels=latent, scale_factor=1.0,
        sample_size=256, codes=codes, **options,
    )  # fmt: skip


FIRST_STAGES = {
    "kl-f4": first_stage((1, 2, 4), 3),
    "kl-f8": first_stage((1, 2, 4, 4), 4),
    "kl-f16": first_stage((1, 1, 2, 2, 4), 16, attention_levels=(4,)),
    "kl-f32": first_stage((1, 1, 2, 2, 4, 4), 64, attention_levels=(4, 5)),
    "vq-f4": first_stage((1, 2, 4), 3, 8192),
    "vq-f4-noattn": first_stage((1, 2, 4), 3, 8192, middle_attention=False),
    "vq-f8": first_stage((1, 2, 2, 4), 4, 16384, attention_levels=(3,)),
    "vq-f8-n256": first_stage((1, 2, 2, 4), 4, 256, attention_levels=(3,)),
    "vq-f16": first_stage((1, 1, 2, 2, 4), 8, 16384, attention_levels=(4,)),
}


@dataclass(frozen=True)
class Published:
    """The shape of a published model."""

    channels: int  # of the UNet's finest level
    mult: tuple[int, ...]
    attends: tuple[int, ...]  # downsampling factors of the levels with attention
    first_stage: str
    beta_end: float
    heads: int | None = None  # at every level; None: heads of 32 channels
    concat: int = 0  # channels that the UNet takes after the latent
    context: int = 0
    depth: int = 1
    options: tuple[str, ...] = ()  # fields of UNetSpec that are True
    condition: Condition | None = None
    side: int = 256  # of images, in pixels


BERT = TokenSpec(vocabulary=30522, width=640, layers=32, tokens=77)
BOXES = TokenSpec(vocabulary=8192, width=512, layers=16, tokens=92, objects=30)
LEVELS = (1, 2, 3, 4)
ROWS = {
    "celebahq": Published(224, LEVELS, (8, 4, 2), "vq-f4", 0.0195),
    "lsun_churches": Published(
        192, (1, 2, 2, 4, 4), (1, 2, 4, 8), "kl-f8", 0.0155, heads=8,
        options=("residual_resampling", "scale_shift_norm"),
    ),
    "cin256": Published(
        256, (1, 2, 4), (4, 2, 1), "vq-f8", 0.0195, context=512, condition=ClassSpec(1000, 512)
    ),
    "cin256-v2": Published(
        192, (1, 2, 3, 5), (8, 4, 2), "vq-f4", 0.0195, heads=1, context=512,
        condition=ClassSpec(1001, 512, null=1000),
    ),
    "text2img256": Published(
        192, (1, 2, 3, 5), (8, 4, 2), "vq-f4", 0.0195, context=640, condition=BERT
    ),
    "txt2img-1p4B": Published(
        320, (1, 2, 4, 4), (4, 2, 1), "kl-f8", 0.012, heads=8, context=1280,
        condition=replace(BERT, width=1280),
    ),
    "inpainting_big": Published(
        256, LEVELS, (8, 4, 2), "vq-f4-noattn", 0.0205, heads=8, concat=4, options=("residual_resampling",),
        side=512,
    ),
    "bsr_sr": Published(160, (1, 2, 2, 4), (16, 8), "vq-f4", 0.0155, concat=3),
    "layout2img": Published(
        128, LEVELS, (8, 4, 2), "vq-f4", 0.0205, context=512, depth=3, condition=BOXES
    ),
    "semantic_synthesis": Published(
        128, (1, 4, 8), (32, 16, 8), "vq-f4", 0.0205, heads=8, concat=3, condition=SegmentationSpec(182, 3)
    ),
    "rdm768": Published(448, LEVELS, (4, 2, 1), "kl-f16", 0.015, context=768, side=768),
}  # fmt: skip
SCALES = {
    "txt2img-1p4B": 0.18215,
    "rdm768": 0.22765929,
    "lsun_churches": 0.25,
}  # scale factors that are not 1


def shapes(name: str, narrow: bool) -> tuple[UNetSpec, AutoencoderSpec, Condition | None, float]:
    """Shapes of UNet, autoencoder and conditioner, and the last beta, of a model."""
    row = ROWS[name]
    base = NARROW if narrow else row.channels
    channels = tuple(base * m for m in row.mult)
    stage = FIRST_STAGES[row.first_stage]
    unet = UNetSpec(
        in_channels=stage.latent_channels + row.concat,
        out_channels=stage.latent_channels,
        channels=channels,
        res_blocks=2,
        transformer_depth=tuple(
            row.depth * (2**level in row.attends) for level in range(len(row.mult))
        ),
        middle_depth=row.depth,
        heads=tuple(row.heads or width // 32 for width in channels),
        context_width=CONTEXT if narrow and row.context else row.context,
        **dict.fromkeys(row.options, True),
    )  # fmt: skip
    condition = slim(row.condition) if narrow else row.condition
    stage = replace(stage, scale_factor=SCALES.get(name, 1.0), sample_size=row.side)
    return unet, thin(stage) if narrow else stage, condition, row.beta_end


def thin(stage: AutoencoderSpec) -> AutoencoderSpec:
    return replace(stage, channels=tuple(NARROW * width // 128 for width in stage.channels))


def slim(condition: Condition | None) -> Condition | None:
    if isinstance(condition, TokenSpec):
        return replace(condition, width=CONTEXT, layers=LAYERS)
    return replace(condition, width=CONTEXT) if isinstance(condition, ClassSpec) else condition


def write(folder: Path, name: str, narrow: bool = True) -> Path:
    """Write a model as a single file with random weights, and the other files that it needs."""
    file = folder / f"{name}.safetensors"
    if name in FIRST_STAGES:
        stage = Autoencoder(thin(FIRST_STAGES[name]) if narrow else FIRST_STAGES[name])
        fill_randomly(stage, 3)
        save_file(stage.state_dict(), file)
        return file
    save_file(published(name, shapes(name, narrow), narrow), file)
    if isinstance(ROWS[name].condition, TokenSpec) and not ROWS[name].condition.objects:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "apple", "blue"]
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    if name == "rdm768":
        write_text_encoder(folder, narrow)
    return file


def write_text_encoder(folder: Path, narrow: bool) -> None:
    """Write CLIP's text encoder with its projection by `transformers`, and a tokenizer of bytes."""
    tokenizer = byte_tokenizer()
    full = {"vocab_size": 49408, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
            "intermediate_size": 3072, "projection_dim": 768}  # fmt: skip
    small = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 4, "intermediate_size": 64, "projection_dim": CONTEXT}  # fmt: skip
    network = CLIPTextModelWithProjection(
        CLIPTextConfig(
            **(small if narrow else full), bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    fill_randomly(network, 5)
    network.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
