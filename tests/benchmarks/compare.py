"""Times our networks against those of `diffusers`, with the same random weights, in alternation.

    python -m tests.benchmarks.compare [SHAPE ...] [--parts PART ...] [--batches N ...] [--compiled] [--tiny]

Parts: unet (one call; batch: rows), D, E and text (batch: images or prompts), images (whole images, text
encoder and D included; ours by the service's engine). A part whose two results differ too much is not timed.
In every round each side runs once, with a matrix product of the same dtype between them, whose speed is the
reference for "of matmul". All figures are medians over the rounds. With --keep-differing, whole images that
differ too much are timed too, and marked with "!": random networks amplify the rounding errors of 16 bits.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from models.dtypes import choose_dtype
from service.device.select import choose_device
from tests.benchmarks.machine import processor
from tests.benchmarks.shapes import SHAPES, TINY, IncomparableError, Pair, Setting, Shape, images, networks

PARTS = ("unet", "D", "E", "text", "images")
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}  # rows and columns of the matrices
# Limits of the difference: relative error of a network, PSNR of whole images, which add up many calls.
MAX_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
MIN_IMAGES_DB = {torch.float32: 50.0, torch.float16: 35.0, torch.bfloat16: 25.0}
COLUMNS = ("shape", "part", "batch", "ours s", "theirs s", "ratio", "TFLOP/s", "of matmul", "error")
WIDTHS = (10, 9, 6, 10, 10, 8, 9, 11, 9)


class DisagreementError(Exception):
    """The two sides give different results, so that timing them would be pointless."""


@dataclass(frozen=True)
class Line:
    """The measurements of one part."""

    shape: str
    part: str
    batch: int
    ours: float  # seconds
    theirs: float
    flops: int
    matmul: float  # FLOP/s of the matrix product
    error: float  # between both sides: relative, or PSNR in dB for images
    agrees: bool = True  # whether the error is within its limit

    def cells(self) -> tuple[str, ...]:
        rate = self.flops / self.ours
        error = f"{self.error:.0f} dB" if self.part == "images" else f"{self.error:.0e}"
        error += "" if self.agrees else "!"
        return (
            self.shape, self.part, str(self.batch), f"{self.ours:.3f}", f"{self.theirs:.3f}",
            f"{self.theirs / self.ours:.2f}", f"{rate / 1e12:.2f}", f"{rate / self.matmul:.0%}", error,
        )  # fmt: skip


def main() -> None:
    args = parser().parse_args()
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    if args.threads:
        torch.set_num_threads(args.threads)
    shapes = TINY if args.tiny else SHAPES
    print(machine(device, dtype, "compiled" if args.compiled else "with default options"), flush=True)
    print(form(COLUMNS), flush=True)
    setting = Setting(device, dtype, args.compiled, args.steps)
    lines, fine = [], True
    for name in args.shapes or shapes:
        for part in args.parts:
            for batch in args.batches or batches(shapes[name], part):
                try:
                    line = measured(
                        shapes[name],
                        part,
                        batch,
                        setting,
                        args.rounds,
                        args.keep_differing and part == "images",
                    )
                except DisagreementError as error:
                    fine = False
                    print(f"{name} {part} {batch}: not timed, {error}", flush=True)
                except IncomparableError as error:
                    print(f"{name} {part} {batch}: not timed, {error}", flush=True)
                except (torch.OutOfMemoryError, MemoryError):
                    print(f"{name} {part} {batch}: does not fit", flush=True)
                else:
                    lines.append(line)
                    print(form(line.cells()), flush=True)
                release(device)
    if args.json:
        args.json.write_text(json.dumps([asdict(line) for line in lines], indent=1), encoding="utf-8")
    raise SystemExit(0 if fine else 1)


def batches(shape: Shape, part: str) -> tuple[int, ...]:
    return shape.rows if part == "unet" else shape.images


@torch.inference_mode()
def measured(
    shape: Shape, part: str, batch: int, setting: Setting, rounds: int, keep_differing: bool = False
) -> Line:
    """Builds and measures one part of a shape. Raises DisagreementError and IncomparableError."""
    if part == "images":
        pair = images(shape.spec, batch, setting)
    else:
        pair = networks(shape.spec, part, batch, setting)
    return measure(pair, shape.spec.name, part, batch, setting, rounds, keep_differing)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    top.add_argument("shapes", metavar="SHAPE", nargs="*", choices=[*SHAPES, []], help=", ".join(SHAPES))
    top.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    top.add_argument(
        "--batches", nargs="+", type=int, help="rows of the UNet, images or prompts of other parts"
    )
    top.add_argument("--steps", type=int, default=0, help="of whole images (default: the model's own)")
    top.add_argument("--rounds", type=int, default=5)
    top.add_argument("--device", default="auto")
    top.add_argument("--dtype", choices=("auto", "float16", "bfloat16", "float32"), default="auto")
    top.add_argument("--threads", type=int, default=0, help="0: torch's default")
    top.add_argument(
        "--compiled", action="store_true", help="diffusers with torch.compile, its fastest documented option"
    )
    top.add_argument("--keep-differing", action="store_true", help="time whole images that differ too much")
    top.add_argument("--tiny", action="store_true", help="small networks, for a trial run")
    top.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    return top


def machine(device: torch.device, dtype: torch.dtype, theirs: str) -> str:
    """The heading of a table: date, machine and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return (
        f"{time.strftime('%Y-%m-%d')}, {name}, {torch.get_num_threads()} threads, {dtype}, "
        f"torch {torch.__version__}, diffusers {diffusers.__version__} {theirs}"
    )


def form(cells: tuple[str, ...]) -> str:
    first, *others = (f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
    return first.strip().ljust(WIDTHS[0]) + "".join(others)


def measure(
    pair: Pair,
    shape: str,
    part: str,
    batch: int,
    setting: Setting,
    rounds: int,
    keep_differing: bool = False,
) -> Line:
    """Compares both sides, which warms them up, then times them in turn."""
    device = setting.device
    error, agrees = difference(pair, part, setting.dtype)
    if not agrees and not keep_differing:
        raise DisagreementError(f"difference {error:.2g}")
    product, flops = matmul(device, setting.dtype)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": [], "matmul": []}
    for _ in range(rounds):
        for name, call in (("ours", pair.ours), ("matmul", product), ("theirs", pair.theirs)):
            seconds[name].append(timed(call, device))
    ours, theirs, top = (statistics.median(seconds[name]) for name in ("ours", "theirs", "matmul"))
    return Line(shape, part, batch, ours, theirs, pair.flops, flops / top, error, agrees)


def difference(pair: Pair, part: str, dtype: torch.dtype) -> tuple[float, bool]:
    """Relative error between both sides, or PSNR of images; and whether it is within the limit.

    Raises DisagreementError if the two cannot be compared.
    """
    ours, theirs = pair.ours().float(), pair.theirs().float()
    if ours.shape != theirs.shape:
        raise DisagreementError(f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}")
    if theirs.std() < 0.05:
        raise DisagreementError("the reference is almost constant")
    if part == "images":
        error = (10 * torch.log10(1 / (ours - theirs).square().mean())).item()
        return error, error >= MIN_IMAGES_DB[dtype]
    error = ((ours - theirs).norm() / theirs.norm()).item()
    return error, error <= MAX_ERROR[dtype]


def matmul(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """A matrix product, and its number of floating point operations."""
    side = MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return (lambda: a @ b), 2 * side**3


def timed(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of a call, until the device has finished it."""
    synchronise(device)
    begin = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - begin


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Frees the memory of a part before the next one is built."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
