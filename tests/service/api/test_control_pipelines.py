"""Controls and reference images over HTTP: the images that the pipelines of `diffusers` make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor, nn

from models.adapters.image_encoder import normalised
from tests.checkpoints import sd_folders
from tests.checkpoints.control_files import control_net, t2i_adapter
from tests.checkpoints.ip_files import image_encoder, ip_adapter, write_image_encoder, write_ip_adapter
from tests.helpers.clients import image_of
from tests.helpers.images import base64_of, psnr
from tests.helpers.servers import Server

pytestmark = pytest.mark.slow

MODELS = ("sd1", "sd1-inpainting", "xl")
BODY = {
    "prompt": "red apple on a blue background!",
    "negative_prompt": "pear",
    "guidance_scale": 4.0,
    "seed": 7,
    "steps": 5,
}
PIXELS = np.random.default_rng(3).integers(0, 256, (3, 64, 64, 3), np.uint8)
IMAGES = [base64_of(Image.fromarray(pixels)) for pixels in PIXELS]
MASK = np.zeros((64, 64), np.uint8)
MASK[8:40, 16:56] = 255


def unit(index: int) -> Tensor:
    """An image as `diffusers` takes it: (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(PIXELS[index].copy()).movedim(-1, 0)[None] / 255


@dataclass
class Pipelines:
    """The pipelines of `diffusers`, and the networks of the adapters that the server has, by name."""

    models: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, Any] = field(default_factory=dict)

    def run(self, model: str, kind: str, parts: dict[str, Any], **options: Any) -> np.ndarray:
        """The image (H, W, 3), from 0 to 255, of another pipeline with the model's networks."""
        networks = self.models[model].components | parts
        if "adapter" in parts:
            networks.pop("image_encoder", None)  # the pipelines of T2I-Adapters have none
        pipeline = getattr(diffusers, kind)(**networks)
        pipeline.set_progress_bar_config(disable=True)
        start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
        given = {"prompt": BODY["prompt"], "negative_prompt": BODY["negative_prompt"], "guidance_scale": 4.0,
                 "num_inference_steps": 5, "latents": start, "output_type": "np"}  # fmt: skip
        with torch.inference_mode():
            return pipeline(**given | options).images[0] * 255


@pytest.fixture(scope="module")
def pipelines() -> Pipelines:
    models = {name: sd_folders.pipeline(name) for name in MODELS}
    nets: dict[str, tuple[str, int, dict[str, Any]]] = {
        "edges": ("sd1", 20, {}),
        "depth": ("sd1", 30, {}),
        "mean": ("sd1", 40, {"global_pool_conditions": True}),
        "fill": ("sd1-inpainting", 20, {}),
        "xl-edges": ("xl", 20, {}),
    }
    adapters: dict[str, Any] = {
        name: control_net(models[model].unet, seed, **options)
        for name, (model, seed, options) in nets.items()
    }
    adapters |= {"sketch": t2i_adapter(models["sd1"].unet), "xl-sketch": t2i_adapter(models["xl"].unet)}
    for model, name in (("sd1", "face"), ("xl", "xl-face")):
        adapters |= {f"{name}-{kind}": ip_adapter(models[model].unet, kind) for kind in ("plain", "plus")}
    return Pipelines(models, adapters)


