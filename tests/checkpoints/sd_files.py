"""Stable Diffusion's models as single files, written from random networks of `diffusers` and `transformers`.

They have their published width or are narrow. Key names come from tables in this module, not from the code
under test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.checkpoints.hollow import write_hollow
from tests.checkpoints.tiny import fill_randomly

TOKENS, VOCABULARY = 77, 49408
PAD = 0  # padding token of OpenCLIP's encoders; the others pad with the end token


@dataclass(frozen=True)
class Text:
    """A text encoder, and the prefix of its tensors."""

    width: int
    layers: int
    prefix: str
    open_clip: bool = False  # OpenCLIP: other key names, activation and padding

    @property
    def heads(self) -> int:
        return self.width // 64


@dataclass(frozen=True)
class Row:
    """The shape of a model."""

    channels: tuple[int, ...]
    attends: tuple[int, ...]  # of each level: transformer blocks after each residual block
    heads: int | None  # at every level; None: heads of 64 channels
    texts: tuple[Text, ...]
    in_channels: int = 4
    linear: bool = False
    crosses_only: tuple[bool, ...] = ()  # levels where both attentions of a block are cross-attention
    noise_levels: int = 0
    size_width: int = 0  # embedding width of each of SDXL's sizes; 0: not conditioned on sizes
    numbers: tuple[float, ...] = (96, 64, 0, 0, 96, 64)  # that an image of 64x96 is conditioned on
    factor: int = 8  # f of the autoencoder
    stage: int = 128  # channels of the autoencoder's finest level


CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."
CLIP_L = Text(768, 12, CLIP)
CLIP_H = Text(1024, 24, OPEN_CLIP, open_clip=True)
XL = (
    Text(768, 12, "conditioner.embedders.0.transformer."),
    Text(1280, 32, "conditioner.embedders.1.model.", open_clip=True),
)
SD_1 = Row((320, 640, 1280, 1280), (1, 1, 1, 0), 8, (CLIP_L,))
SD_2 = replace(SD_1, heads=None, texts=(CLIP_H,), linear=True)
UPSCALER = Row(
    (256, 512, 512, 1024), (0, 1, 1, 1), 8, (CLIP_H,), in_channels=7, linear=True,
    crosses_only=(True, True, True, False), noise_levels=1000, factor=4,
)  # fmt: skip
XL_REFINER = Text(1280, 32, "conditioner.embedders.0.model.", open_clip=True)
SDXL = Row((320, 640, 1280), (0, 2, 10), None, XL, linear=True, size_width=256)
ROWS = {
    "sd1": SD_1,
    "sd1-inpainting": replace(SD_1, in_channels=9),
    "sd1-pix2pix": replace(SD_1, in_channels=8),
    "sd2": SD_2,
    "sd2-inpainting": replace(SD_2, in_channels=9),
    "sd-x4": UPSCALER,
    "sdxl": SDXL,
    "sdxl-inpainting": replace(SDXL, in_channels=9),
    "sdxl-refiner": Row(
        (384, 768, 1536, 1536),
        (0, 4, 4, 0),
        None,
        (XL_REFINER,),
        linear=True,
        size_width=256,
        numbers=(96, 64, 0, 0, 6),
    ),
}
NARROW = {
    384: 1,
    768: 1,
    1536: 2,
    320: 1,
    640: 1,
    1280: 2,
    256: 1,
    512: 2,
    1024: 2,
}  # channels -> narrow ones, in units of 64 or 32


def narrow(row: Row) -> Row:
    """The same structure with few channels and layers; SDXL's depths 0, 2, 10 become 0, 2, 3."""
    return replace(
        row,
        channels=tuple(NARROW[width] * (32 if row.heads else 64) for width in row.channels),
        attends=tuple(min(depth, 3) for depth in row.attends),
        texts=tuple(replace(text, width=128, layers=3) for text in row.texts),
        size_width=min(row.size_width, 8),
        stage=32,
    )


