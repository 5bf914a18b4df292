"""Tiny models of every kind that the paper published, with random weights, in their published file layout."""

from __future__ import annotations

from dataclasses import replace

import torch
from safetensors.torch import save_file

from models.conditioning.conditioner import make_conditioner
from models.networks.autoencoder import Autoencoder
from models.networks.unet import UNet
from models.sampling.schedule import Schedule
from models.spec import AutoencoderSpec, ClassSpec, ScheduleSpec, SegmentationSpec, TokenSpec, UNetSpec
from tests.checkpoints.tiny import fill_randomly

VQ = AutoencoderSpec(
    channels=(32, 64), res_blocks=2, latent_channels=3, scale_factor=1.0, sample_size=256, codes=64
)
KL = replace(VQ, codes=0, latent_channels=4, attention_levels=(1,), scale_factor=0.18215)
WORDS = TokenSpec(vocabulary=40, width=16, layers=2, tokens=77)
BOXES = replace(WORDS, tokens=92, objects=30)


def unet(latent=3, concat=0, context=0, heads=(1, 2), depth=(0, 1), **options):
    return UNetSpec(
        in_channels=latent + concat, out_channels=latent, channels=(32, 64), res_blocks=2, heads=heads,
        transformer_depth=depth, middle_depth=options.pop("middle", 1), context_width=context, **options,
    )  # fmt: skip


EIGHT = {"heads": (8, 8)}
CHURCHES = EIGHT | {"depth": (1, 0), "residual_resampling": True, "scale_shift_norm": True}
ROWS = {  # model -> shapes of UNet, autoencoder and conditioner, and the last beta
    "celebahq": (unet(), VQ, None, 0.0195),
    "lsun_churches": (unet(4, **CHURCHES), replace(KL, scale_factor=0.25), None, 0.0155),
    "cin256": (unet(context=16, depth=(1, 1)), VQ, ClassSpec(1000, 16), 0.0195),
    "cin256-v2": (unet(context=16, heads=(1, 1)), VQ, ClassSpec(1001, 16, null=1000), 0.0195),
    "text2img256": (unet(context=16), VQ, WORDS, 0.0195),
    "txt2img-1p4B": (unet(4, context=16, depth=(1, 0), **EIGHT), KL, WORDS, 0.012),
    "inpainting_big": (
        unet(concat=4, residual_resampling=True, **EIGHT), replace(VQ, middle_attention=False,
        sample_size=512), None, 0.0205,
    ),
    "bsr_sr": (unet(concat=3, depth=(0, 0)), VQ, None, 0.0155),
    "layout2img": (unet(context=16, depth=(0, 3), middle=3), VQ, BOXES, 0.0205),
    "semantic_synthesis": (unet(concat=3, depth=(0, 0), **EIGHT), VQ, SegmentationSpec(18, 3), 0.0205),
    "rdm768": (
        unet(16, context=16), replace(KL, latent_channels=16, scale_factor=0.22765929, sample_size=768),
        None, 0.015,
    ),
}  # fmt: skip


def random(network, seed):
    fill_randomly(network, seed)
    return network.requires_grad_(False).eval()


def published(name, row=None, twice=True):
    """The tensors of a model's file: last weights, averaged weights if the original has them, and tables.

    row: shapes; None: ROWS[name]. twice: False saves memory: next to averaged weights, the last ones are
    float16 zeros.
    """
    unet, first_stage, condition, end = row or ROWS[name]
    start = 0.00085 if name == "txt2img-1p4B" else 0.0015
    schedule = ScheduleSpec(beta_start=start, beta_end=end)
    out = {"betas": torch.from_numpy(Schedule(schedule).betas).float(), "logvar": torch.zeros(1000)}
    averages = name not in ("cin256-v2", "txt2img-1p4B")
    if twice or not averages:
        last = random(UNet(unet), 1).state_dict()
    else:
        with torch.device("meta"):
            last = UNet(unet).state_dict()
        last = {key: torch.zeros(value.shape, dtype=torch.float16) for key, value in last.items()}
    out |= {f"model.diffusion_model.{key}": value for key, value in last.items()}
    if averages:
        averaged = random(UNet(unet), 2).state_dict()
        out |= {"model_ema.diffusion_model" + key.replace(".", ""): v for key, v in averaged.items()}
        out |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(9)}
    e = random(Autoencoder(first_stage), 3).state_dict()
    out |= {f"first_stage_model.{key}": value for key, value in e.items()}
    if name == "inpainting_big":
        out |= {f"cond_stage_model.{key}": value.clone() for key, value in e.items()}
    if condition:
        c = random(make_conditioner(condition), 4).state_dict()
        out |= {f"cond_stage_model.{key}": value for key, value in c.items()}
    if isinstance(condition, TokenSpec):
        out["cond_stage_model.transformer.to_logits.weight"] = torch.zeros(
            condition.vocabulary, condition.width
        )
    if name == "lsun_churches":
        out["scale_factor"] = torch.tensor(0.25)
    return out


def write(tmp_path, name, edit=lambda tensors: None):
    tensors = published(name)
    edit(tensors)
    save_file(tensors, tmp_path / f"{name}.safetensors")
    return tmp_path / f"{name}.safetensors"
