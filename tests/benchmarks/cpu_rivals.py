"""Times a UNet call or a decoding on a CPU by each library, with the same random weights, in turn.

    python -m tests.benchmarks.cpu_rivals [SHAPE] [--part unet] [--rows 2] [--side 32] [--sides torch ...]

Sides: torch (our network, as without OpenVINO), ours (as served with --backend openvino), diffusers, openvino
(the network of diffusers, converted for this one size as its documentation recommends), onnx (the network of
diffusers in float32 by ONNX Runtime, which has no bfloat16 on a CPU). A side whose package is missing is
skipped by name; one whose result differs from float32 by more than MAX_ERROR is not timed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from models.networks.autoencoder import Autoencoder
from models.networks.unet import UNet
from models.spec import ModelSpec
from service.device.cpu_backend import difference
from tests.benchmarks import rivals
from tests.benchmarks.compare import processor
from tests.benchmarks.shapes import SHAPES, TINY, Method, Setting, random_network

MAX_ERROR = 0.06  # relative to float32; OpenVINO's own conversion computes the timestep's angles in 16 bits
PACKAGES = {"ours": "openvino", "openvino": "openvino", "onnx": "onnxruntime"}
CPU = torch.device("cpu")

Call = Callable[[], Tensor]


class Reference(nn.Module):
    """A network of diffusers, with its result alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self.network(*inputs)[0]
        return out.float()


def by_openvino(network: nn.Module, inputs: Sequence[Tensor]) -> Call:
    """Converted with static sizes, in bfloat16."""
    import openvino

    model = openvino.convert_model(network, example_input=tuple(inputs))
    model.reshape({place: list(x.shape) for place, x in zip(model.inputs, inputs, strict=True)})
    settings = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    arrays = [x.numpy() for x in inputs]
    return lambda: torch.from_numpy(request.infer(arrays, share_inputs=True)[0].copy())


def by_onnx(network: nn.Module, inputs: Sequence[Tensor], folder: Path) -> Call:
    """Exported and run in float32."""
    import onnxruntime

    file = folder / "network.onnx"
    torch.onnx.export(network, tuple(inputs), str(file), dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feeds = {place.name: x.numpy() for place, x in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: torch.from_numpy(session.run(None, feeds)[0])


class Subject:
    """A network of a shape in float32 and bfloat16, with inputs of one size."""

    def __init__(self, spec: ModelSpec, part: str, rows: int, side: int, folder: Path) -> None:
        self.spec, self.part, self.folder = spec, part, folder
        noise = partial(torch.randn, generator=torch.Generator().manual_seed(1))
        x = noise(rows, spec.autoencoder.latent_channels, side, side)
        t = torch.linspace(1, 981, rows).round()
        self.inputs = (x, t, noise(rows, *spec.context_shape)) if part == "unet" else (x,)

    def network(self) -> nn.Module:
        """Ours, in float32: random numbers differ between dtypes."""
        spec, setting = self.spec, Setting(CPU, torch.float32)
        if self.part == "unet":
            return random_network(lambda: UNet(spec.unet), setting)
        return random_network(lambda: Autoencoder(spec.autoencoder), setting)

    def exact(self) -> Tensor:
        network = self.network()
        return network(*self.inputs) if self.part == "unet" else network.decode(*self.inputs)

    def reference(self, dtype: torch.dtype) -> nn.Module:
        """The network of diffusers with the same weights."""
        ours = self.network()
        if self.part == "unet":
            return Reference(rivals.unet(ours.to(dtype).state_dict(), self.spec.unet))
        return Reference(Method(rivals.autoencoder(ours.to(dtype)), "decode"))

    def side(self, name: str) -> Call:
        inputs = self.inputs
        if name in ("torch", "ours"):
            network = self.network().to(torch.bfloat16)
            call: Callable[..., Tensor] = network if self.part == "unet" else network.decode
            if name == "ours":
                from service.device.openvino_networks import CompiledDecoder, CompiledUNet

                call = CompiledUNet(network) if self.part == "unet" else CompiledDecoder(network)
            return lambda: call(*inputs)
        if name == "diffusers":
            network = self.reference(torch.bfloat16)
            return lambda: network(*(x if x.dim() == 1 else x.bfloat16() for x in inputs))
        network = self.reference(torch.float32)
        return by_openvino(network, inputs) if name == "openvino" else by_onnx(network, inputs, self.folder)


def is_installed(package: str) -> bool:
    return find_spec(package) is not None


@torch.inference_mode()
def compare(subject: Subject, names: Sequence[str], rounds: int) -> None:
    """Print a line for each side."""
    exact, calls = subject.exact(), dict[str, Call]()
    errors, built = dict[str, float](), dict[str, float]()
    for name in names:
        if name in PACKAGES and not is_installed(PACKAGES[name]):
            print(f"{name:>10}  skipped: {PACKAGES[name]} is not installed")
            continue
        begin = time.perf_counter()
        call = subject.side(name)
        errors[name] = difference(call(), exact)
        built[name] = time.perf_counter() - begin
        if errors[name] <= MAX_ERROR:
            calls[name] = call
        else:
            print(f"{name:>10}  not timed: its error is {errors[name]:.3f}")
        gc.collect()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    for name, own in seconds.items():
        cells = f"{min(own):8.3f} {statistics.median(own):8.3f} {errors[name]:8.4f} {built[name]:9.1f}"
        print(f"{name:>10} {cells}", flush=True)


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    top.add_argument("shape", nargs="?", default="sd15", choices=SHAPES)
    top.add_argument("--part", default="unet", choices=("unet", "D"))
    top.add_argument("--rows", type=int, default=2, help="rows of the UNet, or images")
    top.add_argument("--side", type=int, default=32, help="of the latent, in cells")
    top.add_argument("--rounds", type=int, default=3)
    top.add_argument("--sides", nargs="+", default=["torch", "ours", "diffusers", "openvino", "onnx"])
    top.add_argument("--tiny", action="store_true", help="a small network, for a trial run")
    args = top.parse_args()
    shape = (TINY if args.tiny else SHAPES)[args.shape]
    names = filter(is_installed, ("torch", "diffusers", *sorted(set(PACKAGES.values()))))
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"{time.strftime('%Y-%m-%d')}, {processor()}, {torch.get_num_threads()} threads, {packages}")
    print(f"{args.shape} {args.part}, {args.rows} rows at {args.side}x{args.side}")
    print(f"{'':>10} {'min s':>8} {'median':>8} {'error':>8} {'build s':>9}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        compare(Subject(shape.spec, args.part, args.rows, args.side, Path(folder)), args.sides, args.rounds)


if __name__ == "__main__":
    main()