class Reference(NamedTuple):
    """The networks that a file was written from."""

    unet: UNet2DConditionModel
    autoencoder: AutoencoderKL
    texts: tuple[CLIPTextModel | CLIPTextModelWithProjection, ...]

    def context(self, row: Row, ids: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The context, and SDXL's pooled text. ids: one (B, 77) per encoder."""
        outs = [
            text(input_ids=one, output_hidden_states=True) for text, one in zip(self.texts, ids, strict=True)
        ]
        if row.size_width:  # SDXL: penultimate layers, without the final norm
            return torch.cat([out.hidden_states[-2] for out in outs], dim=-1), outs[-1].text_embeds
        if not row.texts[0].open_clip:
            return outs[0].last_hidden_state, None
        inner = getattr(self.texts[0], "text_model", self.texts[0])
        return inner.final_layer_norm(outs[0].hidden_states[-2]), None


def random(network: nn.Module, seed: int) -> nn.Module:
    fill_randomly(network, seed)
    return network.requires_grad_(False).eval()


def make_unet(row: Row) -> UNet2DConditionModel:
    heads = row.heads or tuple(width // 64 for width in row.channels)
    context = sum(text.width for text in row.texts)
    options = {"only_cross_attention": list(row.crosses_only)} if row.crosses_only else {}
    if row.noise_levels:
        options["num_class_embeds"] = row.noise_levels
    if row.size_width:
        options |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": row.size_width,
            "projection_class_embeddings_input_dim": row.texts[-1].width + len(row.numbers) * row.size_width,
        }
    return UNet2DConditionModel(
        in_channels=row.in_channels, out_channels=4, block_out_channels=row.channels, layers_per_block=2,
        down_block_types=["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in row.attends],
        up_block_types=["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in row.attends[::-1]],
        transformer_layers_per_block=[depth or max(row.attends) for depth in row.attends],
        cross_attention_dim=context, attention_head_dim=heads, use_linear_projection=row.linear, **options,
    )  # fmt: skip


def make_autoencoder(row: Row) -> AutoencoderKL:
    mult = (1, 2, 4, 4) if row.factor == 8 else (1, 2, 4)
    return AutoencoderKL(
        block_out_channels=[row.stage * m for m in mult], layers_per_block=2, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * len(mult), up_block_types=["UpDecoderBlock2D"] * len(mult),
    )  # fmt: skip


def make_text(text: Text) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=text.width, intermediate_size=4 * text.width,
        num_hidden_layers=text.layers, num_attention_heads=text.heads, max_position_embeddings=TOKENS,
        hidden_act="gelu" if text.open_clip else "quick_gelu", projection_dim=text.width,
        eos_token_id=49407, bos_token_id=49406, pad_token_id=PAD if text.open_clip else 49407,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if text.open_clip else CLIPTextModel)(config)


def bare(make: Callable[[], nn.Module]) -> nn.Module:
    """A network on the meta device, which takes no memory."""
    with torch.device("meta"):
        return make()


def outline(row: Row) -> Reference:
    """Networks of this shape on the meta device, which take no memory."""
    texts = tuple(bare(partial(make_text, text)) for text in row.texts)
    return Reference(bare(partial(make_unet, row)), bare(partial(make_autoencoder, row)), texts)


def reference(row: Row) -> Reference:
    """Random networks of this shape."""
    texts = tuple(random(make_text(text), 3 + index) for index, text in enumerate(row.texts))
    return Reference(random(make_unet(row), 1), random(make_autoencoder(row), 2), texts)


UNET_PARTS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RES_PARTS = {
    ".norm1.": ".in_layers.0.",
    ".conv1.": ".in_layers.2.",
    ".time_emb_proj.": ".emb_layers.1.",
    ".norm2.": ".out_layers.0.",
    ".conv2.": ".out_layers.3.",
    ".conv_shortcut.": ".skip_connection.",
}
STAGE_PARTS = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.group_norm.": "mid.attn_1.norm.",
    "mid_block.attentions.0.to_q.": "mid.attn_1.q.",
    "mid_block.attentions.0.to_k.": "mid.attn_1.k.",
    "mid_block.attentions.0.to_v.": "mid.attn_1.v.",
    "mid_block.attentions.0.to_out.0.": "mid.attn_1.proj_out.",
    "conv_norm_out.": "norm_out.",
    ".conv_shortcut.": ".nin_shortcut.",
    ".resnets.": ".block.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    "down_blocks.": "down.",
}
OPEN_CLIP_PARTS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers.": "transformer.resblocks.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    "final_layer_norm.": "ln_final.",
}


def replaced(key: str, parts: Mapping[str, str]) -> str:
    for old, new in parts.items():
        key = key.replace(old, new)
    return key


def unet_names(row: Row) -> Iterator[tuple[str, str]]:
    """(module of `diffusers`' UNet, its name in the file) for every module."""
    yield from UNET_PARTS.items()
    last, number = len(row.channels) - 1, 1
    for level in range(last + 1):
        for block in range(2):
            yield f"down_blocks.{level}.resnets.{block}", f"input_blocks.{number}.0"
            yield f"down_blocks.{level}.attentions.{block}", f"input_blocks.{number}.1"
            number += 1
        if level < last:
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for place, depth in enumerate(row.attends[::-1]):
        for block in range(3):
            yield f"up_blocks.{place}.resnets.{block}", f"output_blocks.{number}.0"
            yield f"up_blocks.{place}.attentions.{block}", f"output_blocks.{number}.1"
            if block == 2 and place < last:
                up = f"output_blocks.{number}.{2 if depth else 1}.conv"
                yield f"up_blocks.{place}.upsamplers.0.conv", up
            number += 1


