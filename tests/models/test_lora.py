"""LoRA against `diffusers` and `peft`: the same file on the same weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline

from models import lora
from models.checkpoint import load
from models.conditioner import Asked
from tests.loras import ATTENTION, TEXT, as_kohya, as_peft, random_lora, shapes_of, write_lora

LIMIT = 1e-5
ASKED = Asked("red apple", "blue")


@pytest.fixture(scope="module")
def base(tiny):
    return load(tiny)


@pytest.fixture(scope="module")
def changes(tiny):
    return random_lora(shapes_of(tiny, *ATTENTION, *TEXT))


def opened(base, *files):
    """Those of these files, each by its stem."""
    return list(lora.open_loras({f.stem: f for f in files}, {"tiny": base.spec})["tiny"].values())


def outputs(bundle):
    """eps and the context."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    with torch.inference_mode():
        context = bundle.contexts(ASKED)
        context = getattr(context, "tokens", context)
        return bundle.unet(x, torch.tensor([5, 700]), context), context


def reference(folder, tensors, weight=1.0):
    """The same of diffusers, with the changes fused."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False, dtype=torch.float32)
    pipeline.load_lora_weights(dict(tensors))
    pipeline.fuse_lora(lora_scale=weight)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    with torch.inference_mode():
        ids = pipeline.tokenizer(
            [ASKED.negative_prompt, ASKED.prompt], padding="max_length", return_tensors="pt"
        ).input_ids
        context = pipeline.text_encoder(ids).last_hidden_state
        return pipeline.unet(x, torch.tensor([5, 700]), context).sample, context


def difference(ours, theirs):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("style", [as_kohya, as_peft])
def test_a_file_changes_the_model_as_diffusers_fuses_it(tiny, base, changes, style, tmp_path):
    (ours,) = opened(base, write_lora(tmp_path / "a.safetensors", style(changes)))
    theirs = reference(tiny, style(changes), 0.7)
    assert difference(outputs(lora.apply(base, [(ours, 0.7)])), theirs) <= LIMIT
    assert difference(outputs(base), theirs) > 0.1
