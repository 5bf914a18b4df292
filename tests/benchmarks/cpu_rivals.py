"""Times a UNet call or a decoding on a CPU by each library, with the same random weights, in turn.

    python -m tests.benchmarks.cpu_rivals [SHAPE] [--part unet|D] [--sizes 2x32 8x32] [--sides torch ours ...]

Sides:
    torch      our network, as it runs without OpenVINO
    ours       our network by OpenVINO, as served with --backend openvino
    diffusers  the network of diffusers
    compiled   the network of diffusers with torch.compile
    openvino   the network of diffusers, converted for this one size as OpenVINO's documentation recommends
    onnx       the network of diffusers in float32 by ONNX Runtime, which has no bfloat16 on a CPU

The others have the dtype that the service chooses on this CPU. A size is ROWSxSIDE: rows of the UNet, or
images, and the side of the latent in cells. A side whose package is missing is skipped by name; one whose
result differs from float32 by more than MAX_ERROR is not timed.

All sides of a size stay in memory while they are timed in turn. For the UNet of Stable Diffusion 1.5 in
float32 the sides of torch take 4 GB together, and each other side 4 GB: choose them with --sides.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoint import read_spec
from models.dtypes import choose_dtype
from models.networks.autoencoder import Autoencoder
from models.networks.unet import UNet
from models.spec import ModelSpec
from service.device.cpu_backend import difference
from service.model_paths import bundled
from tests.benchmarks import rivals
from tests.benchmarks.machine import heading, is_installed, others
from tests.benchmarks.shapes import SHAPES, TINY, Method, Setting, random_network

MAX_ERROR = 0.06  # relative to float32; OpenVINO's own conversion computes the timestep's angles in 16 bits
PACKAGES = {"ours": ("openvino",), "openvino": ("openvino",), "onnx": ("onnx", "onnxruntime")}
SIDES = ("torch", "ours", "diffusers", "compiled", "openvino", "onnx")
DEFAULT_SIDES = ("torch", "ours", "diffusers", "openvino")
CPU = torch.device("cpu")
PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "f32"}  # as OpenVINO names them

Call = Callable[..., Tensor]


class Reference(nn.Module):
    """A network of diffusers or transformers, with the first of its results alone, in float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self.network(*inputs)[0]
        return out.float()


def by_openvino(network: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype) -> Call:
    """Converted with static sizes."""
    import openvino

    model = openvino.convert_model(network, example_input=tuple(inputs))
    model.reshape({place: list(x.shape) for place, x in zip(model.inputs, inputs, strict=True)})
    settings = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    arrays = [x.numpy() for x in inputs]
    return lambda: torch.from_numpy(request.infer(arrays, share_inputs=True)[0].copy())


