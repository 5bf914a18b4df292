"""Few-step models in folders and files: what they are recognised by, and whole runs against `diffusers`."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler
from safetensors.torch import load_file, save_file

from models.checkpoint import CheckpointError, load
from models.checkpoint.conversion import convert
from models.checkpoint.inspection import inspect
from models.conditioning.conditioner import ConditioningInput
from models.formats.identify import identify
from models.networks.unet import guidance_embedding
from models.sampling.samplers import default_spacing, plan
from models.sampling.step import step
from models.sampling.table import ALPHA, FRESH_NOISE, SIGMA, T
from tests.checkpoints import sd_files, sd_folders
from tests.helpers.numbers import LIMIT, relative_error

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # diffusers, with numpy 2
]

PROMPT = "red apple on a blue background!"


@pytest.fixture(scope="module")
def lcm(tmp_path_factory):
    """(a pipeline with the guidance scale as an input, the folder that it was saved in)."""
    reference = sd_folders.pipeline("lcm-dreamshaper")
    folder = tmp_path_factory.mktemp("few-step") / "dreamshaper"
    reference.save_pretrained(folder)
    return reference, folder


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """(a pipeline of SDXL, its folder)."""
    reference = sd_folders.pipeline("xl")
    folder = tmp_path_factory.mktemp("few-step") / "xl"
    reference.save_pretrained(folder)
    return reference, folder


@pytest.fixture(scope="module")
def sd1():
    """The tensors of a single file of Stable Diffusion 1."""
    row = sd_files.narrow(sd_files.ROWS["sd1"])
    return sd_files.published("sd1", row, sd_files.reference(row))


@torch.inference_mode()
def run(model, settings, seed=7):
    """The images of a run with these settings: noise by one generator, as in the service."""
    spacing = settings.spacing or default_spacing(model.spec, settings.sampler)
    table = plan(model.schedule, settings.sampler, settings.steps, settings.eta, spacing=spacing)
    generator = torch.Generator().manual_seed(seed)
    state = torch.zeros(1, 1 + table.history, 4, 8, 8)
    state[:, 0] = torch.randn(4, 8, 8, generator=generator)
    contexts = [model.context_pair(ConditioningInput(PROMPT))]
    eps = model.predictor(contexts, None, settings.guidance_scale)
    for line in torch.from_numpy(table.coeffs).float()[:, None]:
        noise = torch.randn(1, 4, 8, 8, generator=generator) if line[0, FRESH_NOISE] else None
        state = step(state, eps(state[:, 0], line[:, T], line[:, ALPHA : SIGMA + 1]), line, noise)
    return (model.decode(state[:, 0]) / 2 + 0.5).clamp(0, 1)


@torch.inference_mode()
def theirs(pipeline, settings, seed=7, **options):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(1, 4, 8, 8, generator=generator)
    return pipeline(
        PROMPT, latents=start * start_scale(pipeline.scheduler, settings.steps), generator=generator,
        num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale, output_type="pt",
        **options,
    ).images  # fmt: skip


def start_scale(scheduler, steps):
    """Theirs starts x / alpha from noise times sigma / alpha with this spacing, ours from noise / alpha."""
    if not hasattr(scheduler, "sigmas"):
        return 1.0
    scheduler.set_timesteps(steps)
    return (scheduler.sigmas[0] ** 2 + 1) ** 0.5 / scheduler.init_noise_sigma


def test_the_guidance_scale_is_embedded_as_in_diffusers(lcm):
    scale = torch.tensor([1.0, 3.0, 8.5])
    expected = lcm[0].get_guidance_scale_embedding(scale - 1, embedding_dim=12)
    assert relative_error(guidance_embedding(scale, 12), expected) <= LIMIT


def test_a_consistency_model_runs_as_in_diffusers(lcm):
    reference, folder = lcm
    model = load(folder)
    settings = model.spec.few_step
    assert (settings.kind, settings.guidance_scale, settings.sampler, settings.steps) == (
        "LCM",
        8.5,
        "lcm",
        4,
    )
    assert len(model.step_rows(8.5).rows) == 1
    assert relative_error(run(model, settings), theirs(reference, settings)) <= 1e-4


@pytest.mark.parametrize("key", ["time_embed.cond_proj.weight", "time_embedding.cond_proj.weight"])
def test_a_consistency_model_in_a_single_file(tmp_path, sd1, key):
    projection = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
    save_file(sd1 | {f"model.diffusion_model.{key}": projection}, tmp_path / "any.safetensors")
    model = load(tmp_path / "any.safetensors")
    assert model.spec.unet.guidance_width == 12
    assert torch.equal(model.unet.time_embed.cond_proj.weight, projection)
    assert model.spec.defaults.guidance_scale == 8.5
    convert(tmp_path / "any.safetensors", tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.spec == model.spec
    assert torch.equal(again.unet.time_embed.cond_proj.weight, projection)


@pytest.mark.parametrize("name", ["sd-turbo", "sdxl-turbo"])
def test_turbo_models_in_folders(tmp_path, name):
    reference = sd_folders.pipeline(name)
    reference.save_pretrained(tmp_path / name)
    model = load(tmp_path / name)
    settings = model.spec.few_step
    assert (settings.sampler, settings.spacing, settings.steps) == ("euler_ancestral", "trailing", 4)
    assert "the folder's name" in inspect(tmp_path / name).notes[0]
    assert relative_error(run(model, settings), theirs(reference, settings)) <= 1e-4


SCHEDULERS = {  # name of a published model with SDXL's networks -> the scheduler that its card gives
    "sdxl_lightning_4step": (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}, {}),
    "Hyper-SDXL-8steps": (DDIMScheduler, {"timestep_spacing": "trailing"}, {}),
    "Hyper-SDXL-1step": (TCDScheduler, {}, {"eta": 1.0}),
    "TCD-SDXL": (TCDScheduler, {}, {"eta": 0.3}),
    "LCM-SDXL": (LCMScheduler, {}, {}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_distilled_models_of_sdxl_run_as_their_cards_say(xl, tmp_path, name):
    kind, options, arguments = SCHEDULERS[name]
    reference, folder = xl
    (tmp_path / name).symlink_to(folder)
    model = load(tmp_path / name)
    before, reference.scheduler = reference.scheduler, kind.from_config(reference.scheduler.config, **options)
    try:
        expected = theirs(reference, model.spec.few_step, **arguments)
    finally:
        reference.scheduler = before
    assert relative_error(run(model, model.spec.few_step), expected) <= 1e-4


@pytest.mark.parametrize(
    ("name", "timesteps"),
    [
        ("dmd2_sdxl_4step", [999, 749, 499, 249]),
        ("dmd2_sdxl_1step", [399]),
        ("Hyper-SDXL-1step-Unet", [800]),
    ],
)
def test_some_models_have_their_own_timesteps(xl, tmp_path, name, timesteps):
    reference, folder = xl
    (tmp_path / name).symlink_to(folder)
    model = load(tmp_path / name)
    settings, generator = model.spec.few_step, torch.Generator().manual_seed(7)
    before, reference.scheduler = reference.scheduler, LCMScheduler.from_config(reference.scheduler.config)
    with torch.inference_mode():
        expected = reference(
            PROMPT, latents=torch.randn(1, 4, 8, 8, generator=generator), timesteps=timesteps,
            num_inference_steps=len(timesteps), guidance_scale=1.0, generator=generator, output_type="pt",
        ).images  # fmt: skip
    reference.scheduler = before
    assert relative_error(run(model, settings), expected) <= 1e-4


def test_lightnings_one_step_model_predicts_x_0(tmp_path):
    row = sd_files.narrow(sd_files.ROWS["sdxl"])
    networks = sd_files.reference(row)
    file = tmp_path / "sdxl_lightning_1step_x0.safetensors"
    save_file({k: v.contiguous() for k, v in sd_files.published("sdxl", row, networks).items()}, file)
    source = identify(file)
    assert source.spec.schedule.prediction == "sample"
    assert source.prediction_origin == "the file's name"
    assert any("predicts x_0" in note for note in source.notes)
    convert(file, tmp_path / "converted")
    model = load(tmp_path / "converted")
    assert model.spec.schedule.prediction == "sample"
    assert model.spec.few_step.steps == 1
    save_file(load_file(file), tmp_path / "a.safetensors", {"modelspec.prediction_type": "sample"})
    assert identify(tmp_path / "a.safetensors").spec.schedule.prediction == "sample"


def test_a_folder_that_predicts_x_0_runs_as_in_diffusers(xl, tmp_path):
    reference, _ = xl
    sd_folders.pipeline("xl").save_pretrained(tmp_path / "sdxl-lightning-1step")
    file = tmp_path / "sdxl-lightning-1step/scheduler/scheduler_config.json"
    changes = {"prediction_type": "sample", "timestep_spacing": "trailing"}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    model = load(tmp_path / "sdxl-lightning-1step")
    config = reference.scheduler.config
    before, reference.scheduler = reference.scheduler, EulerDiscreteScheduler.from_config(config, **changes)
    expected = theirs(reference, model.spec.few_step)
    reference.scheduler = before
    assert relative_error(run(model, model.spec.few_step), expected) <= 1e-4


def test_a_consistency_model_for_another_distillation_is_refused(lcm, tmp_path):
    sd_folders.pipeline("lcm-dreamshaper").save_pretrained(tmp_path / "lcm")
    file = tmp_path / "lcm/scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"original_inference_steps": 100}))
    with pytest.raises(CheckpointError, match="original_inference_steps is 100"):
        load(tmp_path / "lcm")


@pytest.mark.parametrize("form", ["file of diffusers", "file of CompVis", "folder"])
def test_a_unet_alone_takes_the_place_of_a_models_own(tmp_path, form):
    row = sd_files.narrow(sd_files.ROWS["sdxl"])
    base, other = sd_files.reference(row), sd_files.random(sd_files.make_unet(row), 9)
    tensors = {key: value.contiguous() for key, value in sd_files.published("sdxl", row, base).items()}
    save_file(tensors, tmp_path / "base.safetensors")
    path = tmp_path / "sdxl_lightning_2step_unet.safetensors"
    if form == "folder":
        other.save_pretrained(path := tmp_path / "sdxl_lightning_2step" / "unet")
    elif form == "file of CompVis":
        save_file(
            {f"model.diffusion_model.{k}": v for k, v in sd_files.unet_tensors(row, other).items()}, path
        )
    else:
        save_file(other.state_dict(), path)
    convert(tmp_path / "base.safetensors", tmp_path / "made", "float32", unet=path)
    model = load(tmp_path / "made")
    assert (model.spec.defaults.sampler, model.spec.defaults.steps) == ("euler", 2)
    assert model.spec.schedule.spacing == "trailing"
    assert model.spec.name.startswith("sdxl_lightning_2step")
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([999]), torch.randn(1, 77, 256)
    added = {"text_embeds": torch.randn(1, 128), "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]])}
    with torch.inference_mode():
        pooled = torch.cat([added["text_embeds"], model.size_embedding(64, 64)[None]], dim=1)
        expected = other(x, t, context, added_cond_kwargs=added).sample
        assert relative_error(model.unet(x, t, context, pooled), expected) <= LIMIT


def test_a_unet_of_another_shape_is_refused(tmp_path, sd1):
    save_file(sd1, tmp_path / "base.safetensors")
    row = sd_files.narrow(sd_files.ROWS["sd2"])
    save_file(sd_files.make_unet(row).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"the UNet .*other.safetensors does not fit: "):
        convert(tmp_path / "base.safetensors", tmp_path / "made", unet=tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"is a UNet alone.*ldm convert BASE FOLDER --unet FILE"):
        identify(tmp_path / "other.safetensors")