def unet_tensors(row: Row, unet: nn.Module) -> dict[str, Tensor]:
    names, out = dict(unet_names(row)), {}
    for key, value in unet.state_dict().items():
        module = next(m for m in sorted(names, key=len, reverse=True) if key.startswith(m + "."))
        out[replaced(names[module] + key[len(module) :], RES_PARTS if ".resnets." in key else {})] = value
    return out


def stage_tensors(row: Row, autoencoder: nn.Module) -> dict[str, Tensor]:
    out, last = {}, 3 if row.factor == 8 else 2
    ups = {f"decoder.up_blocks.{index}.": f"decoder.up.{last - index}." for index in range(last + 1)}
    for key, value in autoencoder.state_dict().items():
        is_matrix = ".attentions." in key and value.dim() == 2
        out[replaced(key, ups | STAGE_PARTS)] = value[:, :, None, None].clone() if is_matrix else value
    return out


def text_tensors(text: Text, network: nn.Module) -> dict[str, Tensor]:
    held = {key.removeprefix("text_model."): value for key, value in network.state_dict().items()}
    if not text.open_clip:
        held = {f"text_model.{key}": value for key, value in held.items()}
        return held | {"text_model.embeddings.position_ids": torch.arange(TOKENS)[None]}
    out = {"text_projection": held.pop("text_projection.weight").T.contiguous()}
    out |= {"logit_scale": torch.tensor(4.6)}
    for layer in range(text.layers):
        for leaf in ("weight", "bias"):
            parts = [held.pop(f"encoder.layers.{layer}.self_attn.{x}_proj.{leaf}") for x in "qkv"]
            out[f"transformer.resblocks.{layer}.attn.in_proj_{leaf}"] = torch.cat(parts)
    return out | {replaced(key, OPEN_CLIP_PARTS): value for key, value in held.items()}


def betas(start: float, end: float) -> Tensor:
    return torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64).square().float()


def tables(name: str) -> dict[str, Tensor]:
    """Schedule tables, which all files but SDXL's contain."""
    if name.startswith("sdxl"):
        return {}
    ends = (0.0001, 0.02) if name == "sd-x4" else (0.00085, 0.012)
    names = ("betas", "alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "posterior_mean_coef2")
    out = {key: betas(*ends) for key in names}
    if name == "sd-x4":
        out |= {f"low_scale_model.{key}": betas(0.0001, 0.02) for key in names[:3]}
    return out


def published(name: str, row: Row, networks: Reference, averaged: bool = False) -> dict[str, Tensor]:
    """The tensors of a file. averaged: the UNet is stored as averaged weights, its last weights are zeros."""
    out, unet = tables(name), unet_tensors(row, networks.unet)
    if averaged:
        out |= {"model_ema.diffusion_model" + key.replace(".", ""): value for key, value in unet.items()}
        out |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(9)}
        unet = {key: torch.zeros_like(value) for key, value in unet.items()}
    out |= {f"model.diffusion_model.{key}": value for key, value in unet.items()}
    stage = stage_tensors(row, networks.autoencoder)
    out |= {f"first_stage_model.{key}": value for key, value in stage.items()}
    for text, network in zip(row.texts, networks.texts, strict=True):
        out |= {text.prefix + key: value for key, value in text_tensors(text, network).items()}
    return out


def hollow(file: Path, tensors: Mapping[str, Tensor], words: Mapping[str, str] | None = None) -> Path:
    """A safetensors file with the names and shapes of these tensors, all float32 zeros. words: metadata."""
    return write_hollow(file, {key: value.shape for key, value in tensors.items()}, words)


def write(folder: Path, name: str, row: Row, networks: Reference, form: str = "safetensors") -> Path:
    """Write a model as a single file in float32. form: safetensors or ckpt."""
    file, tensors = folder / f"{name}.{form}", published(name, row, networks)
    torch.save({"state_dict": tensors, "global_step": 9}, file) if form == "ckpt" else save_file(
        tensors, file
    )
    return file


def write_downloaded(folder: Path, files: Mapping[str, Path]) -> dict[str, Path]:
    """Files as people find them, from those of write().

    A VAE, a model without one, a model with other averages, and a model in half precision that predicts v,
    has zero terminal SNR and the projection of a linear layer.
    """
    first, xl = load_file(files["sd1"]), load_file(files["sdxl"])
    stage, unet = "first_stage_model.", "model.diffusion_model."
    names = {key: "model_ema." + key.removeprefix("model.").replace(".", "") for key in first if unet in key}
    projection = "conditioner.embedders.1.model.text_projection"
    xl[projection + ".weight"] = xl.pop(projection).T
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0), "global_step": torch.tensor(9)}
    made = {
        "vae": {key.removeprefix(stage): value for key, value in first.items() if stage in key},
        "sd1-no-vae": {key: value for key, value in first.items() if stage not in key},
        "sd1-averages": first | {name: torch.zeros_like(first[key]) for key, name in names.items()},
        "sdxl-v": {key: value.half().contiguous() for key, value in xl.items()} | marks,
    }
    for name, tensors in made.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in made}
