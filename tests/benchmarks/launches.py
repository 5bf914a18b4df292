"""Kernels that a network call launches on a GPU, counted without one.

The networks run on the meta device, which computes nothing, with the fused kernels and the memory layout of a
GPU. Every operator that is no view counts as a launch, and cuDNN adds the bias of a convolution with a second
one. What a library launches inside one operator is not seen.

    python -m tests.benchmarks.launches
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.networks import attention_backends, kernels
from models.networks.autoencoder import Autoencoder
from models.networks.unet import UNet, stack_layers
from tests.benchmarks.shapes import SHAPES, Setting, unet_inputs

SHAPING = "view _unsafe_view transpose permute t unsqueeze expand slice select split split_with_sizes unbind"
FREE = frozenset(
    f"{SHAPING} as_strided alias detach unflatten empty empty_like new_empty".split()
)  # no kernel
SETTING = Setting(torch.device("meta"), torch.float16)
PARTS = {"unet": 2, "D": 1}  # what is counted, and its rows


class Launches(TorchDispatchMode):
    """Counts launches by operator. converted: inputs of convolutions that cuDNN copies to its layout."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.converted = 0

    def total(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.").split(".")[0]
        if name in FREE:
            return out
        if name == "convolution":
            return self.convolution(out, *args[:3])
        self.counts[name] += 1
        return out

    def convolution(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """cuDNN's output: in channels_last if the weight is; the bias is added by another kernel."""
        self.counts["convolution"] += 1
        self.counts["bias of a convolution"] += bias is not None
        layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        self.converted += min(x.shape[1:]) > 1 and not x.is_contiguous(memory_format=layout)
        return torch.empty_like(out, memory_format=torch.channels_last) if out.dim() == 4 else out

    def kernel(self, name: str) -> object:
        """A stand-in for a Triton kernel."""

        class Kernel:
            def __getitem__(self, grid: object) -> Callable[..., None]:
                return launch

        def launch(*args: object) -> None:
            self.counts[name] += 1

        return Kernel()

    def attention(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        """A stand-in for torch's attention, with the layout of its output on a GPU."""
        self.counts["attention"] += 1
        rows, heads, tokens, width = q.shape
        return q.new_empty(rows, tokens, heads, width).transpose(1, 2)


@contextmanager
def counted() -> Iterator[Launches]:
    """Count the launches inside this context, of networks on the meta device. Needs Triton."""
    from models.networks import triton_kernels

    launches = Launches()
    with (
        patch.multiple(triton_kernels, **stand_ins(triton_kernels, launches)),
        patch.object(kernels, "fused_for", lambda x: triton_kernels),
        patch.object(attention_backends, "scaled_dot_product_attention", launches.attention),
        torch.no_grad(),
        launches,
    ):
        yield launches


def stand_ins(module: ModuleType, launches: Launches) -> dict[str, object]:
    """A counting stand-in for each Triton kernel of a module."""
    from triton.runtime.jit import KernelInterface

    return {
        name: launches.kernel(name)
        for name, value in vars(module).items()
        if isinstance(value, KernelInterface)
    }


def served(kind: Callable[[], nn.Module]) -> nn.Module:
    """A network as it is served on a GPU, on the meta device."""
    with torch.device("meta"):
        network = kind().to(SETTING.dtype)
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    stack_layers(network)
    return network.requires_grad_(False)


def count(name: str, part: str) -> Launches:
    """The launches of one call: of the UNet with two rows, or of the VAE decoder with one latent."""
    spec, rows = SHAPES[name].spec, PARTS[part]
    x, t, context, pooled = unet_inputs(spec, rows, SETTING)
    x = x.contiguous(memory_format=torch.channels_last)
    network = served(lambda: UNet(spec.unet) if part == "unet" else Autoencoder(spec.autoencoder))
    with torch.no_grad():
        keys_values = network.keys_values(context) if part == "unet" else None  # once a job
    with counted() as launches:
        network(x, t, None, pooled, keys_values=keys_values) if part == "unet" else network.decode(x)
    return launches


def main() -> None:
    for name in SHAPES:
        for part in PARTS:
            launches = count(name, part)
            counts = ", ".join(f"{kind} {number}" for kind, number in launches.counts.most_common())
            print(f"{name} {part}: {launches.total()} launches ({counts})", flush=True)


if __name__ == "__main__":
    main()
