"""ControlNets against `diffusers`, from every layout that is read."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import save_file
from torch import Tensor

from models.adapters.control_net import open_control, save_control
from models.adapters.controls import Control, Rows, is_active, masked, scaled, weights
from models.checkpoint import CheckpointError, load
from models.formats.identify import read_spec
from models.networks.adapter_inputs import AdapterInputs, RowInputs, combined
from tests.checkpoints import sd_folders
from tests.checkpoints.control_files import (
    control_lora,
    control_net,
    difference,
    load_unet,
    published,
    write_single_file,
)
from tests.helpers.numbers import LIMIT, relative_error

pytestmark = pytest.mark.slow

FAMILIES = ("sd1", "sd2-base", "xl")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: sd_folders.write(folder, name) for name in FAMILIES}


@pytest.fixture(scope="module")
def sd1(models) -> Path:
    return models["sd1"]


@pytest.fixture(scope="module")
def xl(models) -> Path:
    return models["xl"]


unet_of = cache(load_unet)
model_of = cache(load)


def rows(unet, count: int = 2) -> tuple[Rows, dict]:
    """Inputs of some rows, and the options that `diffusers` takes for the pooled vector."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(count, 4, 8, 8, generator=g)
    context = torch.randn(count, 77, unet.config["cross_attention_dim"], generator=g)
    t, pooled, options = torch.tensor([1, 801, 400, 20])[:count], None, {}
    if unet.config["addition_embed_type"]:
        texts, sizes = torch.randn(count, 24, generator=g), torch.arange(6 * count).reshape(count, 6)
        options = {"added_cond_kwargs": {"text_embeds": texts, "time_ids": sizes}}
        pooled = torch.cat([texts, unet.add_time_proj(sizes.flatten()).reshape(count, -1)], dim=-1)
    return Rows(x, t, context, pooled), options


def images(count: int = 2, seed: int = 6) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def written(folder: Path, model: Path, **options) -> tuple[ControlNetModel, Path]:
    network = control_net(unet_of(model), **options)
    network.save_pretrained(folder)
    return network, folder


def acting(control: Control, given: Rows, pixels: Tensor, mode="balanced", scale=1.0) -> AdapterInputs:
    """The scaled residuals of rows that all have the prompt."""
    inputs = control.inputs(control.prepare(pixels), given)
    return scaled(inputs, torch.tensor([weights(control, mode, scale, True)] * len(pixels)))


def expected(unet, network, given: Rows, options: dict, pixels: Tensor, **how) -> tuple:
    return network(
        given.x, given.t, given.context, controlnet_cond=pixels, return_dict=False, **how, **options
    )


def eps_of(unet, given: Rows, options: dict, down, middle) -> Tensor:
    return unet(
        given.x,
        given.t,
        given.context,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
        **options,
    ).sample


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_eps_of_each_family(family, models, tmp_path):
    model = models[family]
    network, folder = written(tmp_path / "control", model)
    unet, ours = unet_of(model), model_of(model)
    given, options = rows(unet)
    down, middle = expected(unet, network, given, options, images(), conditioning_scale=0.7)
    control = open_control(folder, ours.spec)
    eps = ours.unet(*given, adapters=acting(control, given, images(), scale=0.7))
    assert relative_error(eps, eps_of(unet, given, options, down, middle)) <= LIMIT
    assert relative_error(eps, ours.unet(*given)) > 0.01


@torch.inference_mode()
def test_eps_of_an_inpainting_model_whose_control_reads_the_latent_alone(tmp_path):
    model = sd_folders.write(tmp_path, "sd1-inpainting")
    network, folder = written(tmp_path / "control", model)
    unet, ours = unet_of(model), model_of(model)
    given, options = rows(unet)
    down, middle = expected(unet, network, given, options, images())
    control = open_control(folder, ours.spec)
    beside = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(8))
    whole = given._replace(x=torch.cat([given.x, beside], dim=1))
    eps = ours.unet(*whole, adapters=acting(control, given, images()))
    assert relative_error(eps, eps_of(unet, whole, options, down, middle)) <= LIMIT


