"""The Triton kernels, run by Triton's interpreter and compiled for a GPU; the tests need none."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from models.networks import kernels

NAME = "models.networks.triton_kernels"
NEEDS_TRITON = "triton is not installed: pip install '.[kernels]'"


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    """The kernels through Triton's interpreter, which is chosen when they are imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip(NEEDS_TRITON)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in loaded():  # Triton's own functions too, if something has imported it
            patch.delitem(sys.modules, name)
        yield importlib.import_module(NAME)
        for name in loaded():
            del sys.modules[name]


def loaded() -> list[str]:
    """Loaded modules in which kernels were created at import."""
    names = [name for name in sys.modules if f"{name}.".startswith("triton.")]
    return [name for name in names if not name.startswith("triton._C")] + [NAME] * (NAME in sys.modules)


def image(*shape: int, mean: float = 0.0) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return (3 * torch.randn(shape, generator=draw) + mean).contiguous(memory_format=torch.channels_last)


def random_norm(groups: int, channels: int) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels, eps=1e-6).requires_grad_(False)
    draw = torch.Generator().manual_seed(1)
    for parameter in norm.parameters():
        parameter.copy_(torch.randn(channels, generator=draw))
    return norm


def largest_error(given: Tensor, expected: Tensor) -> float:
    return ((given - expected).abs().max() / expected.abs().max()).item()


# Sizes that fill tiles and that do not; groups that end within a tile.
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 40, 9, 15), 4), ((1, 128, 8, 16), 32), ((1, 96, 3, 3), 8)]
)
@pytest.mark.parametrize("activate", [False, True])
@torch.no_grad()
def test_group_norm_matches_torch_and_keeps_the_layout(interpreted, shape, groups, activate):
    x, norm = image(*shape), random_norm(groups, shape[1])
    given = interpreted.group_norm(x, norm.weight, norm.bias, groups, norm.eps, activate)
    assert given.stride() == x.stride()
    expected = kernels.plain_group_norm(x.double(), norm.double(), activate)
    assert largest_error(given, expected) < 1e-6


@torch.no_grad()
def test_group_norm_is_precise_for_a_large_mean(interpreted):
    x, norm = image(1, 32, 16, 16, mean=1000.0), random_norm(4, 32)
    given = interpreted.group_norm(x, norm.weight, norm.bias, 4, norm.eps)
    assert largest_error(given, kernels.plain_group_norm(x.double(), norm.double(), False)) < 1e-4


@torch.no_grad()
def test_an_images_bits_do_not_depend_on_the_others(interpreted):
    x, norm = image(3, 32, 9, 9), random_norm(4, 32)
    whole, alone = (
        interpreted.group_norm(
            y.contiguous(memory_format=torch.channels_last), norm.weight, norm.bias, 4, 1e-5
        )
        for y in (x, x[2:])
    )
    assert torch.equal(whole[2:], alone)


@pytest.mark.parametrize("shape", [(3, 5, 48), (1, 2, 2 * 1500)])
def test_geglu_matches_torch(interpreted, shape):
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert largest_error(interpreted.geglu(x), kernels.plain_geglu(x.double())) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernels_pass_their_start_up_check(interpreted, dtype):
    bound = kernels.TOLERANCE * (1 if dtype == torch.float16 else 8)
    assert 0 < kernels.largest_error(interpreted, torch.device("cpu"), dtype) < bound


class Wrong:
    """Kernels whose results are half of what they should be."""

    @staticmethod
    def geglu(x: Tensor) -> Tensor:
        return kernels.plain_geglu(x) / 2

    @staticmethod
    def group_norm(x, weight, bias, groups, eps, activate):
        return nn.functional.group_norm(x, groups, weight, bias, eps) / 2


@pytest.mark.parametrize("found", [Wrong, None])
def test_wrong_or_missing_kernels_are_not_used(monkeypatch, found, caplog):
    monkeypatch.setitem(sys.modules, NAME, found)
    monkeypatch.setattr("models.networks.triton_kernels", found, raising=False)
    if found is None:
        monkeypatch.delattr("models.networks.triton_kernels")
    assert kernels.fused_on.__wrapped__(torch.device("cpu")) is None
    assert "fused kernels are off" in caplog.text


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from models.networks import triton_kernels as k
half, full, whole = "*fp16", "*fp32", "i32"
shape = dict(cells=whole, channels=whole)
tile = dict(rows=k.TILE_CELLS, span=k.TILE_CHANNELS)
moments = dict(means=full, squares=full)
for kernel, given, fixed in (
    (k.tile_moments, dict(x=half, **moments, **shape), tile),
    (k.group_moments, dict(**moments, mean_out=full, scale_out=full, **shape, tiles=whole, width=whole,
     eps="fp32"), dict(rows=k.TILE_CELLS, span=16, batch=k.TILES_PER_SUM)),
    (k.normalise, dict(x=half, means=full, scales=full, weight=half, bias=half, out=half, **shape,
     groups=whole, width=whole), dict(activate=True, **tile)),
    (k.gate_values, dict(x=half, out=half, width=whole), dict(span=k.MAX_GEGLU_BLOCK)),
):
    source = ASTSource(kernel, given | dict.fromkeys(fixed, "constexpr"), fixed)
    for architecture in (80, 89, 90):  # A100, L40S and RTX 40, H100 and H200
        assert compile(source, target=GPUTarget("cuda", architecture, 32)).asm["cubin"]
"""


def test_the_kernels_compile_for_gpus_of_three_generations(tmp_path):
    """With the assembler that comes with Triton; this needs no GPU and runs nothing on one."""
    pytest.importorskip("triton", reason=NEEDS_TRITON)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
