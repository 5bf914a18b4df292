"""The networks and pipelines of `diffusers` on a model's own tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    LDMTextToImagePipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from models.conditioning.conditioner import TokenConditioner
from models.conditioning.text_encoder import TextEncoder
from models.formats import keymaps
from models.latent_diffusion import LatentDiffusion
from models.networks.autoencoder import Autoencoder
from models.spec import ScheduleSpec, UNetSpec
from tests.helpers import reference_autoencoder, reference_token_transformer


def fast(network: nn.Module, device: torch.device, compiled: bool) -> nn.Module:
    """A network unchanged, or compiled as its documentation recommends for that device."""
    if not compiled:
        return network
    if device.type == "cuda":
        network = network.to(memory_format=torch.channels_last)
        return torch.compile(network, mode="max-autotune", fullgraph=True)
    return torch.compile(network)


def unet(weights: Mapping[str, Tensor], spec: UNetSpec) -> UNet2DConditionModel:
    """The UNet of `diffusers` with a context, on the same tensors."""
    attends = [bool(depth) for depth in spec.transformer_depth]
    blocks = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    options = {}
    if spec.added_width:
        options = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": spec.size_width,
            "projection_class_embeddings_input_dim": spec.added_width,
        }
    with torch.device("meta"):
        network = UNet2DConditionModel(
            in_channels=spec.in_channels, out_channels=spec.out_channels, block_out_channels=spec.channels,
            layers_per_block=spec.res_blocks, norm_num_groups=spec.groups,
            cross_attention_dim=spec.context_width, use_linear_projection=spec.linear_projection,
            attention_head_dim=spec.heads,  # diffusers: the number of heads, despite its name
            transformer_layers_per_block=[depth or spec.middle_depth for depth in spec.transformer_depth],
            down_block_types=[blocks[0] if attend else blocks[1] for attend in attends],
            up_block_types=[blocks[2] if attend else blocks[3] for attend in attends[::-1]], **options,
        )  # fmt: skip
    table = keymaps.unet(spec)
    named = {keymaps.rename(key, table): value for key, value in weights.items()}
    network.load_state_dict(named, strict=True, assign=True)
    return network.eval()


def autoencoder(ours: Autoencoder) -> nn.Module:
    """The autoencoder of `diffusers` with copies of these weights, of the same dtype and device."""
    theirs = reference_autoencoder.reference(ours.spec, ours.state_dict())
    return theirs.to(ours.post_quant_conv.weight.device, ours.dtype)


def text(ours: TextEncoder | TokenConditioner, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """CLIP of `transformers`, or the paper's text transformer of `diffusers`, with copies of the weights."""
    if isinstance(ours, TokenConditioner):
        theirs = reference_token_transformer.reference(ours.transformer.spec, ours.transformer.state_dict())
        return theirs.to(device, dtype)
    spec = ours.spec
    config = CLIPTextConfig(
        vocab_size=spec.vocabulary, hidden_size=spec.width, num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads, intermediate_size=spec.intermediate, hidden_act=spec.activation,
        max_position_embeddings=spec.tokens, eos_token_id=spec.eos_id, bos_token_id=spec.bos_id,
        pad_token_id=spec.pad_id, projection_dim=spec.pooled or spec.width,
    )  # fmt: skip
    theirs = CLIPTextModelWithProjection(config) if spec.pooled else CLIPTextModel(config)
    whole = theirs.text_model if spec.pooled else theirs
    whole.load_state_dict(ours.transformer.state_dict())
    if spec.pooled:
        theirs.text_projection.load_state_dict(ours.text_projection.state_dict())
    return theirs.to(device, dtype).eval()


def scheduler(spec: ScheduleSpec) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=spec.beta_start, beta_end=spec.beta_end, beta_schedule=spec.beta_schedule,
        set_alpha_to_one=spec.final_alpha_one, steps_offset=spec.steps_offset, clip_sample=False,
        timestep_spacing=spec.spacing, prediction_type=spec.prediction,
    )  # fmt: skip


def pipeline(model: LatentDiffusion, tokenizers: list, compiled: bool) -> DiffusionPipeline:
    """The pipeline of `diffusers` for this model, with DDIM."""
    spec, device, dtype = model.spec, model.device, model.unet.dtype
    vae = autoencoder(model.autoencoder)
    vae.register_to_config(scaling_factor=spec.autoencoder.scale_factor, force_upcast=False)
    parts = (unet(model.unet.state_dict(), spec.unet), scheduler(spec.schedule))
    if not spec.texts:
        network = text(model.conditioner, device, dtype)
        whole = LDMTextToImagePipeline(vae, network, tokenizers[0], *parts)
    else:
        encoders = [text(encoder, device, dtype) for encoder in model.conditioner.encoders]
        if len(encoders) == 1:
            whole = StableDiffusionPipeline(
                vae, encoders[0], tokenizers[0], *parts, None, None, requires_safety_checker=False
            )
        else:
            whole = StableDiffusionXLPipeline(vae, *encoders, *tokenizers, *parts, add_watermarker=False)
    if compiled:
        whole.unet = fast(whole.unet, device, compiled)
        vae.decoder = fast(vae.decoder, device, compiled)
    whole.set_progress_bar_config(disable=True)
    return whole
