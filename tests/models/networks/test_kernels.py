"""The Triton kernels, run by Triton's interpreter and compiled for a GPU; the tests need none."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm

from models.networks import kernels
from models.networks.attention import AttentionBlock
from models.networks.autoencoder import Autoencoder
from models.networks.tiling import tiled
from models.networks.unet import UNet
from tests.checkpoints.tiny import fill_randomly, tiny_spec
from tests.helpers.reference_unet import ROWS

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


def vectors(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


SMALL = 0  # cells up to which one program normalises a group, to force the other way


# Sizes that fill tiles and that do not; groups that end within a tile; each of the two ways to compute it.
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 40, 9, 15), 4), ((1, 128, 8, 16), 32), ((1, 96, 3, 3), 8), ((1, 8, 40, 30), 4)]
)
@pytest.mark.parametrize("at_once", [SMALL, None])
@pytest.mark.parametrize("activate", [False, True])
@torch.no_grad()
def test_group_norm_matches_torch_and_keeps_the_layout(
    interpreted, monkeypatch, shape, groups, activate, at_once
):
    if at_once is not None:
        monkeypatch.setattr(interpreted, "MAX_CELLS_AT_ONCE", at_once)
    x, norm = image(*shape), random_norm(groups, shape[1])
    given = interpreted.group_norm(x, norm.weight, norm.bias, groups, norm.eps, activate)
    assert given.stride() == x.stride()
    expected = kernels.plain_group_norm(x.double(), norm.double(), activate)
    assert largest_error(given, expected) < 1e-6


@pytest.mark.parametrize("max_tiles", [256, 3])
@pytest.mark.parametrize("at_once", [SMALL, 1024])
@torch.no_grad()
def test_group_norm_adds_a_bias_and_a_shift_first(interpreted, monkeypatch, at_once, max_tiles):
    monkeypatch.setattr(interpreted, "MAX_CELLS_AT_ONCE", at_once)
    monkeypatch.setattr(interpreted, "MAX_TILES", max_tiles)  # larger tiles, which are read in parts
    x, norm, added = image(2, 40, 19, 15), random_norm(4, 40), vectors(40)
    shift = vectors(2, 100)[:, 30:70]  # columns of a larger matrix
    given = interpreted.group_norm(x, norm.weight, norm.bias, 4, norm.eps, True, added, shift)
    total = x.double() + (added + shift).double()[:, :, None, None]
    assert largest_error(given, kernels.plain_group_norm(total, norm.double(), True)) < 1e-6


@pytest.mark.parametrize("at_once", [SMALL, 1024])
@torch.no_grad()
def test_group_norm_is_precise_for_a_large_mean(interpreted, monkeypatch, at_once):
    monkeypatch.setattr(interpreted, "MAX_CELLS_AT_ONCE", at_once)
    x, norm = image(1, 32, 16, 16, mean=1000.0), random_norm(4, 32)
    given = interpreted.group_norm(x, norm.weight, norm.bias, 4, norm.eps)
    assert largest_error(given, kernels.plain_group_norm(x.double(), norm.double(), False)) < 1e-4


@pytest.mark.parametrize("at_once", [SMALL, 1024])
@torch.no_grad()
def test_an_images_bits_do_not_depend_on_the_others(interpreted, monkeypatch, at_once):
    monkeypatch.setattr(interpreted, "MAX_CELLS_AT_ONCE", at_once)
    x, norm = image(3, 32, 9, 9), random_norm(4, 32)
    whole, alone = (
        interpreted.group_norm(
            y.contiguous(memory_format=torch.channels_last), norm.weight, norm.bias, 4, 1e-5
        )
        for y in (x, x[2:])
    )
    assert torch.equal(whole[2:], alone)


@pytest.mark.parametrize("shape", [(2, 5, 40), (3, 128), (0, 8)])
@torch.no_grad()
def test_a_sum_and_its_layer_norm_match_torch(interpreted, shape):
    x, y, norm = vectors(*shape), vectors(*shape).flip(-1), nn.LayerNorm(shape[-1])
    norm.weight.copy_(vectors(shape[-1]))
    given = interpreted.add_layer_norm(x, y, norm.weight, norm.bias, norm.eps)
    expected = kernels.plain_add_norm(x.double(), y.double(), norm.double())
    for one, other in zip(given, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("biases", [1, 2])
@torch.no_grad()
def test_a_sum_with_biases_matches_torch(interpreted, biases):
    x, y, terms = (
        image(2, 24, 9, 7),
        image(2, 24, 9, 7, mean=1.0),
        [vectors(24), vectors(24).flip(0)][:biases],
    )
    given = interpreted.add_biased(x, y, *terms)
    assert given.stride() == x.stride()
    expected = x.double() + y.double() + sum(terms).double()[:, None, None]
    assert largest_error(given, expected) < 1e-6


def fused_and_plain(monkeypatch, interpreted, network: nn.Module, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What a network returns in channels_last by the fused kernels, and by torch's operators."""
    plain = network(*inputs)
    monkeypatch.setattr(kernels, "fused_for", lambda x: interpreted)
    first, *others = inputs
    network.to(memory_format=torch.channels_last)
    return network(first.contiguous(memory_format=torch.channels_last), *others), plain


