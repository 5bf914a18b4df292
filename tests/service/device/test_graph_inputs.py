"""Jobs with controls, reference images and LoRAs by replayed CUDA graphs: the images of direct calls.

Shown on a stand-in for torch.cuda, whose graphs repeat the captured operators on fixed memory: what is no
input of a graph would keep its value of the captured call, and give another image.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from service.device.cuda_graphs import CudaRecorder
from service.device.graphs import Graphs
from service.device.loading import build
from service.device.memory import HostMemory
from service.device.runner import TorchRunner
from service.engine.job import Job, JobControl, JobReference, LoraWeights
from service.settings import Settings
from tests.checkpoints import sd_folders
from tests.checkpoints.control_files import load_unet, write_control, write_t2i_adapter
from tests.checkpoints.ip_files import ip_adapter, write_image_encoder, write_ip_adapter
from tests.checkpoints.lora_files import ATTENTION, TEXT, as_peft, random_lora, shapes_of, write_lora
from tests.helpers import fake_cuda
from tests.helpers.fake_runner import make_job
from tests.helpers.torch_runner import run_jobs

pytestmark = pytest.mark.slow

DRAW = np.random.default_rng(4)


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> TorchRunner:
    """A narrow Stable Diffusion with a ControlNet, a T2I-Adapter, an IP-Adapter and LoRAs."""
    folder = tmp_path_factory.mktemp("adapters")
    model = sd_folders.write(folder, "sd1")
    write_control(folder / "edges", model, 20)
    write_t2i_adapter(folder / "sketch", model)
    write_ip_adapter(folder / "style.safetensors", ip_adapter(load_unet(model)))
    write_image_encoder(folder / "encoder")
    for seed, (name, ends) in enumerate({"ink": ATTENTION, "oil": ATTENTION, "words": TEXT}.items()):
        write_lora(folder / f"{name}.safetensors", as_peft(random_lora(shapes_of(model, *ends), seed)))
    settings = Settings(
        device="cpu",
        backend="torch",
        buckets=(2, 4),
        controlnet=tuple(f"{name}={folder / name}" for name in ("edges", "sketch")),
        reference_adapter=(f"style={folder / 'style.safetensors'}",),
        image_encoder=(str(folder / "encoder"),),
        lora=tuple(f"{name}={folder / name}.safetensors" for name in ("ink", "oil", "words")),
    )
    return build(settings, {"sd1": model})


@pytest.fixture
def graphs(monkeypatch) -> Graphs:
    """Graphs that are captured at the second call of a kind."""
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(HostMemory, "begin", lambda memory: False)  # calls that are measured are not replayed
    return Graphs(CudaRecorder(torch.device("cpu")), record_at=2)


def image_of(runner: TorchRunner, job: Job, graphs: Graphs | None = None) -> bytes:
    """The job's image, by direct calls or by graphs."""
    runner.workspace.graphs = graphs or Graphs()
    ((image,),) = run_jobs(runner, job).values()
    return image


def job(**changes) -> Job:
    return make_job("a", model="sd1", width=64, height=64, steps=4, guidance_scale=3.0, seed=5, **changes)


def control(name: str, scale: float = 1.0) -> JobControl:
    return JobControl(name, DRAW.integers(0, 256, (64, 64, 3), np.uint8).tobytes(), scale=scale)


def reference(scale: float = 1.0) -> JobReference:
    return JobReference("style", DRAW.integers(0, 256, (64, 64, 3), np.uint8).tobytes(), 64, 64, scale)


SAME_SHAPES = {
    "residuals": [{"controls": (control("edges", scale),)} for scale in (1.0, 1.0, 0.5)],
    "features": [{"controls": (control("sketch", scale),)} for scale in (1.0, 1.0, 0.5)],
    "image tokens": [{"references": (reference(scale),)} for scale in (1.0, 1.0, 0.5)],
    "all": [{"controls": (control("edges"), control("sketch")), "references": (reference(),)} for _ in "123"],
    "contexts": [{"prompt": prompt} for prompt in ("a red apple", "a blue house", "")],
}


@pytest.mark.parametrize("kind", SAME_SHAPES)
def test_other_inputs_of_the_same_shapes_replay_the_same_graphs(runner, graphs, kind):
    first, *others = (job(**changes) for changes in SAME_SHAPES[kind])
    expected = [image_of(runner, each) for each in (first, *others)]
    assert image_of(runner, first, graphs) == image_of(runner, first, graphs) == expected[0]
    before = graphs.counts
    assert [image_of(runner, each, graphs) for each in others] == expected[1:]
    assert graphs.counts == before._replace(replayed=graphs.counts.replayed)
    assert graphs.counts.replayed > before.replayed
    assert graphs.counts.failed == 0
    assert len({*expected}) == 3


def test_each_set_of_loras_that_changes_the_unet_has_its_own_graph(runner, graphs):
    def recorded(*names: str) -> int:
        """Graphs captured for a set, after comparing its images."""
        own = job(loras=tuple(LoraWeights(name, 1.0, 1.0) for name in names))
        expected, before = image_of(runner, own), graphs.counts.recorded
        assert [image_of(runner, own, graphs) for _ in range(2)] == [expected] * 2
        images.add(expected)
        return graphs.counts.recorded - before

    images: set[bytes] = set()
    assert recorded() == 2  # of the UNet and the decoder
    assert [recorded("ink"), recorded("oil"), recorded("ink", "oil")] == [1, 1, 1]
    assert recorded("words") == 0  # changes the text encoder alone
    direct = graphs.counts.direct
    assert [recorded(), recorded("ink")] == [0, 0]
    assert graphs.counts.direct == direct
    assert graphs.counts.failed == 0
    assert len(images) == 5
