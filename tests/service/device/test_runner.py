"""The runner, with real tensors on the tiny model."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoint import load
from models.preview import Projection
from models.sampling.samplers import SAMPLERS, plan
from models.sampling.step import step
from service.device import batch, decoding
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.engine.engine import Engine
from service.engine.job import ImageKey, Job
from service.errors import NonFinite, OutOfMemory
from tests.checkpoints.tiny import tiny_model
from tests.helpers.fake_runner import make_job, outcomes
from tests.helpers.images import IMAGE, MASK, psnr
from tests.helpers.torch_runner import KEY, begin, decoded, left, made, runner_on, tiny_job


@pytest.fixture
def runner(tiny: Path) -> TorchRunner:
    return runner_on(tiny)


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("no memory")


def test_a_failed_step_uses_the_same_noise_when_repeated(runner, monkeypatch):
    job = tiny_job(eta=1.0)
    begin(runner, job)
    expected = made(runner, job)
    begin(runner, job)
    with monkeypatch.context() as failing:
        failing.setattr(batch, "step", out_of_memory)
        with pytest.raises(OutOfMemory):
            runner.step([KEY])
    assert made(runner, job) == expected


def test_torchs_out_of_memory_becomes_the_services_own(runner, monkeypatch):
    job = tiny_job()
    begin(runner, job)
    monkeypatch.setattr(runner.registry["m"], "decode", out_of_memory)
    with pytest.raises(OutOfMemory):
        decoded(runner, KEY)
    monkeypatch.setattr(runner.registry["m"], "context_pair", out_of_memory)
    with pytest.raises(OutOfMemory):
        runner.start(job)


def image_job(name: str = "a", **changes) -> Job:
    return make_job(name, **({"width": 64, "height": 64, "steps": 3, "image": IMAGE.tobytes()} | changes))


def pixels(runner: TorchRunner, job: Job) -> np.ndarray:
    begin(runner, job)
    return np.frombuffer(made(runner, job), np.uint8).reshape(64, 64, 3)


def test_image_to_image_starts_from_the_noised_latent_of_the_input(runner):
    job = image_job(strength=0.7, guidance_scale=1.0, seed=5)
    bundle = runner.registry["m"]
    with torch.inference_mode():
        x = torch.from_numpy(IMAGE).permute(2, 0, 1)[None] / 127.5 - 1
        line = plan(bundle.schedule, "ddim", 3, 0.0, 0.7)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        x = (line.start[0] * bundle.encode(x) + line.start[1] * noise)[:, None]
        context = bundle.conditioner([job.prompt])
        for row in torch.from_numpy(line.coeffs):
            x = step(x, bundle.denoiser(x[:, 0], row[:1], context), row[None])
        expected = (bundle.decode(x[:, 0])[0].clamp(-1, 1) + 1) * 127.5
    difference = pixels(runner, job) - expected.permute(1, 2, 0).numpy()
    assert len(line) == 2
    assert np.abs(difference).max() < 1


def test_pixels_outside_the_mask_are_those_of_the_input(runner):
    out = pixels(runner, image_job(mask=MASK.tobytes()))
    assert (out[MASK == 0] == IMAGE[MASK == 0]).all()
    assert (out[MASK > 0] != IMAGE[MASK > 0]).any(axis=-1).mean() > 0.9


def test_a_latent_cell_is_repainted_if_any_of_its_pixels_is(runner):
    begin(runner, image_job(mask=MASK.tobytes()))
    mask = runner.jobs["a"].mask[0]
    assert mask.nonzero().min(0).values.tolist() == [2, 3]
    assert mask.nonzero().max(0).values.tolist() == [5, 6]
    assert mask.sum() == 4 * 4


def test_the_latent_outside_the_mask_stays_that_of_the_input(runner):
    job = image_job(mask=MASK.tobytes(), eta=1.0)
    begin(runner, job)
    made(runner, job)
    state = runner.jobs["a"]
    assert torch.equal(state.images[0].x[:, 0, 0], state.z[:, 0, 0])


def test_the_input_image_is_encoded_once_per_job(runner, monkeypatch):
    calls = []
    bundle = runner.registry["m"]
    monkeypatch.setattr(bundle, "encode", lambda x: calls.append(x) or torch.zeros(1, 4, 8, 8))
    begin(runner, image_job(n=3))
    assert len(calls) == 1


def test_all_tasks_and_samplers_share_one_call_without_changing_each_other(runner):
    jobs = [
        *(make_job(name, width=64, height=64, steps=4, sampler=name) for name in SAMPLERS),
        make_job("a", width=64, height=64, steps=3, eta=0.5),
        image_job("b", strength=1.0, guidance_scale=1.0),
        image_job("c", mask=MASK.tobytes(), steps=4, eta=1.0),
    ]
    for job in jobs:
        begin(runner, job)
    while running := [job for job in jobs if left(runner, job)]:
        runner.step([ImageKey(job.id, 0) for job in running])
    together = [decoded(runner, ImageKey(job.id, 0)) for job in jobs]
    for job, image in zip(jobs, together, strict=True):
        alone = TorchRunner(runner.registry, runner.buckets)
        begin(alone, job)
        while left(alone, job):
            alone.step([ImageKey(job.id, 0)])
        assert psnr(decoded(alone, ImageKey(job.id, 0)), image) > 40


class Scarce:
    """A UNet that runs out of memory with more rows than that."""

    def __init__(self, denoiser, rows: int) -> None:
        self.denoiser, self.unet, self.rows, self.calls = denoiser, denoiser.unet, rows, []

    def __call__(self, x, *others, **named):
        self.calls.append(len(x))
        if len(x) > self.rows:
            raise torch.OutOfMemoryError("no memory")
        return self.denoiser(x, *others, **named)


def test_a_guided_image_that_does_not_fit_runs_row_by_row(runner, monkeypatch):
    job = tiny_job()
    begin(runner, job)
    expected = made(runner, job)
    bundle = runner.registry["m"]
    scarce = Scarce(bundle.denoiser, 1)
    monkeypatch.setattr(bundle, "denoiser", scarce)
    begin(runner, job)
    assert psnr(made(runner, job), expected) > 40
    assert scarce.calls == [2, 1, 1] * 3
    scarce.rows = 0
    begin(runner, job)
    with pytest.raises(OutOfMemory):
        runner.step([KEY])


def test_an_image_that_does_not_fit_is_decoded_in_tiles(runner, monkeypatch):
    job = make_job("a", width=384, height=128, steps=1)  # 16 x 48 cells
    begin(runner, job)
    runner.step([KEY])
    bundle, decode, sizes = runner.registry["m"], runner.registry["m"].decode, []

    def scarce(z):
        sizes.append(z.shape[-1])
        return decode(z) if z.shape[-1] <= 32 else out_of_memory()

    monkeypatch.setattr(bundle, "decode", scarce)
    assert len(decoded(runner, KEY)) == 384 * 128 * 3
    assert sizes == [48, 32, 32]


def test_the_weights_of_tiles_add_up_to_one():
    bundle = tiny_model()
    bundle.decode = lambda z: z.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :3]
    z = torch.randn(1, 4, 20, 37)
    assert torch.allclose(bundle.decode_tiles(z, 16), bundle.decode(z), atol=1e-5)


def test_nan_values_are_reported_for_their_job_alone(runner):
    jobs = [make_job(name, width=64, height=64, steps=3) for name in "ab"]
    for job in jobs:
        begin(runner, job)
    runner.jobs["b"].images[0].state = torch.full((1, 4, 8, 8), torch.nan)
    assert runner.step([ImageKey(job.id, 0) for job in jobs]).non_finite == ("b",)
    assert torch.isfinite(runner.jobs["a"].images[0].x).all()


def test_a_full_precision_run_uses_a_float32_copy_and_drops_it_afterwards(tiny):
    runner, exact = runner_on(tiny, torch.bfloat16), runner_on(tiny)
    job = tiny_job()
    assert (
        exact.shape(job, full_precision=True) == runner.shape(job, full_precision=True) != runner.shape(job)
    )
    runner.shape(job, full_precision=True)
    runner.start(job, full_precision=True)
    assert runner.jobs["a"].bundle.unet.dtype == torch.float32
    assert runner.registry["m"].unet.dtype == torch.bfloat16
    made(runner, job)
    copy = weakref.ref(runner.jobs["a"].bundle.unet)
    runner.discard("a")
    gc.collect()
    assert copy() is None


def test_an_image_that_overflows_16_bits_is_decoded_again_in_float32(tiny):
    runner = runner_on(tiny, torch.float16)
    decoder = runner.registry["m"].autoencoder.decoder
    decoder.conv_in.weight.mul_(3e4)  # the norm after it undoes this, unless the values have overflowed
    decoder.conv_in.bias.mul_(3e4)
    job = tiny_job()
    begin(runner, job)
    runner.jobs["a"].images[0].state = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.isfinite(runner.registry["m"].decode(runner.jobs["a"].images[0].x[None])).all()
    assert len(set(decoded(runner, KEY))) > 10


def test_a_non_finite_image_is_an_error(runner):
    begin(runner, tiny_job())
    runner.jobs["a"].images[0].state = torch.full((1, 4, 8, 8), torch.inf)
    with pytest.raises(NonFinite):
        decoded(runner, KEY)


def test_memory_is_measured_only_when_a_call_has_more_rows_than_any_before(runner):
    jobs = [make_job(name, width=64, height=64, steps=9) for name in "abc"]
    for job in jobs:
        begin(runner, job)
    keys = [ImageKey(job.id, 0) for job in jobs]
    uses = [runner.step(keys[:count]).memory for count in (1, 1, 3, 2, 3)]
    if uses[0] is None:
        pytest.skip("this system does not report memory")
    assert [use and use.rows for use in uses] == [2, None, 8, None, None]
    assert uses[0].room > 2**20


def test_a_preview_has_one_pixel_per_latent_cell(runner, monkeypatch):
    fits = []
    monkeypatch.setattr(decoding, "Projection", lambda model: fits.append(model) or Projection(model))
    job = tiny_job(preview_every=1)
    begin(runner, job)
    runner.step([KEY])
    for _ in range(2):
        preview = runner.preview(KEY)
        assert (preview.width, preview.height, len(preview.pixels)) == (8, 8, 8 * 8 * 3)
    assert len(fits) == 1


def test_a_decoded_preview_is_the_decoded_x_0(runner):
    job = tiny_job(preview_every=1, preview_decoded=True)
    begin(runner, job)
    runner.step([KEY])
    preview = runner.preview(KEY)
    x_0 = runner.jobs["a"].images[0].x_0
    expected = (runner.registry["m"].decode(x_0[None])[0].clamp(-1, 1) + 1) * 127.5
    shown = np.frombuffer(preview.pixels, np.uint8).reshape(preview.height, preview.width, 3)
    assert np.abs(shown - expected.permute(1, 2, 0).numpy()).max() < 1


def test_models_that_do_not_fit_together_take_turns(tiny):
    loads: list[Path] = []
    registry = Registry(
        {"m": tiny, "k": tiny}, lambda path: loads.append(path) or load(path), lambda spec: 9, 9
    )
    events: list = []
    engine = Engine(TorchRunner(registry, (2, 4)), events.append, 4, 4, time.monotonic)
    for index in range(4):
        engine.submit(make_job(str(index), model="mk"[index % 2], width=64, height=64, steps=1))
    while engine.busy:
        engine.tick()
    assert set(outcomes(events).values()) == {"done"}
    assert len(loads) == 2, "jobs of the loaded model run first"
    assert not registry.is_loaded("m")
