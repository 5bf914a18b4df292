"""Checks and times the service's GPU code: first whether the fast paths are right, then how fast they are.

    python -m tests.benchmarks.cuda [--only SECTION ...] [--shapes NAME ...] [--deadline S] [--json FILE]
    python -m tests.benchmarks.cuda --tiny --device cpu    rehearsal with small networks; times mean nothing

A check ends in "ok", "BAD" or "-" (does not apply to this device, or there was no time). Whole images come
from the service's engine, without HTTP. Weights are random, so images show noise, but can be compared.

It needs torch with CUDA, transformers, safetensors, pillow, numpy, Triton and cachetools. With diffusers it
compares whole images; with fastapi, uvicorn, pydantic and httpx it measures over HTTP. Without a package
registry on that machine, download the wheels first:

    pip download -d wheels --no-deps cachetools diffusers fastapi starlette uvicorn pydantic pydantic-core
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for bit-identical results; before cuBLAS starts

import torch

from models.dtypes import choose_dtype
from service.device.determinism import configure_determinism
from service.device.select import choose_device
from tests.benchmarks import cuda_checks, cuda_speed, shapes
from tests.benchmarks.cuda_report import Report, Section, run_sections, this_module
from tests.benchmarks.shapes import Setting

SECONDS = {  # that each section is expected to need on an H200; an estimate
    "checks": {"sd15": 30, "ldm-text": 25, "sdxl": 45},
    "speed": {"sd15": 60, "ldm-text": 35, "sdxl": 170},
    "profile": {"sd15": 20, "ldm-text": 20, "sdxl": 30},
    "faults": {"": 30},
    "compare": {"": 120},
    "served": {"": 45},
}
DEFAULT_SECTIONS = ("checks", "faults", "speed", "compare", "served")
DEADLINE = 520.0


def main() -> None:
    args = parser().parse_args()
    report = Report(args.json)
    if args.here:
        raise SystemExit(0 if run_here(args, report) else 1)
    begin = time.monotonic()
    report.write(heading(args.device, args.dtype), heading=heading(args.device, args.dtype))
    fine = run_sections(sections(args), lambda section: command(args, section), report, args.deadline)
    report.write(f"{time.monotonic() - begin:.0f} s in all")
    raise SystemExit(0 if fine else 1)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    top.add_argument("--only", nargs="+", choices=tuple(SECONDS), default=DEFAULT_SECTIONS)
    top.add_argument("--shapes", nargs="+", choices=tuple(shapes.SHAPES), default=tuple(shapes.SHAPES))
    top.add_argument("--device", default="cuda")
    top.add_argument("--dtype", choices=("auto", "float16", "bfloat16", "float32"), default="auto")
    top.add_argument("--steps", type=int, default=0, help="of timed images (default: the model's own)")
    top.add_argument("--tiny", action="store_true", help="small networks, for a rehearsal")
    top.add_argument(
        "--deadline", type=float, default=DEADLINE, metavar="SECONDS",
        help="sections that would not end by then are skipped (default: %(default)s)",
    )  # fmt: skip
    top.add_argument("--json", type=Path, metavar="FILE", help="also append every line to FILE as JSON")
    top.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one section, in this process
    return top


def sections(args: argparse.Namespace) -> list[Section]:
    """The sections to run, in order: all checks before any measurement."""
    return [
        Section(name, shape, seconds)
        for name in args.only
        for shape, seconds in SECONDS[name].items()
        if not shape or shape in args.shapes
    ]


def command(args: argparse.Namespace, section: Section) -> list[str]:
    """The command that runs one section in its own process."""
    options = ["--here", "--only", section.name, "--device", args.device, "--dtype", args.dtype]
    options += ["--shapes", *([section.shape] if section.shape else args.shapes), "--steps", str(args.steps)]
    options += ["--json", str(args.json)] if args.json else []
    return this_module("cuda", *options, *(["--tiny"] if args.tiny else []))


def run_here(args: argparse.Namespace, report: Report) -> bool:
    """Run the sections in this process; returns whether all checks passed."""
    device = choose_device(args.device)
    configure_determinism(0, invariant=False)
    setting = Setting(device, choose_dtype(args.dtype, device), steps=args.steps)
    all_shapes = shapes.TINY if args.tiny else shapes.SHAPES
    fine = True
    for name in args.only:
        if name == "compare":
            cuda_speed.compare(list(args.shapes), report, compare_options(args))
        elif name == "served":
            cuda_speed.serve(report, args.device, args.tiny)
        elif name == "faults":
            logging.disable()  # jobs fail on purpose here
            fine &= report_checks("faults", cuda_checks.faults(setting), report)
        for shape in args.shapes:
            if name == "checks":
                fine &= report_checks(shape, cuda_checks.checks(all_shapes[shape], setting), report)
            elif name == "speed":
                cuda_speed.measure_speed(all_shapes[shape], setting, report, args.tiny)
            elif name == "profile":
                cuda_speed.profile(all_shapes[shape], setting, report)
    return fine


def report_checks(subject: str, results, report: Report) -> bool:
    fine = True
    for what, result in results:
        fine &= result.fine is not False
        report.check(subject, what, *result)
    return fine


def compare_options(args: argparse.Namespace) -> list[str]:
    options = ["--device", args.device, "--dtype", args.dtype, "--steps", str(args.steps)]
    return [*options, "--tiny"] if args.tiny else [*options, "--batches", "1", "8"]


def heading(device_name: str, dtype_name: str) -> str:
    """Date, device, driver and versions."""
    device = choose_device(device_name)
    parts = [time.strftime("%Y-%m-%d"), f"torch {torch.__version__}", str(choose_dtype(dtype_name, device))]
    if device.type != "cuda":
        return ", ".join([*parts, "a CPU"])
    backends = torch.backends.cuda
    enabled = {
        "flash": backends.flash_sdp_enabled(),
        "efficient": backends.mem_efficient_sdp_enabled(),
        "cuDNN": backends.cudnn_sdp_enabled(),
    }
    attention = "/".join(name for name, on in enabled.items() if on)
    return ", ".join(
        [
            *parts,
            torch.cuda.get_device_name(device),
            f"driver {driver_version()}",
            f"CUDA {torch.version.cuda}",
            f"cuDNN {torch.backends.cudnn.version()}",
            f"Triton {triton_version()}",
            f"attention by {attention}",
        ]
    )


def driver_version() -> str:
    """The version of the GPU's driver; "unknown" where nvidia-smi does not tell it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return out.splitlines()[0].strip() if out.strip() else "unknown"


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "missing"
    return str(triton.__version__)


if __name__ == "__main__":
    main()
