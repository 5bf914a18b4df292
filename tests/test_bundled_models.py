"""The bundled models, as a user meets them in a fresh clone."""

from __future__ import annotations

import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.adapters import lora
from models.adapters.control_net import open_control
from models.checkpoint import load
from models.dtypes import choose_dtype
from models.latent_diffusion import LatentDiffusion
from models.spec import ALL_TASKS
from models.training.crops import larger, smaller
from models.training.evaluate import (
    Judge,
    Painter,
    background,
    extent,
    held_out_prompts,
    named_object_accuracy,
    nearest_colour,
    overlap,
    psnr,
    related_objects,
    to_images,
)
from models.training.evaluate_control import draw, outlines_of, overlaps
from models.training.few_steps import LORA_FILE
from models.training.scenes import COLOURS, Atlas, held_out_scenes
from service.requests.labels import colour_of
from tests.helpers.clients import alone, image_of, together, worst_psnr
from tests.helpers.environment import ROOT, needs_font
from tests.helpers.images import png
from tests.helpers.servers import Server

EMOJI, UPSCALER = ROOT / "weights" / "emoji", ROOT / "weights" / "emoji-upscale"
OUTLINE = ROOT / "weights" / "emoji-outline"  # a ControlNet of EMOJI
FEW_STEPS = ROOT / "weights" / "emoji-few-steps"  # a LoRA of EMOJI
NAMES = (EMOJI / "names.txt").read_text().splitlines()


@pytest.mark.slow
def test_the_command_generates_a_red_apple_on_a_blue_background(tmp_path: Path) -> None:
    file = tmp_path / "apple.png"
    prompt = "red apple on a blue background"
    command = [sys.executable, "-m", "service.cli", "generate", prompt, "-o", str(file), "--seed", "2"]
    subprocess.run(command, cwd=ROOT, check=True)
    image = np.asarray(Image.open(file))
    assert nearest_colour(background(image)) == "blue"
    left, top, right, bottom = extent(image)
    x, y = (left + right) // 2, (top + bottom) // 2
    red, green, blue = image[y - 16 : y + 16, x - 16 : x + 16].reshape(-1, 3).mean(0)
    assert red > 2 * max(green, blue)


@pytest.mark.slow
@needs_font
@torch.inference_mode()
def test_most_held_out_prompts_are_recognised_in_their_images() -> None:
    bundle, judge = load(EMOJI), Judge(Atlas())
    pairs = held_out_prompts(NAMES, 10)
    images = {}

    def draw(prompts: list[str]) -> np.ndarray:
        images["all"] = to_images(bundle.sample(prompts, range(len(prompts)), 10, 3.0))
        return images["all"]

    accuracy = named_object_accuracy(judge, pairs, draw)
    assert accuracy.top5 >= 0.6  # the model card has the figure over 600 prompts
    assert accuracy.background == 1.0
    shuffled = named_object_accuracy(judge, pairs, lambda prompts: np.roll(images["all"], 1, axis=0))
    assert shuffled.top5 <= 0.2


@pytest.mark.slow
@needs_font
@torch.inference_mode()
def test_two_objects_are_where_the_prompt_says() -> None:
    drawn, placed = related_objects(Judge(Atlas()), Painter(load(EMOJI), 10, 3.0, 16), NAMES, 10)
    assert placed >= 0.5  # by chance half of `drawn`; the model card has the figure over 200 prompts
    assert placed > 0.75 * drawn


def made(server: Server, path: str = "/generate", **body) -> np.ndarray:
    """The first image of a response, uint8 (H, W, 3)."""
    return image_of(server.client.post(path, json={"seed": 1} | body))


def test_together_they_do_every_task(bundled: Server) -> None:
    model, upscaler = bundled.client.get("/models").json()["models"]
    assert {*model["tasks"], *upscaler["tasks"]} == set(ALL_TASKS)
    assert upscaler["upscaling"]["scale"] == 4
    assert model["inpainting"] == "mask channels"
    assert [label["name"] for label in model["labels"]] == NAMES


def test_a_class_label_is_the_prompt_of_its_name(bundled: Server) -> None:
    expected = made(bundled, prompt="ghost")
    assert (made(bundled, class_label="ghost") == expected).all()
    assert (made(bundled, class_label=NAMES.index("ghost")) == expected).all()


def test_boxes_and_segmentations_place_objects(bundled: Server) -> None:
    inside = []
    for name in ("red apple", "ghost", "watermelon", "soccer ball"):
        pixels = made(
            bundled, prompt=name, boxes=[{"name": name, "x": 0.25, "y": 0.25, "w": 0.75, "h": 0.75}]
        )
        inside.append(overlap(extent(pixels), (32, 32, 128, 128)) > 0.5)
    assert sum(inside) >= 3  # nearly all, according to the model card
    regions = np.zeros((16, 16, 3), np.uint8)
    regions[4:, 4:] = colour_of(NAMES.index(name) + 1)
    assert (made(bundled, prompt=name, segmentation=png(regions)) == pixels).all()


def test_inpainting_follows_the_prompt_and_keeps_the_rest(bundled: Server) -> None:
    sent = np.full((128, 128, 3), COLOURS["blue"], np.uint8)
    sent[:8] = np.random.default_rng(0).integers(0, 256, (8, 128, 3))
    mask = np.zeros((128, 128), np.uint8)
    mask[16:112, 16:112] = 255
    body = {"image": png(sent), "mask": png(mask), "prompt": "red apple on a blue background"}
    filled = made(bundled, "/inpaint", **body)
    assert (filled[mask == 0] == sent[mask == 0]).all()
    red, green, blue = filled[48:96, 48:80].reshape(-1, 3).mean(0)
    assert red > 2 * max(green, blue)


