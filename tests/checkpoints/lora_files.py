"""Random LoRAs, and their tensors in kohya's and PEFT's key styles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

ATTENTION = ("attn1.to_q", "attn1.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "proj_in")
TEXT = ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "time_emb_proj")
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
KOHYA_XL = KOHYA | {
    "text_encoder": "lora_te1_text_model_",
    "text_encoder_2": "lora_te2_text_model_",
}


class Low(NamedTuple):
    """The low-rank change of one module, by its name in diffusers."""

    network: str
    module: str
    down: Tensor
    up: Tensor
    alpha: float


def random_lora(shapes: dict[str, dict[str, tuple[int, ...]]], seed: int = 0, rank: int = 4) -> list[Low]:
    """A LoRA with a strong effect on every module in `shapes` (network -> module -> weight shape)."""
    generator = torch.Generator().manual_seed(seed)
    changes = []
    for network, modules in shapes.items():
        for module, (out, into, *kernel) in modules.items():
            down = torch.randn(rank, into, *kernel, generator=generator) / down_scale(into, kernel)
            up = torch.randn(out, rank, *(1 for _ in kernel), generator=generator) / rank**0.5
            changes.append(Low(network, module, down, up, rank / 2))
    return changes


def down_scale(into: int, kernel: Sequence[int]) -> float:
    return (into * torch.Size(kernel).numel()) ** 0.5


def shapes_of(folder: Path, *ends: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """network -> module -> weight shape, of the modules in a diffusers folder with one of these endings."""
    from safetensors import safe_open

    files = {
        "unet": folder / "unet" / "diffusion_pytorch_model.safetensors",
    } | {
        text: folder / text / "model.safetensors"
        for text in ("text_encoder", "text_encoder_2")
        if (folder / text).is_dir()
    }
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for network, file in files.items():
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                module = key.removesuffix(".weight").removeprefix("text_model.")
                if key.endswith(".weight") and module.endswith(ends):
                    found.setdefault(network, {})[module] = tuple(tensors.get_slice(key).get_shape())
    return found


def as_kohya(changes: Sequence[Low], prefixes: dict[str, str] = KOHYA) -> dict[str, Tensor]:
    tensors = {}
    for low in changes:
        module = prefixes[low.network] + low.module.replace(".", "_")
        tensors[f"{module}.lora_down.weight"] = low.down
        tensors[f"{module}.lora_up.weight"] = low.up
        tensors[f"{module}.alpha"] = torch.tensor(low.alpha)
    return tensors


def as_peft(changes: Sequence[Low]) -> dict[str, Tensor]:
    """This style has no alpha: the scale is multiplied into B."""
    tensors = {}
    for low in changes:
        inner = "" if low.network == "unet" else "text_model."
        module = f"{low.network}.{inner}{low.module}"
        tensors[f"{module}.lora_A.weight"] = low.down
        tensors[f"{module}.lora_B.weight"] = low.up * (low.alpha / low.down.shape[0])
    return tensors


def write_lora(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata)
    return file
