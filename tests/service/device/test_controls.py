"""Jobs with and without controls in the same UNet calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.adapters.control_net import ControlNetControl
from models.adapters.controls import Rows, scaled, weights
from models.checkpoint import load
from models.latent_diffusion import LatentDiffusion
from models.networks.adapter_inputs import AdapterInputs, RowInputs, combined
from models.sampling.table import T
from models.spec import ControlOption
from service.device.adapter_store import AdapterFile, AdapterStore
from service.device.batch import predict
from service.device.graphs import Graphs
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.engine.engine import Engine
from service.engine.job import AdapterKey, ImageKey, Job, JobControl
from service.engine.row_limits import MemoryUse
from tests.checkpoints.tiny import tiny_control
from tests.helpers.fake_runner import make_job, outcomes
from tests.helpers.torch_runner import begin, run_together

DRAW = np.random.default_rng(4)
EDGES, DEPTH, FILL = "edges", "depth", "fill"
OPTIONS = (
    ControlOption(EDGES, "a ControlNet"),
    ControlOption(DEPTH, "a ControlNet"),
    ControlOption(FILL, "a ControlNet", inpainting=True),
)
HALF_MASK = bytes(64 * 32) + b"\xff" * (64 * 32)


def control(seed: int, **changes) -> ControlNetControl:
    network = tiny_control(seed)
    return ControlNetControl("a ControlNet", network.spec, network, **changes)


CONTROLS = {EDGES: control(1), DEPTH: control(2), FILL: control(3, inpaints=True)}


@pytest.fixture
def runner(tiny: Path) -> TorchRunner:
    """A runner in which all calls have eight rows."""
    registry: Registry = Registry({"m": tiny}, load)
    registry.adapters = AdapterStore(lambda key, file, model: CONTROLS[key.name])
    registry.adapters.install({("control", name): AdapterFile(size=1) for name in CONTROLS})
    registry.specs["m"] = replace(registry.specs["m"], controls=OPTIONS)
    return TorchRunner(registry, buckets=(8,), invariant=True)


def pixels() -> bytes:
    return DRAW.integers(0, 256, (64, 64, 3), np.uint8).tobytes()


def use(name: str, **changes) -> JobControl:
    return JobControl(name, pixels(), **changes)


def job(name: str, *controls: JobControl, **changes) -> Job:
    fields = {"width": 64, "height": 64, "steps": 4, "seed": 5, "controls": controls} | changes
    return make_job(name, **fields)


def load_adapters(runner: TorchRunner, *jobs: Job) -> None:
    for each in jobs:
        assert runner.load(each, each.weights_keys)


def counted(network: nn.Module) -> tuple[list[int], Callable[[], None]]:
    """The rows of each call of a network from now on, and a function that ends the counting."""
    calls: list[int] = []
    hook = network.register_forward_hook(lambda module, inputs, out: calls.append(len(inputs[0])))
    return calls, hook.remove


JOBS = (
    job("none"),
    job("one", use(EDGES)),
    job("two", use(EDGES, scale=0.5), use(DEPTH, scale=1.5)),
    job("window", use(DEPTH, start=0.25, end=0.75), guidance_scale=1.0),
    job("prompt", use(EDGES, mode="prompt"), n=2),
    job("control", use(DEPTH, mode="control"), use(EDGES)),
    job("inpainted", use(FILL, masked=True), image=pixels(), mask=HALF_MASK, steps=3),
    job("twice", use(EDGES), use(DEPTH), use(EDGES, scale=0.3), sampler="heun", steps=3),
)


def test_jobs_with_and_without_controls_share_calls_and_do_not_change_each_other(runner):
    alone = [run_together(runner, each)[0][0] for each in JOBS]
    together, stepped = run_together(runner, *JOBS)
    assert together == alone
    assert max(len(event.jobs) for event in stepped) > 2


def test_jobs_with_none_one_and_two_controls_share_one_unet_call(tiny, runner):
    runner.buckets = (8,)
    shared, stepped = run_together(runner, *JOBS[:3])
    assert [event.rows for event in stepped] == [6] * 4
    reference = TorchRunner(Registry({"m": tiny}, load), buckets=(8,), invariant=True)
    assert run_together(reference, JOBS[0])[0][0] == shared[0]
    assert len({images[0] for images in shared}) == 3


def test_a_control_network_runs_once_a_step_for_all_rows_that_use_it(runner):
    edges, end_edges = counted(CONTROLS[EDGES].network)
    depth, end_depth = counted(CONTROLS[DEPTH].network)
    run_together(runner, *JOBS[:3])
    end_edges(), end_depth()
    assert edges == depth == [8] * 4  # padded to the size of UNet calls


def test_a_control_costs_nothing_outside_its_window(runner):
    calls, end = counted(CONTROLS[DEPTH].network)
    run_together(runner, job("a", use(DEPTH, start=0.5)))
    end()
    assert len(calls) == 2


def test_a_window_without_a_step_is_reported(runner):
    short = job("a", use(EDGES), use(DEPTH, start=0.3, end=0.4))
    load_adapters(runner, short)
    assert runner.start(short) == ("controls.1 has no effect: no step of the run lies in its window",)


@pytest.mark.parametrize("mode", ["balanced", "prompt", "control"])
def test_eps_is_that_of_the_unet_with_the_scaled_residuals_of_all_controls(runner, mode):
    own = job("a", use(EDGES, scale=0.7, mode=mode), use(DEPTH, scale=0.4), guidance_scale=2.0)
    load_adapters(runner, own)
    begin(runner, own)
    state = runner.jobs["a"]
    (image,) = state.images
    coeffs = torch.from_numpy(state.line(image)).float()[None]
    with torch.inference_mode():
        eps = predict([state], [image], image.x[None], coeffs, 8, Graphs(), (8,))
        x, context = image.x[None].expand(2, -1, -1, -1), state.phases[0].context.tokens
        expected = guided(state.bundle, own, x, coeffs[:, T].expand(2), context)
        plain = state.bundle.denoiser(x, coeffs[:, T].expand(2), context)
    assert torch.allclose(eps, expected, atol=2e-5)
    assert (plain[1:] - expected).abs().max() > 0.01


def guided(bundle: LatentDiffusion, own: Job, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """Guided eps by definition: each row with the sum of the weighted residuals of its controls."""
    rows = []
    for row, conditional in enumerate((False, True)):
        part = slice(row, row + 1)
        inputs = [
            own_inputs(each, Rows(x[part], t[part], context[part], None), conditional)
            for each in own.controls
        ]
        sums = combined(1, [RowInputs([0], each) for each in inputs if each])
        rows.append(bundle.denoiser(x[part], t[part], context[part], adapters=sums))
    return rows[0] + own.guidance_scale * (rows[1] - rows[0])


def own_inputs(own: JobControl, rows: Rows, conditional: bool) -> AdapterInputs | None:
    """The weighted residuals of one control on one row, without any batch."""
    network = CONTROLS[own.name]
    strengths = weights(network, own.mode, own.scale, conditional)
    image = torch.frombuffer(bytearray(own.image), dtype=torch.uint8).view(64, 64, 3)
    prepared = network.prepare(image.permute(2, 0, 1)[None] / 255)
    return scaled(network.inputs(prepared, rows), torch.tensor([strengths])) if strengths else None


def test_an_inpainting_control_sees_where_the_mask_is(runner):
    own = JOBS[6]
    load_adapters(runner, own)
    seen: list[Tensor] = []
    network = CONTROLS[FILL].network
    hook = network.input_hint_block.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    runner.start(own)
    hook.remove()
    (image,) = seen
    assert (image[:, :, 32:] == -1).all()
    assert image[:, :, :32].min() >= 0


def test_a_job_that_runs_again_in_float32_has_its_controls_in_float32(tiny):
    registry: Registry = Registry({"m": tiny}, lambda path: load(path, dtype=torch.bfloat16))
    low = control(1)
    low.network.to(torch.bfloat16)
    registry.adapters = AdapterStore(lambda key, file, model: low)
    registry.adapters.install({("control", EDGES): AdapterFile()})
    registry.specs["m"] = replace(registry.specs["m"], controls=OPTIONS)
    runner, own = TorchRunner(registry, buckets=(2,)), job("a", use(EDGES))
    load_adapters(runner, own)
    runner.start(own, full_precision=True)
    (started,) = runner.jobs["a"].phases[0].controls
    assert started.control.network.dtype == started.prepared[0].dtype == torch.float32
    assert low.network.dtype == torch.bfloat16
    runner.step([ImageKey("a", 0)])


def test_a_control_that_is_not_in_memory_is_loaded_and_kept(runner):
    own, key = job("a", use(EDGES)), AdapterKey("control", EDGES, "m")
    assert not runner.registry.is_ready(key)
    load_adapters(runner, own)
    assert runner.registry.is_ready(key)
    runner.make_room(own.weights_keys)
    assert runner.registry.is_ready(key)
    runner.make_room(())
    assert not runner.registry.is_ready(key)


def test_controls_count_as_work_at_the_steps_at_which_they_act(runner):
    def segments(*controls: JobControl, **changes) -> list[tuple[int, int, float]]:
        shape = runner.shape(job("a", *controls, **changes))
        return [(each.rows, each.evaluations, each.extra_cost / each.row_cost) for each in shape.segments]

    assert segments() == [(2, 4, 0.0)]
    assert segments(use(EDGES)) == [(2, 4, 0.8)]
    assert segments(use(EDGES), use(EDGES)) == [(2, 4, 1.6)]
    assert segments(use(EDGES, start=0.5)) == [(2, 2, 0.0), (2, 2, 0.8)]
    assert segments(use(EDGES, mode="control")) == [(2, 4, 0.4)]
    assert segments(use(EDGES), guidance_scale=1.0) == [(1, 4, 0.4)]
    once = OPTIONS[0]._replace(every_step=False)
    runner.specs["m"] = replace(runner.specs["m"], controls=(once,))
    assert segments(use(EDGES)) == [(2, 4, 0.0)]


def test_a_control_that_does_not_fit_in_memory_fails_its_own_job(runner):
    def fail(module: nn.Module, inputs: object) -> None:
        raise torch.OutOfMemoryError

    hook = CONTROLS[EDGES].network.register_forward_pre_hook(fail)
    events: list = []
    engine = Engine(runner, events.append, 8, 4, time.monotonic)
    for each in JOBS[:4]:
        engine.submit(each)
    while engine.busy:
        engine.tick()
    hook.remove()
    failed = dict.fromkeys(("one", "two"), "out_of_memory")
    assert outcomes(events) == {"none": "done", "window": "done"} | failed


def test_memory_is_measured_again_when_a_call_has_more_controls(runner):
    class Meter:
        measured, exact = 0, False

        def reset(self) -> None:
            pass

        def begin(self) -> bool:
            self.measured += 1
            return True

        def end(self, rows: int, room: int, recorded: int) -> MemoryUse:
            return MemoryUse(rows, 1, 1000)

    runner.workspace.memory = meter = Meter()
    plain, controlled = job("a"), job("b", use(EDGES))
    load_adapters(runner, plain, controlled)
    for each in (plain, controlled):
        runner.start(each)
    for key, measured in (("a", 1), ("a", 1), ("b", 2), ("a", 2), ("b", 2)):
        runner.step([ImageKey(key, 0)])
        assert meter.measured == measured
