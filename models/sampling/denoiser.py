"""The denoiser: calls the UNet and converts its prediction to eps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.networks.adapter_inputs import AdapterInputs
from models.networks.deep_features import DeepFeatures
from models.sampling.schedule import Schedule


class Denoiser:
    """Predicts eps with a UNet that was trained to predict eps, v or x_0."""

    def __init__(self, unet: nn.Module, schedule: Schedule) -> None:
        self.unet = unet
        self.schedule = schedule
        device = next(unet.parameters()).device
        ab = torch.from_numpy(schedule.alpha_bar)
        # Tables (T,), float32 for weights of any dtype; the square roots are computed in float64.
        self.sqrt_alpha_bar = ab.sqrt().to(device, torch.float32)
        self.sqrt_one_minus_alpha_bar = (1 - ab).sqrt().to(device, torch.float32)

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        pooled: Tensor | None = None,
        concat_channels: Tensor | None = None,
        alpha_sigma: Tensor | None = None,
        noise_level: Tensor | None = None,
        adapters: AdapterInputs | None = None,
        guidance: Tensor | None = None,
        deep: DeepFeatures | None = None,
        keys_values: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, h, w), t (B,) -> eps (B, C, h, w), float32.

        context: (B, L, C_ctx), for cross-attention; pooled: (B, P), added to the timestep embedding;
        concat_channels: (B, C', h, w), concatenated to x; alpha_sigma: (B, 2), of x, required for fractional
        timesteps; noise_level: (B,), of the low-resolution image in concat_channels; adapters: inputs
        from adapters; guidance: (B,), guidance scale of a UNet that takes it as an input; deep: deep features
        to keep or reuse; keys_values: (B, 2, L, W), in place of the context.

        From v: eps = alpha v + sigma x (Salimans and Ho 2022, appendix D); from x_0: (x - alpha x_0) / sigma.
        """
        x_in = x if concat_channels is None else torch.cat([x, concat_channels.to(x.dtype)], dim=1)
        unet_inputs = (x_in, t, context, pooled, noise_level, adapters, guidance, deep, keys_values)
        out: Tensor = self.unet(*unet_inputs).float()
        prediction = self.schedule.spec.prediction
        if prediction == "epsilon":
            return out
        alpha, sigma = self.alpha_sigma_of(t, alpha_sigma)
        if prediction == "sample":
            return (x.float() - alpha * out) / sigma
        return (alpha if prediction == "v_prediction" else -alpha) * out + sigma * x.float()

    def eps_offset(self, x: Tensor, sigma: Tensor) -> Tensor | float:
        """What eps would be if the UNet's output were 0. x: (..., C, h, w); sigma: that broadcasts with x."""
        prediction = self.schedule.spec.prediction
        if prediction == "epsilon":
            return 0.0
        return x.float() / sigma if prediction == "sample" else sigma * x.float()

    def alpha_sigma_of(self, t: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """alpha and sigma of x, each (B, 1, 1, 1): those given (B, 2), or else the schedule's at t (B,)."""
        if given is None:
            index = t.long()
            given = torch.stack([self.sqrt_alpha_bar[index], self.sqrt_one_minus_alpha_bar[index]], dim=1)
        alpha, sigma = given[:, :, None, None, None].unbind(1)
        return alpha, sigma