@pytest.fixture(scope="module")
def server(pipelines: Pipelines, start_server, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    for name, pipeline in pipelines.models.items():
        pipeline.save_pretrained(folder / name)
    controls, references = [], []
    for name, adapter in pipelines.adapters.items():
        if isinstance(adapter, nn.Module):
            adapter.save_pretrained(folder / "controls" / name)
            controls.append(f"{name}={folder / 'controls' / name}")
        else:
            references.append(f"{name}={write_ip_adapter(folder / f'{name}.safetensors', adapter)}")
    encoder = write_image_encoder(folder / "encoder")
    settings = {"LDM_CONTROLNET": ",".join(controls), "LDM_REFERENCE_ADAPTER": ",".join(references)}
    with start_server(
        *(folder / name for name in MODELS), LDM_IMAGE_ENCODER=str(encoder), **settings
    ) as started:
        yield started


def check(server: Server, body: dict[str, Any], expected: np.ndarray, path: str = "/generate") -> None:
    """The server's image is the expected one, and not the one without adapters."""
    pixels = image_of(server.client.post(path, json=BODY | body))
    plain = {key: value for key, value in body.items() if key not in ("controls", "reference_images")}
    without = image_of(server.client.post(path, json=BODY | plain))
    hole = MASK > 0 if path == "/inpaint" else np.ones_like(MASK, bool)
    assert expected.std() > 10
    assert psnr(pixels[hole], expected[hole]) > max(40, psnr(pixels[hole], without[hole]) + 10)


def control(name: str, index: int = 0, **changes: Any) -> dict[str, Any]:
    return {"model": name, "image": IMAGES[index]} | changes


ONE, TWO = [control("edges", scale=0.8)], [control("edges", scale=0.8), control("depth", 1, scale=0.4)]
CASES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "one": ("sd1", ONE, {"controlnet_conditioning_scale": 0.8}),
    "two": ("sd1", TWO, {"controlnet_conditioning_scale": [0.8, 0.4]}),
    "guess mode": ("sd1", [control("edges", mode="control")], {"guess_mode": True}),
    "window": (
        "sd1", [control("edges", start=0.2, end=0.7)],
        {"control_guidance_start": 0.2, "control_guidance_end": 0.7},
    ),
    "two windows": (
        "sd1", [control("edges", end=0.6), control("depth", 1, start=0.4)],
        {"control_guidance_start": [0.0, 0.4], "control_guidance_end": [0.6, 1.0]},
    ),
    "averaging": ("sd1", [control("mean")], {}),
    "xl": ("xl", [control("xl-edges", scale=0.8)], {"controlnet_conditioning_scale": 0.8}),
    "xl guess mode": ("xl", [control("xl-edges", mode="control")], {"guess_mode": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_control_nets(server, pipelines, case):
    model, controls, options = CASES[case]
    networks = [pipelines.adapters[each["model"]] for each in controls]
    images = [unit(IMAGES.index(each["image"])) for each in controls]
    one = len(controls) == 1
    kind = "StableDiffusionXLControlNetPipeline" if model == "xl" else "StableDiffusionControlNetPipeline"
    expected = pipelines.run(
        model,
        kind,
        {"controlnet": networks[0] if one else networks},
        image=images[0] if one else images,
        **options,
    )
    check(server, {"model": model, "controls": controls}, expected)


def test_inpainting_with_a_control_net(server, pipelines, monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    expected = pipelines.run(
        "sd1-inpainting", "StableDiffusionControlNetInpaintPipeline",
        {"controlnet": pipelines.adapters["fill"]}, image=unit(2), control_image=unit(0), strength=1.0,
        controlnet_conditioning_scale=1.0,
        mask_image=torch.from_numpy(MASK)[None, None] / 255,
    )  # fmt: skip
    body = {"model": "sd1-inpainting", "image": IMAGES[2], "mask": base64_of(Image.fromarray(MASK))}
    check(server, body | {"controls": [control("fill")]}, expected, "/inpaint")


@pytest.mark.filterwarnings("ignore:The decode_latents method:FutureWarning")
@pytest.mark.parametrize("model", ["sd1", "xl"])
def test_t2i_adapters(server, pipelines, model):
    name = "xl-sketch" if model == "xl" else "sketch"
    kind = "StableDiffusionXLAdapterPipeline" if model == "xl" else "StableDiffusionAdapterPipeline"
    expected = pipelines.run(
        model, kind, {"adapter": pipelines.adapters[name]}, image=unit(0), adapter_conditioning_scale=0.7
    )
    check(server, {"model": model, "controls": [control(name, scale=0.7)]}, expected)


@pytest.mark.parametrize("kind", ["plain", "plus"])
@pytest.mark.parametrize("model", ["sd1", "xl"])
def test_ip_adapters(server, pipelines, model, kind):
    name = f"xl-face-{kind}" if model == "xl" else f"face-{kind}"
    pipeline, network = sd_folders.pipeline(model), image_encoder()
    pipeline.unet._load_ip_adapter_weights([pipelines.adapters[name]], low_cpu_mem_usage=False)
    pipeline.set_ip_adapter_scale(0.6)
    changed = Pipelines({model: pipeline})
    expected = changed.run(
        model, type(pipeline).__name__, {}, ip_adapter_image_embeds=[embeddings(network, unit(1), kind)]
    )
    reference = {"adapter": name, "image": IMAGES[1], "scale": 0.6}
    check(server, {"model": model, "reference_images": [reference]}, expected)


@torch.inference_mode()
def embeddings(network: Callable[..., Any], pixels: Tensor, kind: str) -> Tensor:
    """What a pipeline computes of an image: of none for negative prompts, then of the image."""
    x = normalised(pixels, 28)
    if kind == "plain":
        projected = network(x).image_embeds
        return torch.cat([torch.zeros_like(projected), projected])[:, None]
    both = [network(given, output_hidden_states=True).hidden_states[-2] for given in (torch.zeros_like(x), x)]
    return torch.cat(both)[:, None]