def by_onnx(network: nn.Module, inputs: Sequence[Tensor], file: Path) -> Call:
    """Exported to the file, unless that exists, and run in float32."""
    import onnxruntime

    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.onnx.export(network, tuple(inputs), str(file), dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feeds = {place.name: x.numpy() for place, x in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: torch.from_numpy(session.run(None, feeds)[0])


class Networks:
    """The UNet or autoencoder of a shape in float32 and in the dtype that is timed, with the same weights."""

    def __init__(self, spec: ModelSpec, part: str, dtype: torch.dtype) -> None:
        self.spec, self.part, self.dtype = spec, part, dtype
        setting = Setting(CPU, torch.float32)  # random numbers differ between dtypes
        self.exact: UNet | Autoencoder = random_network(self._empty, setting)
        self.ours = self.exact
        if dtype != torch.float32:
            self.ours = self._empty().to(dtype).requires_grad_(False).eval()
            self.ours.load_state_dict(self.exact.state_dict())

    def _empty(self) -> UNet | Autoencoder:
        return UNet(self.spec.unet_spec) if self.part == "unet" else Autoencoder(self.spec.autoencoder)

    def run(self, inputs: Sequence[Tensor], exact: bool = False) -> Tensor:
        network = self.exact if exact else self.ours
        out: Tensor = network(*inputs) if self.part == "unet" else network.decode(*inputs)
        return out

    @cached_property
    def compiled(self) -> Call:
        """By OpenVINO, as the service does it: for inputs of any size."""
        from service.device.openvino_networks import CompiledDecoder, CompiledUNet

        return (CompiledUNet if self.part == "unet" else CompiledDecoder)(self.ours)

    def reference(self, ours: UNet | Autoencoder) -> nn.Module:
        """The network of diffusers with the same weights."""
        if self.part == "unet":
            return Reference(rivals.unet(ours.state_dict(), self.spec.unet_spec))
        return Reference(Method(rivals.autoencoder(ours), "decode"))


class Subject:
    """Networks with inputs of one size."""

    def __init__(self, networks: Networks, rows: int, side: int, folder: Path) -> None:
        self.networks, spec = networks, networks.spec
        self.file = folder / f"{spec.name}-{networks.part}-{rows}x{side}" / "model.onnx"
        noise = partial(torch.randn, generator=torch.Generator().manual_seed(1))
        if networks.part == "unet":
            t = torch.linspace(1, 981, rows).round()
            x = noise(rows, spec.unet_spec.in_channels, side, side)
            self.inputs: tuple[Tensor, ...] = (x, t, noise(rows, *spec.context_shape))
        else:
            self.inputs = (noise(rows, spec.autoencoder.latent_channels, side, side),)

    def exact(self) -> Tensor:
        return self.networks.run(self.inputs, exact=True)

    def side(self, name: str) -> Call:
        """What a round calls."""
        networks, inputs = self.networks, self.inputs
        if name == "torch":
            return lambda: networks.run(inputs)
        if name == "ours":
            compiled = networks.compiled
            return lambda: compiled(*inputs)
        if name in ("diffusers", "compiled"):
            theirs = rivals.fast(networks.reference(networks.ours), CPU, name == "compiled")
            cast = [x if x.dim() == 1 else x.to(networks.dtype) for x in inputs]
            return lambda: theirs(*cast)
        theirs = networks.reference(networks.exact)
        if name == "openvino":
            return by_openvino(theirs, inputs, networks.dtype)
        return by_onnx(theirs, inputs, self.file)


@torch.inference_mode()
def compare(subject: Subject, names: Sequence[str], rounds: int) -> None:
    """Print a line for each side: its time, its error, and the seconds to build it and call it once."""
    exact, calls = subject.exact(), dict[str, Call]()
    errors, built = dict[str, float](), dict[str, float]()
    for name in names:
        if missing := [package for package in PACKAGES.get(name, ()) if not is_installed(package)]:
            print(f"{name:>10}  skipped: {' and '.join(missing)} is not installed")
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
    with others() as beside:
        for _ in range(rounds):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - begin)
    for name, own in seconds.items():
        cells = f"{min(own):8.3f} {statistics.median(own):8.3f} {errors[name]:8.1e} {built[name]:9.1f}"
        print(f"{name:>10} {cells}", flush=True)
    print(f"other programs had {beside.share:.0%} of the cores while this was timed", flush=True)


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    top.add_argument("shape", nargs="?", default="sd15", choices=[*SHAPES, "emoji"])
    top.add_argument("--part", default="unet", choices=("unet", "D"))
    top.add_argument("--sizes", nargs="+", default=["2x32"], metavar="ROWSxSIDE")
    top.add_argument("--rounds", type=int, default=3)
    top.add_argument("--sides", nargs="+", choices=SIDES, default=DEFAULT_SIDES)
    top.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    top.add_argument("--folder", type=Path, help="keep exported networks here for the next time")
    top.add_argument("--tiny", action="store_true", help="a small network, for a trial run")
    args = top.parse_args()
    if args.shape == "emoji":
        spec = read_spec(bundled("emoji"))
    else:
        spec = (TINY if args.tiny else SHAPES)[args.shape].spec
    dtype = choose_dtype(args.dtype, CPU)
    print(heading())
    networks = Networks(spec, args.part, dtype)
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            rows, side = map(int, size.split("x"))
            print(f"{args.shape} {args.part}, {rows} rows at {side}x{side}, {dtype}")
            print(f"{'':>10} {'min s':>8} {'median':>8} {'error':>8} {'build s':>9}", flush=True)
            compare(Subject(networks, rows, side, args.folder or Path(folder)), args.sides, args.rounds)


if __name__ == "__main__":
    main()
