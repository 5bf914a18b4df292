"""No upload on the way of a job from its start to its images waits for the device.

`x.to(device)` and `torch.tensor(..., device=device)` copy from ordinary memory, for which CUDA first finishes
all calls that are queued. transfer.upload() does not. A CPU cannot show the wait, so this reads the source.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.helpers.environment import ROOT

MODULES = (
    *("batch", "controls", "inputs", "phases", "runner", "starting", "stepping", "unet_calls"),
    *("decode_line", "decoding", "hires", "upscaling"),
)
FILES = sorted(
    [
        *(ROOT / "models/conditioning").glob("*.py"),
        *(ROOT / "service/device" / f"{name}.py" for name in MODULES),
    ]
)


def waiting_copies(source: str) -> Iterator[str]:
    """The calls that copy a tensor to a device and wait."""
    for call in ast.walk(ast.parse(source)):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        device = next((word.value for word in call.keywords if word.arg == "device"), None)
        if call.func.attr in ("tensor", "as_tensor", "cuda") and device is not None:
            yield ast.unparse(call)
        target = device or next(iter(call.args), None)
        if call.func.attr == "to" and target is not None and "device" in ast.unparse(target):
            yield ast.unparse(call)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_tensors_are_uploaded_without_waiting(file):
    assert list(waiting_copies(file.read_text())) == []


@pytest.mark.parametrize(
    "call",
    [
        "x.to(device)",
        "x.to(self.device, torch.long)",
        "x.to(device=y.device)",
        "torch.tensor(a, device=device)",
    ],
)
def test_a_waiting_copy_is_found(call):
    assert list(waiting_copies(call)) == [call]


@pytest.mark.parametrize("call", ["x.to(torch.float32)", "x.to(dtype)", "torch.zeros(3, device=device)"])
def test_other_calls_are_not(call):
    assert list(waiting_copies(call)) == []