@pytest.mark.parametrize("family", ["sd1", "xl"])
@pytest.mark.parametrize("how", ["prompt", "two", "pooled"])
@torch.inference_mode()
def test_eps_with_modes_two_controls_and_pooling(family, how, models, tmp_path):
    model = models[family]
    network, folder = written(tmp_path / "control", model, global_pool_conditions=how == "pooled")
    unet, ours = unet_of(model), model_of(model)
    given, options = rows(unet)
    guess = {"guess_mode": True} if how == "prompt" else {}
    down, middle = expected(unet, network, given, options, images(), **guess)
    inputs = acting(open_control(folder, ours.spec), given, images(), "prompt" if guess else "balanced")
    if how == "two":
        other, second = written(tmp_path / "second", model, seed=30)
        more, more_middle = expected(unet, other, given, options, images(seed=7), conditioning_scale=0.3)
        down, middle = [a + b for a, b in zip(down, more, strict=True)], middle + more_middle
        parts = [inputs, acting(open_control(second, ours.spec), given, images(seed=7), scale=0.3)]
        inputs = combined(2, [RowInputs([0, 1], part) for part in parts])
    eps = ours.unet(*given, adapters=inputs)
    assert relative_error(eps, eps_of(unet, given, options, down, middle)) <= LIMIT


@torch.inference_mode()
def test_a_row_with_two_controls_one_or_none_is_the_same_in_any_company(sd1, tmp_path):
    ours = model_of(sd1)
    controls = [
        open_control(written(tmp_path / str(seed), sd1, seed=seed)[1], ours.spec) for seed in (20, 30)
    ]
    given, _ = rows(unet_of(sd1), 4)

    def part(control: Control, numbers: list[int]) -> RowInputs:
        own = Rows(*(x[numbers] if x is not None else None for x in given))
        # Every call of a network has four rows, so that a row's last bits are the same.
        padded = Rows(*(x[[*numbers, 0, 0, 0, 0][:4]] if x is not None else None for x in given))
        acted = acting(control, padded, images(4)[[*numbers, 0, 0, 0, 0][:4]])
        count = len(own.x)
        return RowInputs(numbers, AdapterInputs(tuple(x[:count] for x in acted.skips), acted.middle[:count]))

    mixed = combined(4, [part(controls[0], [0, 1]), part(controls[1], [1])])
    eps, plain = ours.unet(*given, adapters=mixed), ours.unet(*given)
    assert torch.equal(eps[2:], plain[2:])
    one = ours.unet(*given, adapters=combined(4, [part(controls[0], [0])]))
    two = ours.unet(*given, adapters=combined(4, [part(controls[0], [1]), part(controls[1], [1])]))
    assert torch.equal(eps[0], one[0])
    assert torch.equal(eps[1], two[1])
    assert not torch.allclose(one[1], two[1], atol=1e-3)


