"""Narrow IP-Adapters with random weights under their published names, and CLIP image encoders."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.checkpoints.tiny import fill_randomly

Tensors = dict[str, Tensor]


def image_encoder(projection: int = 24) -> CLIPVisionModelWithProjection:
    """A random image encoder: images of 28 pixels in patches of 7; projection: width of its vectors."""
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28,
        patch_size=7, projection_dim=projection, hidden_act="gelu",
    )  # fmt: skip
    network = CLIPVisionModelWithProjection(config)
    fill_randomly(network, 50)
    return network.requires_grad_(False).eval()


def write_image_encoder(folder: Path, projection: int = 24) -> Path:
    image_encoder(projection).save_pretrained(folder)
    return folder


def ip_adapter(unet: UNet2DConditionModel, kind: str = "plain", seed: int = 60) -> dict[str, Tensors]:
    """An IP-Adapter for a UNet, as its published files nest it. kind: plain, plus or full."""
    generator = torch.Generator().manual_seed(seed)
    context = unet.config["cross_attention_dim"]

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    def norm(width: int) -> Tensors:
        noise = 0.1 * torch.randn(2, width, generator=generator)
        return {"weight": 1 + noise[0], "bias": noise[1]}

    def named(prefix: str, tensors: Tensors) -> Tensors:
        return {f"{prefix}.{key}": value for key, value in tensors.items()}

    if kind == "plain":
        projection = {"proj.weight": matrix(4 * context, 24), "proj.bias": matrix(4 * context)}
        projection |= named("norm", norm(context))
    elif kind == "full":
        projection = {"proj.0.weight": matrix(32, 32), "proj.0.bias": matrix(32)}
        projection |= {"proj.2.weight": matrix(context, 32), "proj.2.bias": matrix(context)}
        projection |= named("proj.3", norm(context))
    else:
        width, inner = 48, 128
        projection = {"latents": matrix(1, 16, width)} | named("norm_out", norm(context))
        projection |= {"proj_in.weight": matrix(width, 32), "proj_in.bias": matrix(width)}
        projection |= {"proj_out.weight": matrix(context, width), "proj_out.bias": matrix(context)}
        for layer in range(4):
            names = {"to_q": (inner, width), "to_kv": (2 * inner, width), "to_out": (width, inner)}
            for name, shape in names.items():
                projection[f"layers.{layer}.0.{name}.weight"] = matrix(*shape)
            projection |= named(f"layers.{layer}.0.norm1", norm(width))
            projection |= named(f"layers.{layer}.0.norm2", norm(width))
            projection |= named(f"layers.{layer}.1.0", norm(width))
            projection[f"layers.{layer}.1.1.weight"] = matrix(4 * width, width)
            projection[f"layers.{layer}.1.3.weight"] = matrix(width, 4 * width)
    layers: Tensors = {}
    for index, name in enumerate(unet.attn_processors):  # cross-attention is every second
        if name.endswith("attn2.processor"):
            module = unet.get_submodule(name.removesuffix(".processor"))
            for part in ("k", "v"):
                layers[f"{index}.to_{part}_ip.weight"] = matrix(module.to_q.out_features, context)
    return {"image_proj": projection, "ip_adapter": layers}


def write_ip_adapter(file: Path, adapter: dict[str, Tensors]) -> Path:
    """Write a .safetensors or .bin file."""
    if file.suffix == ".bin":
        torch.save(adapter, file)
    else:
        flat = {f"{part}.{key}": value for part, inner in adapter.items() for key, value in inner.items()}
        save_file(flat, file)
    return file
