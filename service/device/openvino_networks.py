"""The UNet and the VAE decoder compiled by OpenVINO, for CPUs. Needs the package openvino.

A network is traced once and compiled for inputs of any size, so that its weights are packed in memory once.
bfloat16 and float32 networks keep their precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import openvino
import torch
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn

from models.networks.adapter_inputs import AdapterInputs
from models.networks.autoencoder import Autoencoder
from models.networks.deep_features import DeepFeatures
from models.networks.unet import UNet

ANY = -1  # a dimension of any size
EXAMPLE_CELLS = 2  # sides of the smallest feature map with which a network is traced, which runs it once
EXAMPLE_TOKENS = 5
PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "f32"}


class Input(NamedTuple):
    """An input of a network: its sizes, ANY where they vary, and those with which the network is traced."""

    sizes: tuple[int, ...]
    traced: tuple[int, ...]


class UNetBlocks(nn.Module):
    """A UNet that gets its embedding as an input, since the sinusoids of the timestep need float32."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, C_in, h, w), emb (B, E), context (B, L, C_ctx) -> (B, C_out, h, w), float32."""
        out: Tensor = self.unet(x, None, context, emb=emb)
        return out.float()


class DecoderBlocks(nn.Module):
    """The VAE decoder without the lookup of codes."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, z: Tensor) -> Tensor:
        """z (1, C, h, w) -> x (1, 3, f*h, f*w), float32."""
        return self.autoencoder.decode_quantised(z).float()


class Compiled:
    """A compiled network: float32 tensors on the CPU -> a float32 tensor.

    It is compiled in a thread, so that another network can be traced meanwhile; calls wait for the end.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, inputs: Sequence[Input]) -> None:
        model = convert(network, [torch.zeros(each.traced) for each in inputs])
        forget_traces()
        model.reshape({place: list(each.sizes) for place, each in zip(model.inputs, inputs, strict=True)})
        settings = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",  # one call at a time, on all threads
            "ENABLE_CPU_PINNING": False,  # other processes may run on the same cores
        }
        pool = ThreadPoolExecutor(1)
        self._request = pool.submit(compile_model, model, settings)
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until the network is compiled. Raises what compiling raised."""
        self._request.result()

    def __call__(self, *inputs: Tensor) -> Tensor:
        arrays = [x.float().contiguous().numpy() for x in inputs]
        results = self._request.result().infer(arrays, share_inputs=True)
        return torch.from_numpy(results[0].copy())  # the next call overwrites the result


def compile_model(model: Any, settings: Mapping[str, Any]) -> Any:
    """A request of a converted network, with which it can be called."""
    return openvino.Core().compile_model(model, "CPU", settings).create_infer_request()


@torch.no_grad()
def convert(network: nn.Module, examples: Sequence[Tensor]) -> Any:
    """The network as OpenVINO's model; it shares the memory of the weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit, which OpenVINO reads, is deprecated
        traced = torch.jit.trace(network.eval(), tuple(examples), check_trace=False)
        decoder = TorchScriptPythonDecoder(traced, example_input=tuple(examples), shared_memory=True)
        # openvino.convert_model() runs more passes, which take four times as long and change no result.
        frontend = FrontEndManager().load_by_framework("pytorch")
        return frontend.convert(frontend.load(decoder))


def forget_traces() -> None:
    """Free what torch.jit keeps of traced modules for as long as the process lives, weights included.

    As clear_class_registry() in torch.testing._internal.jit_utils; nothing else here uses torch.jit.
    """
    torch._C._jit_clear_class_registry()
    torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
    torch.jit._state._clear_class_state()


class CompiledUNet(nn.Module):
    """A UNet that runs compiled, except calls with inputs of adapters, deep features, or keys and values."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        spec, self.unet = unet.spec, unet
        channels, emb, context = spec.in_channels, 4 * spec.channels[0], spec.context_width
        side = EXAMPLE_CELLS * 2 ** (len(spec.channels) - 1)
        inputs = [Input((ANY, channels, ANY, ANY), (2, channels, side, side)), Input((ANY, emb), (2, emb))]
        if context:
            inputs.append(Input((ANY, ANY, context), (2, EXAMPLE_TOKENS, context)))
        self.compiled = Compiled(UNetBlocks(unet), unet.dtype, inputs)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        pooled: Tensor | None = None,
        noise_level: Tensor | None = None,
        adapters: AdapterInputs | None = None,
        guidance: Tensor | None = None,
        deep: DeepFeatures | None = None,
        keys_values: Tensor | None = None,
    ) -> Tensor:
        """As UNet.forward()."""
        plain = adapters is None and deep in (None, DeepFeatures()) and keys_values is None
        if not plain:
            out: Tensor = self.unet(x, t, context, pooled, noise_level, adapters, guidance, deep, keys_values)
            return out
        emb = self.unet.embed(t, pooled, noise_level, guidance)
        return self.compiled(x, emb) if context is None else self.compiled(x, emb, context)


class CompiledDecoder:
    """Decodes latents as Autoencoder.decode() does, one at a time."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder, channels = autoencoder, autoencoder.spec.latent_channels
        latent = Input((1, channels, ANY, ANY), (1, channels, EXAMPLE_CELLS, EXAMPLE_CELLS))
        self.compiled = Compiled(DecoderBlocks(autoencoder), autoencoder.dtype, [latent])

    def wait(self) -> None:
        """As Compiled.wait()."""
        self.compiled.wait()

    def __call__(self, z: Tensor) -> Tensor:
        """Unscaled z (B, C, h, w) -> x (B, 3, f*h, f*w), float32."""
        z = self.autoencoder.quantize(z) if self.autoencoder.spec.codes else z
        return torch.cat([self.compiled(each) for each in z.split(1)])