SMALL = {
    "mid": {"down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            "transformer_layers_per_block": [1, 1, 1]},
    "small": {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["full", *SMALL])
@torch.inference_mode()
def test_each_layout_of_sdxl_full_mid_and_small(kind, xl, tmp_path):
    network, folder = written(tmp_path / "control", xl, **SMALL.get(kind, {}))
    check_layouts(network, folder, xl, tmp_path)


@torch.inference_mode()
def test_each_layout_of_sd1(sd1, tmp_path):
    check_layouts(*written(tmp_path / "control", sd1), sd1, tmp_path)


def check_layouts(network: ControlNetModel, folder: Path, model: Path, tmp_path: Path) -> None:
    """Every layout gives the residuals of `diffusers`; what we save, `diffusers` reads."""
    given, options = rows(unet_of(model))
    down, middle = expected(None, network, given, options, images())
    files = {
        "folder": folder,
        "diffusers": folder / "diffusion_pytorch_model.safetensors",
        "native": write_single_file(tmp_path / "edges.safetensors", network),
        "prefixed": write_single_file(tmp_path / "prefixed.safetensors", network, "control_model."),
        "training": write_single_file(tmp_path / "training.pth", network, "control_model."),
    }
    for path in files.values():
        control = open_control(path, read_spec(model), allow_pickle=True)
        ours = control.inputs(control.prepare(images()), given)
        for mine, theirs in zip((*ours.skips, ours.middle), (*down, middle), strict=True):
            assert relative_error(mine, theirs) <= LIMIT
    save_control(control.network, tmp_path / "saved", torch.float32)
    again = ControlNetModel.from_pretrained(tmp_path / "saved", low_cpu_mem_usage=False)
    assert relative_error(expected(None, again, given, options, images())[1], middle) <= LIMIT


@torch.inference_mode()
def test_image_channels_grey_and_blue_first(sd1, tmp_path):
    spec, pixels = read_spec(sd1), images()
    for options, changed in (
        ({"controlnet_conditioning_channel_order": "bgr"}, pixels),
        ({"conditioning_channels": 1}, pixels.mean(1, keepdim=True)),
    ):
        network, folder = written(tmp_path / str(len(options)) / next(iter(options)), sd1, **options)
        given, _ = rows(unet_of(sd1))
        theirs = expected(None, network, given, {}, changed)[1]
        control = open_control(folder, spec)
        assert relative_error(control.inputs(control.prepare(pixels), given).middle, theirs) <= LIMIT


def test_a_control_net_of_another_model_is_refused_with_both_numbers(sd1, xl, tmp_path):
    _, folder = written(tmp_path / "control", xl)
    with pytest.raises(CheckpointError, match="contexts 80 wide, the model's are 32 wide"):
        open_control(folder, read_spec(sd1))
    spec = read_spec(xl)
    for other, reason in (
        (
            replace(spec.unet, channels=(16, 32, 64)),
            r"input blocks have \[16, .*\] channels, the model's \[16",
        ),
        (replace(spec.unet, added_width=8), "pooled vector has 72 numbers, the model's 8"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            open_control(folder, replace(spec, unet=other))
    factor = replace(spec.autoencoder, channels=(16, 32))
    with pytest.raises(CheckpointError, match="8 pixels for a latent cell, the model's VAE 2"):
        open_control(folder, replace(spec, autoencoder=factor))


def test_missing_and_other_files_are_refused(sd1, tmp_path):
    spec = read_spec(sd1)
    with pytest.raises(CheckpointError, match="is not a ControlNet or a T2I-Adapter"):
        open_control(sd1 / "unet" / "diffusion_pytorch_model.safetensors", spec)
    network, folder = written(tmp_path / "control", sd1)
    network.controlnet_mid_block = torch.nn.Identity()
    network.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"2 missing keys: controlnet_mid_block.bias"):
        open_control(folder, spec)
    with pytest.raises(CheckpointError, match="need allow_pickle"):
        open_control(write_single_file(tmp_path / "a.pth", control_net(unet_of(sd1))), spec)


@pytest.mark.parametrize(
    ("start", "end", "steps"),
    [(0.0, 1.0, [0, 1, 2, 3, 4]), (0.0, 0.5, [0, 1]), (0.2, 0.8, [1, 2, 3]), (0.3, 1.0, [2, 3, 4])],
)
def test_a_window_contains_the_steps_that_lie_in_it(start, end, steps):
    assert [step for step in range(5) if is_active(step, 5, start, end)] == steps


def test_weights_of_each_mode(sd1, tmp_path):
    control = open_control(written(tmp_path / "control", sd1)[1], read_spec(sd1))
    ramp = torch.logspace(-1, 0, 13).mul(0.8).tolist()
    assert weights(control, "balanced", 0.8, False) == (0.8,) * 13
    for mode, conditional in (("prompt", True), ("prompt", False), ("control", True)):
        assert weights(control, mode, 0.8, conditional) == pytest.approx(ramp)
    assert weights(control, "control", 0.8, False) == ()
    averaging = replace(control, spec=replace(control.spec, global_pool=True))
    assert weights(averaging, "balanced", 0.8, False) == ()
    assert weights(averaging, "prompt", 0.8, True) == (0.8,) * 13


def test_memory_of_the_weights(sd1, tmp_path):
    network, folder = written(tmp_path / "control", sd1)
    control = open_control(folder, read_spec(sd1), dtype=torch.float16)
    assert control.bytes == 2 * sum(weight.numel() for weight in network.parameters())


@pytest.mark.parametrize("layout", ["folder", "file"])
@pytest.mark.parametrize("kind", [0, 5])
@torch.inference_mode()
def test_one_network_for_several_kinds_of_control_image(xl, kind, layout, tmp_path):
    network, folder = written(tmp_path / "control", xl, union=6)
    given, options = rows(unet_of(xl))
    flags = torch.nn.functional.one_hot(torch.tensor([kind, kind]), 6)
    pixels = images(1).expand(2, -1, -1, -1)  # as for the two rows of one image
    how = {"control_type": flags, "control_type_idx": [kind], "controlnet_cond": [pixels]}
    down, middle = network(given.x, given.t, given.context, return_dict=False, **how, **options)
    path = folder if layout == "folder" else folder / "diffusion_pytorch_model.safetensors"
    control = open_control(path, read_spec(xl))
    assert control.types == ("openpose", "depth", "soft_edge", "hard_edge", "normal", "segmentation")
    ours = control.inputs(control.prepare(pixels), given, torch.tensor([kind, kind]))
    for mine, theirs in zip((*ours.skips, ours.middle), (*down, middle), strict=True):
        assert relative_error(mine, theirs) <= LIMIT


@torch.inference_mode()
def test_rows_of_one_call_may_have_different_kinds_of_control_image(xl, tmp_path):
    control = open_control(written(tmp_path / "control", xl, union=6)[1], read_spec(xl))
    given, prepared = rows(unet_of(xl))[0], control.prepare(images())
    one, other, both = (
        control.inputs(prepared, given, torch.tensor(types)).middle for types in ([1, 1], [3, 3], [1, 3])
    )
    assert torch.equal(both, torch.stack([one[0], other[1]]))


@pytest.mark.parametrize("kind", ["Control-LoRA", "difference"])
@torch.inference_mode()
def test_weights_stored_as_changes_of_the_base_model(sd1, kind, tmp_path):
    network, base = control_net(unet_of(sd1)), model_of(sd1)
    unet = base.unet.state_dict()
    if kind == "difference":
        network.time_embedding.linear_1.bias.copy_(unet["time_embed.0.bias"])
        file, whole = difference(network, unet), published(network)
    else:
        file, whole = control_lora(network, unet)
    save_file({key: value.contiguous() for key, value in file.items()}, tmp_path / "edges.safetensors")
    control = open_control(tmp_path / "edges.safetensors", base.spec, unet=base.unet)
    for key, value in control.network.state_dict().items():
        torch.testing.assert_close(value, whole[key])
    assert kind in control.kind
    assert "changes of sd1's weights" in control.misfit(replace(base.spec, name="other"))
    with pytest.raises(CheckpointError, match="needs the weights of its base model"):
        open_control(tmp_path / "edges.safetensors", base.spec)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        (
            "lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q.down.0.weight",
            "a ControlLLLite, which",
        ),
        ("style_embedding", "a T2I style adapter, which is not supported"),
    ],
)
def test_kinds_that_are_not_supported_are_named(sd1, key, named, tmp_path):
    save_file({key: torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=named):
        open_control(tmp_path / "a.safetensors", read_spec(sd1))


def test_pixels_to_repaint_are_minus_one_or_black(sd1, xl, tmp_path):
    control = open_control(written(tmp_path / "sd15_inpaint", sd1)[1], read_spec(sd1))
    union = open_control(written(tmp_path / "union", xl, union=8)[1], read_spec(xl))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    assert control.inpaints
    assert (masked(control, images(1), mask)[..., :32] == -1).all()
    assert (masked(union, images(1), mask)[..., :32] == 0).all()
    assert torch.equal(masked(control, images(1), mask)[..., 32:], images(1)[..., 32:])
