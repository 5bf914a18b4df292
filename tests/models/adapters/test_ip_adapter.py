"""IP-Adapters and their image encoders against `diffusers` and `transformers`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor

from models.adapters.image_encoder import normalised, open_image_encoder
from models.adapters.ip_adapter import open_adapter
from models.checkpoint import CheckpointError, load
from models.formats.identify import read_spec
from models.networks.adapter_inputs import RowInputs, combined
from tests.checkpoints import sd_folders
from tests.checkpoints.control_files import load_unet
from tests.checkpoints.ip_files import image_encoder, ip_adapter, write_image_encoder, write_ip_adapter
from tests.helpers.numbers import LIMIT, relative_error

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: sd_folders.write(folder, name) for name in ("sd1", "xl")}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return write_image_encoder(tmp_path_factory.mktemp("encoder"))


def image(seed: int = 6) -> torch.Tensor:
    return torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def rows(unet) -> tuple[tuple, dict]:
    """Inputs of two rows, and the options of `diffusers` for the pooled vector."""
    g = torch.Generator().manual_seed(5)
    x, context = (
        torch.randn(2, 4, 8, 8, generator=g),
        torch.randn(2, 77, unet.config["cross_attention_dim"], generator=g),
    )
    t, pooled, added = torch.tensor([1, 801]), None, {}
    if unet.config["addition_embed_type"]:
        texts, sizes = torch.randn(2, 24, generator=g), torch.arange(12).reshape(2, 6)
        added = {"text_embeds": texts, "time_ids": sizes}
        pooled = torch.cat([texts, unet.add_time_proj(sizes.flatten()).reshape(2, -1)], dim=-1)
    return (x, t, context, pooled), added


def embeddings(network, pixels, kind: str) -> torch.Tensor:
    """What `diffusers` gives an adapter: of no image, then of the image."""
    x = normalised(pixels, 28)
    if kind == "plain":
        projected = network(x).image_embeds
        return torch.cat([torch.zeros_like(projected), projected])[:, None]
    return torch.cat(
        [network(given, output_hidden_states=True).hidden_states[-2] for given in (torch.zeros_like(x), x)]
    )[:, None]


@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
@pytest.mark.parametrize("family", ["sd1", "xl"])
@torch.inference_mode()
def test_eps_of_each_kind(models, encoder, family, kind, tmp_path):
    unet, ours = load_unet(models[family]), load(models[family])
    tensors, network = ip_adapter(unet, kind), image_encoder()
    given, added = rows(unet)
    adapter = open_adapter(write_ip_adapter(tmp_path / "ip.safetensors", tensors), encoder, ours.spec)
    inputs = adapter.inputs(*adapter.prepare(image()), torch.tensor([0.7, 0.7]))
    eps = ours.unet(*given, adapters=inputs)
    unet._load_ip_adapter_weights([tensors], low_cpu_mem_usage=False)
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.7]
    if kind == "full":  # its processors take 257 tokens; these encoders have 17
        for processor in unet.attn_processors.values():
            processor.num_tokens = (17,)
    added["image_embeds"] = [embeddings(network, image(), kind)]
    theirs = unet(*given[:3], added_cond_kwargs=added).sample
    assert relative_error(eps, theirs) <= LIMIT
    assert relative_error(eps, ours.unet(*given)) > 0.01


@torch.inference_mode()
def test_rows_without_an_image_keep_their_bits_and_kinds_mix(models, encoder, tmp_path):
    unet, ours = load_unet(models["sd1"]), load(models["sd1"])
    plain, plus = (
        open_adapter(
            write_ip_adapter(tmp_path / f"{kind}.safetensors", ip_adapter(unet, kind)), encoder, ours.spec
        )
        for kind in ("plain", "plus")
    )
    (x, t, context, _), _ = rows(unet)
    given = (x.repeat(2, 1, 1, 1), t.repeat(2), context.repeat(2, 1, 1))

    def part(adapter, row: int, scale: float) -> RowInputs:
        keys, values = adapter.prepare(image(row))
        return RowInputs([row], adapter.inputs(keys[1:], values[1:], torch.tensor([scale])))

    def eps(*parts: RowInputs) -> torch.Tensor:
        return ours.unet(*given, adapters=combined(4, parts))

    first, second, both = part(plain, 1, 0.5), part(plus, 2, 1.0), part(plain, 2, 0.3)
    mixed, none = eps(first, second, both), ours.unet(*given)
    assert torch.equal(mixed[[0, 3]], none[[0, 3]])
    assert torch.equal(mixed[1], eps(first)[1])
    assert torch.equal(mixed[2], eps(second, both)[2])
    assert not torch.allclose(mixed[1:3], none[1:3], atol=1e-3)
    assert len(combined(4, [first, second, both]).images) == 2


@torch.inference_mode()
def test_pickled_and_safe_files_are_the_same(models, encoder, tmp_path):
    unet, spec = load_unet(models["sd1"]), read_spec(models["sd1"])
    files = [
        write_ip_adapter(tmp_path / name, ip_adapter(unet, "plus")) for name in ("a.bin", "a.safetensors")
    ]
    first, second = (open_adapter(file, encoder, spec, allow_pickle=True) for file in files)
    for ours, theirs in zip(first.prepare(image()), second.prepare(image()), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(CheckpointError, match="need allow_pickle"):
        open_adapter(files[0], encoder, spec)


@torch.inference_mode()
def test_the_image_encoder_is_that_of_transformers(tmp_path, encoder):
    theirs = image_encoder()(normalised(image(), 28), output_hidden_states=True)
    tensors = image_encoder().state_dict()
    complete = tensors | {
        "text_model.x": torch.zeros(1),
        "vision_model.embeddings.position_ids": torch.zeros(1),
    }
    (folder := tmp_path / "complete").mkdir()
    (folder / "config.json").write_bytes((encoder / "config.json").read_bytes())
    save_file(complete, folder / "model.safetensors")
    for path in (encoder, folder):
        projected, states = open_image_encoder(path).encode(image())
        assert relative_error(projected, theirs.image_embeds) <= LIMIT
        assert relative_error(states, theirs.hidden_states[-2]) <= LIMIT


@pytest.mark.parametrize("size", [(40, 40), (75, 40), (33, 90)])
def test_images_are_scaled_and_cropped_as_transformers_does(size):
    pixels = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
    theirs = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
    ours = normalised(torch.from_numpy(pixels).movedim(-1, 0)[None] / 255, 28)
    assert (ours - theirs).abs().max() <= 1e-5


def test_adapters_that_do_not_fit_are_refused_with_both_numbers(models, encoder, tmp_path):
    xl, sd1 = read_spec(models["xl"]), read_spec(models["sd1"])
    tensors = ip_adapter(load_unet(models["xl"]), "plain")
    file = write_ip_adapter(tmp_path / "ip.safetensors", tensors)
    unet = replace(sd1.unet, context_width=80)
    for model, reason in (
        (sd1, "tokens are 80 wide, the model's contexts 32 wide"),
        (replace(sd1, unet=unet), "for 28 cross-attention layers, the model has 16"),
        (
            replace(xl, unet=replace(xl.unet, channels=(16, 32, 64))),
            "layer 9 has 48 channels, the model's 64",
        ),
    ):
        with pytest.raises(CheckpointError, match=reason):
            open_adapter(file, encoder, model)
    tensors["image_proj"]["proj.weight"] = torch.zeros(320, 8)
    with pytest.raises(CheckpointError, match="image vectors 8 wide, the image encoder gives 24"):
        open_adapter(write_ip_adapter(tmp_path / "b.safetensors", tensors), encoder, xl)


def test_kinds_and_files_that_are_not_supported_are_named(models, encoder, tmp_path):
    spec, tensors = read_spec(models["sd1"]), ip_adapter(load_unet(models["sd1"]))
    tensors["ip_adapter"]["0.to_q_lora.down.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="an IP-Adapter FaceID, which needs a face recognition model"):
        open_adapter(write_ip_adapter(tmp_path / "a.safetensors", tensors), encoder, spec)
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="is not an IP-Adapter"):
        open_adapter(tmp_path / "b.safetensors", encoder, spec)
    with pytest.raises(CheckpointError, match="is not a CLIP image encoder"):
        open_image_encoder(tmp_path / "b.safetensors")


@pytest.mark.parametrize("missing", ["ip_adapter.31.to_v_ip.weight", "image_proj.norm.bias"])
def test_missing_tensors_are_named(models, encoder, missing, tmp_path):
    tensors = ip_adapter(load_unet(models["sd1"]))
    part, _, key = missing.partition(".")
    tensors[part].pop(key)
    with pytest.raises(CheckpointError, match=r"1 missing keys: (values\.weight|image_proj\.norm\.bias)"):
        open_adapter(write_ip_adapter(tmp_path / "a.safetensors", tensors), encoder, read_spec(models["sd1"]))
