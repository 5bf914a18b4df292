"""Deep features that are reused between UNet calls, on the tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from models.checkpoint import load
from models.conditioning.conditioner import ConditioningInput
from models.networks.attention import CrossInputs
from models.networks.deep_features import DeepFeatures
from models.networks.res_block import res_blocks
from models.sampling.samplers import plan
from models.sampling.step import step
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.engine.job import FeatureCache, Hires, Job
from tests.helpers.fake_runner import make_job
from tests.helpers.images import IMAGE, psnr
from tests.helpers.torch_runner import KEY, begin, made, run_jobs, runner_on, tiny_job


def cached(interval: int = 3, branch: int = 0) -> FeatureCache:
    return FeatureCache(interval, branch)


def image_of(runner: TorchRunner, job: Job) -> np.ndarray:
    begin(runner, job)
    return np.frombuffer(made(runner, job), np.uint8).reshape(64, 64, 3)


def by_blocks(unet, x, t, context, branch, feature=None):
    """The UNet's output and the deep feature of a branch, its blocks called one by one."""
    count = len(unet.input_blocks)
    emb = silu(unet.time_embed(unet_sinusoids(unet, t)))
    emb = {block: block.emb_layers[1](emb) for block in res_blocks(unet)}
    context = CrossInputs(context)
    skips = []
    for block in list(unet.input_blocks)[: count if feature is None else branch + 1]:
        x = block(x, emb, context)
        skips.append(x)
    blocks = list(unet.output_blocks)
    if feature is None:
        x = unet.middle_block(x, emb, context)
        for block in blocks[: count - 1 - branch]:
            x = torch.cat([x, skips.pop()], 1)
            x = block(x, emb, context, skips[-1].shape[-2:])
        feature = x
    x = feature
    for block in blocks[count - 1 - branch :]:
        x = torch.cat([x, skips.pop()], 1)
        x = block(x, emb, context, skips[-1].shape[-2:] if skips else None)
    return unet.out(x), feature


def unet_sinusoids(unet, t):
    half = unet.spec.channels[0] // 2
    angles = t.float()[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()], 1)


@torch.inference_mode()
def test_a_reusing_call_runs_the_shallow_blocks_with_the_kept_feature(tiny: Path):
    unet = load(tiny).unet.float()
    x, context = torch.randn(2, unet.spec.in_channels, 8, 8), torch.randn(2, 7, unet.spec.context_width)
    early, late = torch.tensor([800.0, 700.0]), torch.tensor([780.0, 650.0])
    for branch in range(unet.spec.blocks):
        keeping = DeepFeatures((branch,))
        plain = unet(x, early, context)
        assert torch.equal(unet(x, early, context, deep=keeping), plain)
        expected, feature = by_blocks(unet, x, early, context, branch)
        torch.testing.assert_close(keeping.kept[branch], feature, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)
        reused = DeepFeatures(branch=branch, reused=keeping.kept[branch])
        expected, _ = by_blocks(unet, x + 1, late, context, branch, feature)
        torch.testing.assert_close(unet(x + 1, late, context, deep=reused), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("branch", [0, 1])
def test_the_image_is_that_of_the_formula(tiny: Path, branch):
    runner = runner_on(tiny)
    job = replace(tiny_job(guidance_scale=6.0), steps=5, feature_cache=cached(2, branch))
    bundle = runner.registry["m"]
    with torch.inference_mode():
        lines = torch.from_numpy(plan(bundle.schedule, "ddim", 5).coeffs)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(job.seed))[:, None]
        context = bundle.context_pair(ConditioningInput(job.prompt, job.negative_prompt)).tokens
        feature = None
        for call, line in enumerate(lines):
            t = line[:1].float().expand(2)
            given = feature if call % 2 else None
            out, feature = by_blocks(bundle.unet, x[:, 0].expand(2, -1, -1, -1), t, context, branch, given)
            x = step(x, (out[0] + 6 * (out[1] - out[0]))[None], line[None])
        expected = ((bundle.decode(x[:, 0])[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    image = image_of(runner, job)
    assert np.abs(image - expected).max() < 1
    assert not np.array_equal(image, image_of(runner, replace(job, feature_cache=None)))


def test_with_interval_1_no_bit_changes(tiny: Path):
    runner = runner_on(tiny)
    job = replace(tiny_job(guidance_scale=4.0), steps=4)
    assert np.array_equal(
        image_of(runner, job), image_of(runner, replace(job, feature_cache=cached(interval=1)))
    )


def test_features_are_computed_again_when_rows_change_and_cost_is_less(tiny: Path):
    runner = runner_on(tiny)
    job = replace(tiny_job(guidance_scale=4.0), steps=8, guidance_end=0.5, feature_cache=cached(3))
    begin(runner, job)
    reuses = runner.jobs["a"].phases[0].outline.reuses
    assert reuses == (False, True, True, False, False, True, True, False)
    work = sum(segment.work for segment in runner.shape(job).segments)
    plain = sum(segment.work for segment in runner.shape(replace(job, feature_cache=None)).segments)
    blocks = runner.registry["m"].unet.spec.blocks
    rows = 2 * 2 + 2  # rows of reusing calls
    assert work / plain == pytest.approx(1 - rows / 12 * (1 - 2 / (2 * blocks + 1)))


def test_a_phase_and_a_run_in_float32_begin_without_features(tiny: Path):
    runner = runner_on(tiny, torch.bfloat16)
    job = replace(tiny_job(), steps=4, feature_cache=cached(9))
    begin(runner, job)
    for _ in range(4):
        assert (runner.jobs["a"].images[0].deep is None) == (runner.jobs["a"].images[0].done == 0)
        runner.step([KEY])
    assert runner.jobs["a"].images[0].deep is None
    runner.start(job, full_precision=True)
    assert runner.jobs["a"].images[0].deep is None


def test_neighbours_change_no_bit_in_invariant_mode(tiny: Path):
    runner = TorchRunner(Registry({"m": tiny}, load), (8,), invariant=True)
    fields = {"width": 64, "height": 64, "steps": 5, "guidance_scale": 4.0}
    hires = Hires(128, 128, 4, 0.75, "latent", "", "")
    jobs = [
        make_job("plain", **fields),
        make_job("cached", **fields, feature_cache=cached(), n=2),
        make_job("deeper", **fields, feature_cache=cached(2, 1), sampler="dpmpp_2m"),
        make_job("interval", **fields, feature_cache=cached(4), guidance_start=0.3, guidance_end=0.8),
        make_job("from image", **fields, feature_cache=cached(), image=IMAGE.tobytes(), strength=0.8),
        make_job("hires", **fields, feature_cache=cached(), hires=hires),
    ]
    together = run_jobs(runner, *jobs)
    assert together == {job.id: run_jobs(runner, job)[job.id] for job in jobs}
    plain = run_jobs(runner, replace(jobs[5], feature_cache=None))["hires"][0]
    assert plain != together["hires"][0]


def test_other_rows_share_a_call_with_images_that_keep_and_reuse(tiny: Path):
    runner = runner_on(tiny)
    job = replace(tiny_job(guidance_scale=4.0), steps=6)
    jobs = [
        replace(job, id=str(interval), seed=interval, feature_cache=cached(interval))
        for interval in (1, 2, 3)
    ]
    together = run_jobs(runner, *jobs)
    for own in jobs:
        alone, mixed = (
            np.frombuffer(each[own.id][0], np.uint8) for each in (run_jobs(runner, own), together)
        )
        assert psnr(alone, mixed) > 40