@pytest.mark.slow
@pytest.mark.parametrize("name", ["txt2img-1p4B", "celebahq", "inpainting_big"])
@torch.no_grad()
def test_a_unet_of_fused_kernels_predicts_the_same(interpreted, monkeypatch, name):
    unet = UNet(ROWS[name]).requires_grad_(False)
    fill_randomly(unet, 3)
    x, t = vectors(2, unet.spec.in_channels, 8, 8), torch.tensor([5, 700])
    context = [vectors(2, 5, unet.spec.context_width)] if unet.spec.context_width else []
    fused, plain = fused_and_plain(monkeypatch, interpreted, unet, x, t, *context)
    assert largest_error(fused, plain) < 1e-5


@torch.no_grad()
def test_attention_by_matrix_products_equals_that_by_convolutions(monkeypatch):
    block = AttentionBlock(width=32, heads=4, groups=8)
    fill_randomly(block, 3)
    plain = SimpleNamespace(
        group_norm=lambda x, weight, bias, groups, eps, _: group_norm(x, groups, weight, bias, eps)
    )
    products, convolutions = fused_and_plain(monkeypatch, plain, block, vectors(2, 32, 6, 8))
    assert largest_error(products, convolutions) < 1e-6


@pytest.mark.slow
@torch.no_grad()
def test_a_decoder_of_fused_kernels_decodes_the_same(interpreted, monkeypatch):
    autoencoder = Autoencoder(tiny_spec().autoencoder).requires_grad_(False)
    fill_randomly(autoencoder, 3)
    decoder = autoencoder.decoder
    fused, plain = fused_and_plain(monkeypatch, interpreted, decoder, vectors(1, 4, 8, 8))
    assert largest_error(fused, plain) < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_circular_convolutions_keep_their_padding(interpreted, monkeypatch):
    unet = UNet(ROWS["txt2img-1p4B"]).requires_grad_(False)
    fill_randomly(unet, 3)
    given = vectors(1, 4, 8, 8), torch.tensor([700]), vectors(1, 5, unet.spec.context_width)
    fused, plain = fused_and_plain(monkeypatch, interpreted, tiled(unet, "both"), *given)
    assert largest_error(fused, plain) < 1e-5


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
    def group_norm(x, weight, bias, groups, eps, activate, added=None, shift=None):
        return nn.functional.group_norm(x, groups, weight, bias, eps) / 2

    @staticmethod
    def add_biased(x, y, bias):
        return (x + y) / 2

    @staticmethod
    def add_layer_norm(x, y, weight, bias, eps):
        return x, y


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
terms = dict(added=half, shift=half, stride=whole)
norm = dict(weight=half, bias=half)
tile = dict(rows=k.TILE_CELLS, span=k.TILE_CHANNELS)
moments = dict(means=full, squares=full)
for kernel, given, fixed in (
    (k.whole_groups, dict(x=half, **terms, **norm, out=half, **shape, width=whole, eps="fp32"),
     dict(activate=True, rows=128, span=32)),
    (k.whole_groups, dict(x=half, stride=whole, **norm, out=half, **shape, width=whole, eps="fp32"),
     dict(added=None, shift=None, activate=True, rows=128, span=32)),
    (k.tile_moments, dict(x=half, **terms, **moments, **shape, parts=whole), tile),
    (k.group_moments, dict(**moments, mean_out=full, scale_out=full, **shape, tiles=whole, width=whole,
     eps="fp32", rows=whole), dict(span=16, batch=k.TILES_PER_SUM)),
    (k.normalise, dict(x=half, **terms, means=full, scales=full, **norm, out=half, **shape,
     groups=whole, width=whole), dict(activate=True, **tile)),
    (k.layer_norm_rows, dict(x=half, y=half, **norm, total=half, out=half, width=whole, eps="fp32"),
     dict(span=2048)),
    (k.biased_sums, dict(x=half, y=half, bias=half, other=half, out=half, count=whole, channels=whole),
     dict(span=k.SUM_BLOCK)),
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
