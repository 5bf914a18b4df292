"""The UNet of every model of the paper, narrow, against `diffusers` and a second implementation."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from models.checkpoint.parts import unet_names
from models.formats import diffusers_read, ldm, stable_diffusion
from models.formats.diffusers_write import unet_config
from models.networks.unet import UNet, timestep_embedding
from models.spec import ModelSpec
from tests.checkpoints import sd_files
from tests.checkpoints.tiny import fill_randomly, tiny_spec
from tests.helpers.numbers import LIMIT, relative_error
from tests.helpers.reference_unet import GROUPS, ROWS, Reference, as_diffusers, four_wide, spec

pytestmark = pytest.mark.slow


def random_unet(spec, seed=0):
    unet = UNet(spec)
    fill_randomly(unet, seed)
    return unet.requires_grad_(False)


def inputs(spec, h=16, w=16):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(2, spec.in_channels, h, w, generator=g)
    context = torch.randn(2, 5, spec.context_width, generator=g) if spec.context_width else None
    return x, torch.tensor([1, 801]), context


@pytest.mark.parametrize("name", ROWS)
@torch.inference_mode()
def test_eps_of_each_published_structure(name):
    unet, (x, t, context) = random_unet(ROWS[name]), inputs(ROWS[name], w=32)
    theirs = Reference(unet.state_dict(), unet.spec)(x, t, context)
    assert theirs.shape == (2, ROWS[name].out_channels, 16, 32)
    assert relative_error(unet(x, t, context), theirs) <= LIMIT


CROSS = [name for name, row in ROWS.items() if row.context_width]
CROSS_ONLY = replace(ROWS["txt2img-1p4B"], cross_only=(False, True, True, True))


@pytest.mark.parametrize("row", [*(ROWS[name] for name in CROSS), CROSS_ONLY])
@torch.inference_mode()
def test_keys_and_values_take_the_place_of_the_context(row):
    unet, (x, t, context) = random_unet(row), inputs(row)
    keys_values = torch.cat([unet.keys_values(each[None]) for each in context])
    assert relative_error(unet(x, t, keys_values=keys_values), unet(x, t, context)) <= 1e-6


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("txt2img-1p4B", "output_blocks.2.1.conv.weight"),
        ("semantic_synthesis", "output_blocks.2.1.conv.weight"),
        ("text2img256", "output_blocks.2.2.conv.weight"),
        ("celebahq", "output_blocks.2.2.conv.weight"),
        ("bsr_sr", "output_blocks.2.2.conv.weight"),
        ("bsr_sr", "output_blocks.5.1.conv.weight"),
        ("bsr_sr", "output_blocks.8.1.conv.weight"),
        ("inpainting_big", "input_blocks.3.0.in_layers.2.weight"),
        ("lsun_churches", "output_blocks.2.1.in_layers.2.weight"),
        ("celebahq", "middle_block.1.qkv.weight"),
        ("layout2img", "middle_block.1.transformer_blocks.2.attn2.to_k.weight"),
    ],
)
def test_published_keys(name, key):
    with torch.device("meta"):
        assert key in UNet(ROWS[name]).state_dict()


@torch.inference_mode()
def test_eps_against_diffusers():
    ours = random_unet(spec((1, 2, 3), (4, 2), four_wide))
    reference = UNet2DModel(
        block_out_channels=ours.spec.channels, attention_head_dim=4, norm_num_groups=GROUPS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    reference.load_state_dict(as_diffusers(ours.state_dict(), ours.spec))
    x, t, _ = inputs(ours.spec)
    theirs = reference(x, t).sample
    assert relative_error(ours(x, t), theirs) <= LIMIT


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("size", [(5, 7), (10, 15), (9, 16)])
@torch.inference_mode()
def test_sides_that_are_halved_from_odd_ones(name, size):
    """As diffusers does it: what is upsampled takes the size of its skip connection."""
    row = sd_files.narrow(sd_files.ROWS[name])
    theirs = sd_files.random(sd_files.make_unet(row), 1)
    tensors = sd_files.unet_tensors(row, theirs)
    shapes = {"model.diffusion_model." + key: tuple(value.shape) for key, value in tensors.items()}
    ours = UNet(
        ldm.unet_spec(ldm.below(shapes, ldm.UNET), row.heads, stable_diffusion.HEAD_WIDTH)
    ).requires_grad_(False)
    ours.load_state_dict(tensors)
    g = torch.Generator().manual_seed(5)
    x = torch.randn(2, row.in_channels, *size, generator=g)
    context = torch.randn(2, 77, theirs.config.cross_attention_dim, generator=g)
    t, pooled, options = torch.tensor([1, 801]), None, {}
    if row.size_width:
        texts, sizes = torch.randn(2, row.texts[-1].width, generator=g), torch.arange(12).reshape(2, 6)
        options = {"added_cond_kwargs": {"text_embeds": texts, "time_ids": sizes}}
        embedded = timestep_embedding(sizes.flatten(), row.size_width).reshape(2, -1)
        pooled = torch.cat([texts, embedded], dim=-1)
    expected = theirs(x, t, context, **options).sample
    assert expected.shape[-2:] == size
    assert relative_error(ours(x, t, context, pooled), expected) <= LIMIT


SMALL = {  # options of the UNets of SSD-1B, Segmind-Vega, KOALA-700M and tiny-sd, narrow
    "SSD-1B": {
        "layers_per_block": 2,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [3, 3]],
        "reverse_transformer_layers_per_block": [[3, 3, 4], [2, 1, 1], 1],
    },
    "Segmind-Vega": {
        "layers_per_block": 2,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, 1, 2],
    },
    "KOALA-700M": {
        "layers_per_block": 1,
        "mid_block_type": None,
        "transformer_layers_per_block": [1, 2, 3],
    },
    "tiny-sd": {"layers_per_block": 1, "mid_block_type": None, "transformer_layers_per_block": 1},
}


@pytest.mark.parametrize("name", SMALL)
@torch.inference_mode()
def test_small_unets_by_their_configuration_and_by_their_keys(name):
    options = SMALL[name] | {
        "block_out_channels": [64, 64, 128],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [1, 1, 2],
        "cross_attention_dim": 32,
        "use_linear_projection": True,
    }
    theirs = sd_files.random(UNet2DConditionModel(**options), 1)
    spec = diffusers_read.unet_spec(dict(theirs.config))
    ours = UNet(spec).requires_grad_(False)
    ours.load_state_dict({key: theirs.state_dict()[name] for key, name in unet_names(ours).items()})
    g = torch.Generator().manual_seed(5)
    x, context = torch.randn(2, 4, 8, 12, generator=g), torch.randn(2, 7, 32, generator=g)
    t = torch.tensor([1, 801])
    assert relative_error(ours(x, t, context), theirs(x, t, context).sample) <= LIMIT
    shapes = {key: tuple(value.shape) for key, value in ours.state_dict().items()}
    assert ldm.unet_spec(shapes, None, 64) == spec
    model = replace(tiny_spec(), unet=spec)
    assert ModelSpec.from_dict(json.loads(json.dumps(model.to_dict()))) == model
    assert diffusers_read.unet_spec(unet_config(model)) == spec
