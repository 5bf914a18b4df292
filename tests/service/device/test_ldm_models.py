"""Every model of the latent diffusion paper, narrow, through the engine, against reference runs in this file.

The networks themselves are compared with other implementations in tests/models. This file implements again
how they are conditioned (context and concat channels), the DDIM run, and the conversion to pixels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection

from models.checkpoint import CheckpointError, load
from models.conditioning.conditioner import ConditioningInput
from models.formats import companions as words_of
from models.latent_diffusion import LatentDiffusion
from models.networks.autoencoder import Autoencoder
from service.api.native import describe
from service.device.loading import build
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.errors import InvalidRequest
from service.requests.resolve import resolve
from service.requests.resolved_request import ResolvedRequest
from service.requests.schemas import GenerateRequest, UpscaleRequest
from service.settings import Settings
from tests.checkpoints.ldm_models import FIRST_STAGES, ROWS, thin, write
from tests.checkpoints.tiny import byte_tokenizer, fill_randomly
from tests.helpers.images import IMAGE, MASK, png, psnr
from tests.helpers.ldm_requests import BODIES, BOXES, CLASSES, SIDES, SMALL, TASKS, painted, schema_of
from tests.helpers.reference_schedule import their_timesteps
from tests.helpers.torch_runner import run_together

pytestmark = pytest.mark.slow

STEPS = 4


OTHERS = {  # changes to BODIES for the jobs that run at the same time
    "cin256": {"class_label": 0},
    "cin256-v2": {"class_label": 5, "guidance_scale": 1.0},
    "layout2img": {"boxes": BOXES[:1]},
    "semantic_synthesis": {"segmentation": painted(CLASSES.T)},
    "text2img256": {"prompt": "apple", "guidance_scale": 1.0},
    "txt2img-1p4B": {"prompt": "apple", "guidance_scale": 1.0},
    "rdm768": {"prompt": "apple", "negative_prompt": "red", "guidance_scale": 2.0},
}


def resolved(runner: TorchRunner, name: str, **body) -> ResolvedRequest:
    if schema_of(name) is GenerateRequest:
        body = {"width": SIDES.get(name, 64), "height": SIDES.get(name, 64)} | body
    return resolve(schema_of(name).model_validate(body), runner.specs, Settings())


@pytest.fixture(scope="module", params=ROWS)
def loaded(request, tmp_path_factory) -> tuple[str, Path, TorchRunner]:
    folder = tmp_path_factory.mktemp("models")
    file = write(folder, request.param)
    return request.param, folder, TorchRunner(Registry({"m": file}, load), buckets=(2, 4, 8))


# For each model: (unconditional context, context, concat channels), computed from its weights.


def conditioning(name: str, model: LatentDiffusion, folder: Path):
    weights = {} if model.conditioner is None else model.conditioner.state_dict()
    return CONDITIONING[name](model, weights, folder)


def nothing(model, weights, folder):
    return None, None, None


def a_class(number, null):
    def compute(model, weights, folder):
        table = weights["embedding.weight"]
        return None if null is None else table[null][None, None], table[number][None, None], None

    return compute


def words(negative, positive):
    """Token ids of two prompts. In this vocabulary [PAD] is 0, [CLS] 2 and [SEP] 3; words begin at 5."""

    def compute(model, weights, folder):
        ids = torch.zeros(2, 77, dtype=torch.long)
        for row, text in enumerate((negative, positive)):
            tokens = [2, *text, 3]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        null, context = model.conditioner.from_ids(ids)
        return null[None], context[None], None

    return compute


def clip(model, weights, folder):
    """The normalised projection of the text; zeros for the empty negative prompt."""
    network = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder").eval()
    ids = byte_tokenizer()(["red apple"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    text = network(input_ids=ids).text_embeds
    context = (text / text.norm())[:, None]
    return torch.zeros_like(context), context, None


def boxes(model, weights, folder):
    """For 8192 tokens the grid is 90 x 90: 8099 is its lower right corner. 8191 means "no object"."""
    ids = [7, 18 * 90 + 9, 44 * 90 + 53]  # 0.1 and 0.2 of 89 are 8.9 and 17.8; 0.6 and 0.5: 53.4 and 44.5
    ids += [599, 44 * 90 + 67, 67 * 90 + 89]  # 0.75 and 0.5: 66.75 and 44.5; the edge and 0.75
    ids += [8191] * (90 - 6) + [0, 8099]
    return None, model.conditioner.from_ids(torch.tensor([ids])), None


def segmentation(model, weights, folder):
    x = F.one_hot(torch.from_numpy(CLASSES), 182).movedim(-1, 0)[None].float()
    for _ in range(2):
        x = F.interpolate(x, scale_factor=0.5, mode="bilinear")
    return None, None, F.conv2d(x, weights["channel_mapper.weight"])


def masked(model, weights, folder):
    """As in the published script: masked in the range 0 to 1, then scaled to -1 to 1."""
    image = torch.from_numpy(IMAGE).movedim(-1, 0)[None] / 255
    mask = (torch.from_numpy(MASK)[None, None] / 255 >= 0.5).float()
    z = model.autoencoder.encode((1 - mask) * image * 2 - 1)
    return None, None, torch.cat([z, F.interpolate(mask * 2 - 1, size=z.shape[-2:])], dim=1)


def small(model, weights, folder):
    return None, None, torch.from_numpy(SMALL).movedim(-1, 0)[None] / 127.5 - 1


CONDITIONING = {
    "celebahq": nothing,
    "lsun_churches": nothing,
    "cin256": a_class(999, None),
    "cin256-v2": a_class(17, 1000),
    "text2img256": words([7], [5, 6]),
    "txt2img-1p4B": words([], [7, 6]),
    "inpainting_big": masked,
    "bsr_sr": small,
    "layout2img": boxes,
    "semantic_synthesis": segmentation,
    "rdm768": clip,
}


def expected(name: str, model: LatentDiffusion, folder: Path, seed: int, scale: float) -> np.ndarray:
    """The image of a DDIM run that uses only the networks: (H, W, 3) in [0, 255]."""
    null, context, concat = conditioning(name, model, folder)
    spec, f = model.spec, model.spec.autoencoder.factor
    side = SIDES.get(name, 64) // f
    cells = (side, side) if concat is None else concat.shape[-2:]
    start, end = spec.schedule.beta_start, spec.schedule.beta_end
    alpha_bar = np.cumprod(1 - np.linspace(start**0.5, end**0.5, 1000) ** 2)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, spec.autoencoder.latent_channels, *cells, generator=generator)
    t = their_timesteps(STEPS)
    next_alpha_bar = np.append(alpha_bar[0], alpha_bar[t[:-1]])
    for index in reversed(range(STEPS)):
        x_in = x if concat is None else torch.cat([x, concat], dim=1)
        when = torch.tensor([t[index]])
        eps = model.unet(x_in, when, context)
        if scale != 1:
            without = model.unet(x_in, when, null)
            eps = without + scale * (eps - without)
        here, there = alpha_bar[t[index]], next_alpha_bar[index]
        x = there**0.5 * (x - (1 - here) ** 0.5 * eps) / here**0.5 + (1 - there) ** 0.5 * eps
    pixels = (model.autoencoder.decode(x / spec.autoencoder.scale_factor)[0].clamp(-1, 1) + 1) * 127.5
    return pixels.movedim(0, -1).numpy()


@pytest.mark.slow
@torch.inference_mode()
def test_images_match_the_reference_run_while_other_jobs_run(loaded):
    name, folder, runner = loaded
    order = resolved(runner, name, **BODIES[name], steps=STEPS, seed=11)
    scale = BODIES[name].get("guidance_scale", 1.0)
    assert order.to_job().guidance_scale == scale
    other = BODIES[name] | OTHERS.get(name, {})
    others = [resolved(runner, name, **other, steps=2 + seed, seed=seed, sampler=sampler).to_job()
              for seed, sampler in ((1, "ddim"), (2, "plms"), (3, "euler_ancestral"))]  # fmt: skip
    (images, *_), calls = run_together(runner, order.to_job(), *others)
    assert any(call.images == 4 for call in calls)
    (alone,), _ = run_together(runner, order.to_job())

    model = runner.registry["m"]
    image = expected(name, model, folder, 11, scale)
    ours = np.frombuffer(images[0], np.uint8).reshape(image.shape)
    if name == "inpainting_big":
        assert (ours[MASK == 0] == IMAGE[MASK == 0]).all()
        image = np.where(MASK[:, :, None] > 0, image, IMAGE)
    assert ours.std() > 10
    assert psnr(ours, image) > 45
    assert psnr(ours, np.frombuffer(alone[0], np.uint8).reshape(image.shape)) > 40


@torch.inference_mode()
def test_sample_and_upscale_match_the_service(loaded):
    name, _, runner = loaded
    order = resolved(runner, name, **BODIES[name], steps=2, seed=3)
    ((images,), _), model, job = run_together(runner, order.to_job()), runner.registry["m"], order.to_job()
    if name == "bsr_sr":
        x = model.upscale(torch.from_numpy(SMALL).movedim(-1, 0)[None] / 127.5 - 1, [3], 2)
    else:
        regions = torch.from_numpy(CLASSES + 1) if "segmentation" in BODIES[name] else None
        inputs = ConditioningInput(job.prompt, job.negative_prompt, job.class_label, job.boxes, regions)
        concat = None
        if name == "inpainting_big":
            image = torch.from_numpy(IMAGE).movedim(-1, 0)[None] / 127.5 - 1
            masked_latent = model.encode_masked(image, torch.from_numpy(MASK >= 128))
            concat = [model.concat_channels(16, 16, masked=masked_latent)]
        size = (job.width, job.height)
        x = model.sample([inputs], [3], 2, job.guidance_scale, concat, size)
    image = ((x[0].clamp(-1, 1) + 1) * 127.5).movedim(0, -1).numpy()
    ours = np.frombuffer(images[0], np.uint8).reshape(image.shape)
    where = MASK > 0 if name == "inpainting_big" else slice(None)
    assert psnr(ours[where], image[where]) > 45


def test_each_model_is_listed_with_its_tasks_inputs_and_defaults(loaded):
    name, _, runner = loaded
    spec = runner.specs["m"]
    listed = describe(spec, Settings())
    assert (listed.tasks, listed.inputs, listed.guided, listed.label_count) == TASKS[name]
    assert listed.defaults.width == listed.defaults.height == ROWS[name].side
    assert (listed.defaults.guidance_scale > 1) == listed.guided
    assert spec.unet.in_channels == spec.autoencoder.latent_channels + spec.concat_channels
    assert len(listed.labels) == (
        182 if name == "semantic_synthesis" else 0
    )  # which clients need for the colours
    if name == "inpainting_big":
        assert listed.inpainting == "mask channels"


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_guidance_is_rejected_without_a_null_condition(loaded, scale):
    name, _, runner = loaded
    body = BODIES[name] | {"guidance_scale": scale}
    if runner.specs["m"].guided:
        assert resolved(runner, name, **body).to_job().guidance_scale == scale
        return
    with pytest.raises(InvalidRequest, match="must be 1") as refused:
        resolved(runner, name, **body)
    assert refused.value.param == "guidance_scale"


def test_the_main_input_is_required_and_unsupported_inputs_are_rejected(loaded):
    name, _, runner = loaded
    inputs = TASKS[name][1]
    if inputs:
        with pytest.raises(InvalidRequest, match="is required") as refused:
            resolved(runner, name)
        assert refused.value.param == inputs[0]
    elif schema_of(name) is GenerateRequest:
        assert resolved(runner, name).task == "unconditional"
    inputs_of_others = {"prompt": "red", "class_label": 1, "boxes": BOXES, "segmentation": painted(CLASSES)}
    if schema_of(name) is UpscaleRequest:
        inputs_of_others = {"prompt": "red"}
    for field, value in inputs_of_others.items():
        if field not in inputs:
            with pytest.raises(InvalidRequest) as refused:
                resolved(runner, name, **(BODIES[name] | {field: value}))
            assert refused.value.param == field


def test_a_request_gets_the_models_first_task_and_its_parameters_are_a_request(loaded):
    name, _, runner = loaded
    order = resolved(runner, name, **BODIES[name])
    assert order.task == TASKS[name][0][0]
    again = schema_of(name).model_validate(
        BODIES[name] | order.parameters.of_image(0) | {"model": "m"}
    )  # parameters are a request without its images
    assert resolve(again, runner.specs, Settings()).prompt == order.prompt


BLACK = np.zeros((64, 64, 3), np.uint8)
REFUSED = {  # model -> (invalid fields, the field that the error names)
    "celebahq": [({"width": 50}, "width")],
    "cin256": [({"class_label": 1000}, "class_label"), ({"class_label": "cat"}, "class_label")],
    "cin256-v2": [({"class_label": 1000}, "class_label")],  # the null class cannot be requested
    "layout2img": [
        ({"boxes": BOXES * 16}, "boxes"),
        ({"boxes": [BOXES[0] | {"name": 8191}]}, "boxes.0.name"),
        ({"boxes": [BOXES[0], BOXES[0] | {"name": "cat"}]}, "boxes.1.name"),
    ],
    "semantic_synthesis": [
        ({"segmentation": painted(CLASSES[:, :48])}, "segmentation"),
        ({"segmentation": png(BLACK)}, "segmentation"),
        ({"segmentation": png(BLACK + 1)}, "segmentation"),
    ],
}


def test_unknown_labels_and_wrong_sizes_are_rejected(loaded):
    name, _, runner = loaded
    for body, param in REFUSED.get(name, []):
        with pytest.raises(InvalidRequest) as refused:
            resolved(runner, name, **body)
        assert refused.value.param == param


def test_a_prompt_that_is_too_long_gives_a_warning(loaded):
    name, _, runner = loaded
    body = BODIES[name] | ({"prompt": "red " * 75 + "apple"} if "prompt" in BODIES[name] else {})
    job = resolved(runner, name, **body, steps=1).to_job()
    runner.shape(job)
    warnings = list(runner.start(job))
    assert bool(warnings) == runner.specs["m"].reads_prompts
    if runner.specs["m"].uses_bert_tokens:  # 75 tokens fit between begin and end
        assert warnings == ["prompt is longer than the model can read; ignored: apple"]


def test_a_missing_text_encoder_is_named(tmp_path):
    file = write(tmp_path, "rdm768")
    (tmp_path / "text_encoder").rename(tmp_path / "elsewhere")
    assert load(file).spec.tasks == ()
    with pytest.raises(CheckpointError, match=r"text_encoder/model\.safetensors with text_projection"):
        Registry({"m": file}, load)


def test_an_autoencoder_alone_cannot_be_served(tmp_path):
    stage = Autoencoder(thin(FIRST_STAGES["vq-f16"]))
    fill_randomly(stage, 0)
    save_file(stage.state_dict(), tmp_path / "stage.safetensors")
    with pytest.raises(CheckpointError, match="is a VAE alone"):
        Registry({"m": tmp_path / "stage.safetensors"}, load)


@pytest.mark.slow
def test_a_missing_vocabulary_is_named_and_read_from_the_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(words_of, "find_cached_vocabulary", lambda: None)
    file = write(tmp_path, "text2img256")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "vocab.txt").rename(elsewhere / "vocab.txt")
    settings = Settings(device="cpu", dtype="float32", threads=1)
    with pytest.raises(CheckpointError, match=r"vocab\.txt of bert-base-uncased.*LDM_VOCABULARY"):
        build(settings, {"m": file})
    for given in (elsewhere, elsewhere / "vocab.txt"):
        runner = build(replace(settings, vocabulary=str(given)), {"m": file})
        assert runner.registry["m"].conditioner.tokenize(["red"])[0, :3].tolist() == [2, 5, 3]
    with pytest.raises(CheckpointError, match="neither a vocab"):
        load(file, vocabulary=tmp_path)
    monkeypatch.setattr(words_of, "find_cached_vocabulary", lambda: elsewhere / "vocab.txt")
    assert load(file).conditioner.tokenizer is not None
