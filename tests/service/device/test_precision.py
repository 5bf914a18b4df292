"""A UNet that overflows in float16 becomes bfloat16, and jobs under way go on as they began."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoint import load
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.engine.events import Done, Incident, Overflowed
from service.engine.job import ImageKey, Job, Refiner
from tests.helpers.fake_runner import make_job
from tests.helpers.images import psnr
from tests.helpers.torch_runner import begin, events_of

SCALE = 1e5  # of a layer before a norm, which undoes it unless a value has overflowed


def overflowing(tiny: Path, dtype: torch.dtype, invariant: bool = False) -> TorchRunner:
    """A runner on a model whose values do not fit in float16."""

    def load_scaled(source: Path):
        model = load(source, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.unet.input_blocks[1][0].in_layers[2].parameters():
                parameter.mul_(SCALE)
        model.unet.to(dtype)
        return model

    return TorchRunner(Registry({"m": tiny}, load_scaled), (4,), invariant)


def job(name: str, **changes) -> Job:
    return make_job(name, width=64, height=64, seed=ord(name[0]), **changes)


def pixels(events: list) -> np.ndarray:
    [image] = next(event.images for event in events if isinstance(event, Done))
    return np.frombuffer(image, np.uint8)


def test_a_model_that_overflows_twice_runs_in_bfloat16_from_then_on(tiny: Path, caplog):
    runner, exact = overflowing(tiny, torch.float16), overflowing(tiny, torch.float32)
    changes = []
    runner.registry.on_change = lambda: changes.append(runner.loaded_models()[0].dtype)
    old = weakref.ref(runner.registry["m"].unet)
    runs = [events_of(runner, job(name)) for name in "abc"]
    assert [sum(isinstance(event, Incident) for event in events) for events in runs] == [1, 1, 0]
    assert [event for events in runs for event in events if isinstance(event, Overflowed)] == [
        Overflowed("m")
    ]
    assert changes == ["float16", "bfloat16"]
    assert "m overflows in float16" in caplog.text
    for name, events in zip("abc", runs, strict=True):
        assert psnr(pixels(events), pixels(events_of(exact, job(name)))) > 30
    gc.collect()
    assert old() is None, "nothing keeps the old weights in memory"


def test_with_invariant_no_model_is_replaced_as_bits_would_depend_on_earlier_jobs(tiny: Path, caplog):
    runner = overflowing(tiny, torch.float16, invariant=True)
    runs = [events_of(runner, job(name)) for name in "aaaa"]
    assert all(sum(isinstance(event, Incident) for event in events) == 1 for events in runs)
    assert runner.registry["m"].unet.dtype == torch.float16
    assert len({pixels(events).tobytes() for events in runs}) == 1
    assert caplog.text.count("--dtype bfloat16") == 1


@pytest.mark.parametrize("changes", [{"loras": (("ink", 1.0, 1.0),)}, {"refiner": Refiner("other", 0.8)}])
def test_jobs_that_do_not_show_which_weights_overflow_are_not_counted(tiny: Path, changes):
    runner = overflowing(tiny, torch.float16)
    runner.registry.load("m")
    assert not any(runner.count_overflow(job("a", **changes)) for _ in range(4))
    assert runner.registry["m"].unet.dtype == torch.float16


def test_a_float32_model_is_not_replaced(tiny: Path):
    runner = overflowing(tiny, torch.float32)
    runner.registry.load("m")
    assert not any(runner.count_overflow(job("a")) for _ in range(4))


def test_jobs_that_began_before_the_change_keep_their_unet_in_shared_calls(tiny: Path):
    runner = TorchRunner(Registry({"m": tiny}, lambda path: load(path, dtype=torch.float16)), (4,))
    alone = runner.registry["m"]
    begin(runner, job("a"))
    runner.step([ImageKey("a", 0)])
    runner.registry.replace("m", alone.with_unet_dtype(torch.bfloat16))
    begin(runner, job("b"))
    called = []
    for name in "ab":
        bundle = runner.jobs[name].bundle
        denoise = bundle.denoiser
        bundle.denoiser = lambda *inputs, name=name, denoise=denoise: called.append(name) or denoise(*inputs)
    for _ in range(2):
        assert runner.step([ImageKey("a", 0), ImageKey("b", 0)]).non_finite == ()
    assert called == ["a", "b"] * 2
    together = runner.jobs["a"].images[0].x.clone()
    again = TorchRunner(Registry({"m": tiny}, lambda path: load(path, dtype=torch.float16)), (4,))
    begin(again, job("a"))
    for _ in range(3):
        again.step([ImageKey("a", 0)])
    assert torch.equal(together, again.jobs["a"].images[0].x)
