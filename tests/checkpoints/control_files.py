"""Narrow ControlNets and T2I-Adapters with random weights, as folders of `diffusers` and as single files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, T2IAdapter, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoints.tiny import fill_randomly

HINT = (8, 8, 16, 16)
CONFIG_KEYS = (
    "in_channels",
    "down_block_types",
    "mid_block_type",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "attention_head_dim",
    "use_linear_projection",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)


def control_net(
    unet: UNet2DConditionModel, seed: int = 20, union: int = 0, **options: Any
) -> ControlNetModel | ControlNetUnionModel:
    """A random ControlNet for a UNet. union: kinds of control image of a ControlNet++."""
    made = {key: unet.config[key] for key in CONFIG_KEYS} | {"in_channels": unet.config["out_channels"]}
    made |= {"conditioning_embedding_out_channels": HINT} | options
    if union:
        width, _ = made["block_out_channels"][0], made.pop("mid_block_type")
        made |= {"num_control_type": union, "num_trans_channel": width, "num_proj_channel": width}
    network = (ControlNetUnionModel if union else ControlNetModel)(**made)
    fill_randomly(network, seed)
    return network.requires_grad_(False).eval()


def load_unet(model: Path) -> UNet2DConditionModel:
    """The UNet of a diffusers folder, float32."""
    return UNet2DConditionModel.from_pretrained(model / "unet", low_cpu_mem_usage=False).float().eval()


def write_control(folder: Path, model: Path, seed: int = 20, **options: Any) -> Path:
    """Write a random ControlNet for the model in a diffusers folder, as such a folder; returns its path."""
    control_net(load_unet(model), seed, **options).save_pretrained(folder)
    return folder


RES_PARTS = {
    ".norm1.": ".in_layers.0.",
    ".conv1.": ".in_layers.2.",
    ".time_emb_proj.": ".emb_layers.1.",
    ".norm2.": ".out_layers.0.",
    ".conv2.": ".out_layers.3.",
    ".conv_shortcut.": ".skip_connection.",
}
MODULES = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
    "controlnet_cond_embedding.conv_in.": "input_hint_block.0.",
    "controlnet_cond_embedding.conv_out.": "input_hint_block.14.",
    "controlnet_mid_block.": "middle_block_out.0.",
    **{f"controlnet_cond_embedding.blocks.{n}.": f"input_hint_block.{2 * n + 2}." for n in range(6)},
    **{f"controlnet_down_blocks.{n}.": f"zero_convs.{n}.0." for n in range(12)},
}


def published(network: ControlNetModel) -> dict[str, Tensor]:
    """A ControlNet's tensors under the names of CompVis."""
    per_level, modules = network.config["layers_per_block"] + 1, dict(MODULES)
    for level in range(len(network.config["block_out_channels"])):
        for block in range(per_level - 1):
            number = 1 + level * per_level + block
            modules[f"down_blocks.{level}.resnets.{block}."] = f"input_blocks.{number}.0."
            modules[f"down_blocks.{level}.attentions.{block}."] = f"input_blocks.{number}.1."
        modules[f"down_blocks.{level}.downsamplers.0.conv."] = f"input_blocks.{(level + 1) * per_level}.0.op."
    return {compvis_name(key, modules): value for key, value in network.state_dict().items()}


def compvis_name(key: str, modules: dict[str, str]) -> str:
    module = next(name for name in modules if key.startswith(name))
    name = modules[module] + key.removeprefix(module)
    for old, new in RES_PARTS.items() if ".resnets." in key else ():
        name = name.replace(old, new)
    return name


def write_single_file(file: Path, network: ControlNetModel, prefix: str = "") -> Path:
    """Write a ControlNet as one file of CompVis names: .safetensors, or a training checkpoint as .pth."""
    tensors = {prefix + key: value.contiguous() for key, value in published(network).items()}
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        others = {"model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.zeros(1000)}
        torch.save({"state_dict": tensors | others, "global_step": 9}, file)
    return file


def control_lora(
    network: ControlNetModel, unet: dict[str, Tensor], rank: int = 2
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A Control-LoRA, and the ControlNet that it gives with a UNet (native names): (file, whole weights)."""
    generator, file = torch.Generator().manual_seed(1), {"lora_controlnet": torch.zeros(0)}
    whole = {}
    for key, value in published(network).items():
        if key in unet and key.endswith(".weight") and value.dim() > 1:
            up = 0.1 * torch.randn(len(value), rank, *(1,) * (value.dim() - 2), generator=generator)
            down = torch.randn(rank, *value.shape[1:], generator=generator) / value[0].numel() ** 0.5
            module = key.removesuffix(".weight")
            file |= {f"{module}.up": up, f"{module}.down": down}
            whole[key] = unet[key] + (up.flatten(1) @ down.flatten(1)).reshape(value.shape)
        elif key in unet and key.startswith("time_embed"):
            whole[key] = unet[key]  # left out: it is the base model's
        else:
            file[key] = whole[key] = value
    return file, whole


def difference(network: ControlNetModel, unet: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ControlNet as differences from a UNet (native names), without its first tensor, which is equal."""
    tensors = {key: value - unet[key] if key in unet else value for key, value in published(network).items()}
    tensors.pop("time_embed.0.bias")
    return tensors | {"difference": torch.zeros(0)}


def t2i_adapter(unet: UNet2DConditionModel, light: bool = False, channels: int = 3) -> T2IAdapter:
    """A random T2I-Adapter for a UNet of SD's or SDXL's structure."""
    widths = list(unet.config["block_out_channels"])
    xl = unet.config["down_block_types"][0] == "DownBlock2D"
    widths = widths[:-1] if light else [*widths, widths[-1]] if xl else widths
    kind = "light_adapter" if light else "full_adapter_xl" if xl else "full_adapter"
    network = T2IAdapter(channels, widths, downscale_factor=16 if xl else 8, adapter_type=kind)
    fill_randomly(network, 40)
    return network.requires_grad_(False).eval()


def write_t2i_adapter(folder: Path, model: Path, **options: Any) -> Path:
    """Write a random T2I-Adapter for the model in a diffusers folder, as such a folder; returns its path."""
    t2i_adapter(load_unet(model), **options).save_pretrained(folder)
    return folder


def raw_t2i(network: T2IAdapter) -> dict[str, Tensor]:
    """A T2I-Adapter's tensors under the names of its first publication."""
    light, out = network.config["adapter_type"] == "light_adapter", {}
    for key, value in network.state_dict().items():
        parts = key.split(".")[1:]
        if not light and parts[0] == "body":
            block = int(parts[3]) if parts[2] == "resnets" else 0
            leaf = parts[4:] if parts[2] == "resnets" else parts[2:]
            parts = ["body", str(2 * int(parts[1]) + block), *leaf]
        out[".".join("body" if part == "resnets" else part for part in parts)] = value.contiguous()
    return out