def test_a_prompt_is_optional_and_sizes_may_vary(bundled: Server) -> None:
    assert made(bundled).shape == (128, 128, 3)
    wide = made(bundled, prompt="owl on a green background", width=256)
    assert wide.shape == (128, 256, 3)
    assert nearest_colour(background(wide)) == "green"


@needs_font
def test_upscaling_is_nearer_to_the_original_than_resampling(bundled: Server) -> None:
    scenes = np.stack([scene.image for scene in held_out_scenes(Atlas(), 8, seed=9)])
    low = smaller(scenes)
    made_larger = np.stack([made(bundled, "/upscale", image=png(image)) for image in low])
    assert (
        psnr(made_larger, scenes) > psnr(larger(low), scenes) + 1.0
    )  # the model card has the figure over more


def test_a_large_image_is_upscaled_without_seams(bundled: Server) -> None:
    row, column = np.mgrid[:90, :150]
    sent = np.stack([row * 2, column, 255 - row - column // 2], axis=-1).clip(0, 255).astype(np.uint8)
    pixels = made(bundled, "/upscale", image=png(sent))
    assert pixels.shape == (360, 600, 3)
    assert psnr(pixels, larger(sent[None])[0]) > 34
    jumps = np.abs(np.diff(pixels.astype(int), axis=1)).mean(axis=(0, 2))
    assert jumps[8:-8].max() < 4  # a smooth image jumps nowhere but at its edge


@pytest.mark.slow
@needs_font
@torch.inference_mode()
def test_objects_fill_the_outline_of_a_control_image() -> None:
    model, scenes = load(EMOJI), held_out_scenes(Atlas(NAMES), 8, seed=12)
    control = open_control(OUTLINE, model.spec).network
    prompts = [scene.caption for scene in scenes]
    with_outline = overlaps(scenes, draw(model, prompts, 8, control, outlines_of(scenes)))
    without = overlaps(scenes, draw(model, prompts, 8))
    assert (with_outline > 0.6).sum() >= 7
    assert np.median(with_outline) > np.median(without) + 0.1


@pytest.fixture(scope="module")
def adapted() -> LatentDiffusion:
    """EMOJI with the LoRA for few steps, in the dtype that a server chooses."""
    model = load(EMOJI, dtype=choose_dtype("auto", torch.device("cpu")))
    loras = lora.open_loras({"few": FEW_STEPS / LORA_FILE}, {"emoji": model.spec})["emoji"]
    return lora.apply(model, [(loras["few"], 1.0, 1.0)])


@pytest.mark.slow
@needs_font
@torch.inference_mode()
def test_with_the_lora_four_steps_without_guidance_are_enough(adapted: LatentDiffusion) -> None:
    judge, pairs = Judge(Atlas()), held_out_prompts(NAMES, 10)
    right = named_object_accuracy(judge, pairs, Painter(adapted, 4, 1.0, len(pairs))).top1
    assert right >= 0.7


@torch.inference_mode()
def test_jobs_with_the_lora_share_calls_whatever_their_samplers(
    bundled: Server, adapted: LatentDiffusion
) -> None:
    few = {"prompt": "owl on a red background", "steps": 4, "guidance_scale": 1, "loras": {"few-steps": 1}}
    samplers = ("lcm", "ddim", "euler", "lcm", "dpmpp_2m", "ddim")
    bodies = [few | {"sampler": name, "seed": seed} for seed, name in enumerate(samplers)]
    bodies.append({"prompt": "owl", "steps": 6, "seed": 1})  # without the LoRA: in calls of its own
    images = alone(bundled, bodies)
    for seed in (0, 3):
        (expected,) = to_images(adapted.sample([few["prompt"]], [seed], 4, 1.0, sampler="lcm"))
        assert psnr(images[seed], expected) > 40
    before = bundled.client.get("/activity").json()["last"]
    with ThreadPoolExecutor() as pool:
        answers = together(bundled, pool, bodies)
        assert worst_psnr(images, answers) > 40
    ids = [answer.result().json()["id"] for answer in answers]
    by_tag = {f"{zlib.crc32(id.encode()):08x}": index for index, id in enumerate(ids)}
    calls = bundled.client.get("/activity", params={"after": before}).json()["calls"]
    shared = [{by_tag[job["tag"]] for job in call["jobs"]} for call in calls]
    assert any({samplers[index] for index in jobs if index < 6} >= {"lcm", "ddim"} for jobs in shared)
    assert all(jobs == {6} for jobs in shared if 6 in jobs)


def test_they_are_small_and_have_a_model_card() -> None:
    files = [file for file in EMOJI.parent.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) < 52 * 2**20
    assert len(NAMES) >= 150
    assert all((folder / "README.md").is_file() for folder in (EMOJI, UPSCALER, OUTLINE, FEW_STEPS))


@pytest.mark.slow
def test_a_worker_imports_neither_the_compiler_nor_transformers_networks() -> None:
    """torch's compiler and the networks of transformers: a worker that loads and draws needs neither."""
    code = (
        "import sys, torch\n"
        "import service.device.runner\n"
        "from models import checkpoint\n"
        "bundle = checkpoint.load('weights/emoji')\n"
        "with torch.inference_mode():\n"
        "    bundle.sample(['red apple'], seeds=[1], steps=1, guidance_scale=3.0)\n"
        "print(*sorted({'torch._dynamo', 'transformers.modeling_utils'} & {*sys.modules}))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == ""
