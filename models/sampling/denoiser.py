"""The denoiser: calls the UNet and converts its prediction to eps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.networks.adapter_inputs import AdapterInputs
from models.sampling.schedule import Schedule


class Denoiser:
    """Predicts eps with a UNet that was trained to predict eps or v."""

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
    ) -> Tensor:
        """x (B, C, h, w), t (B,) -> eps (B, C, h, w), float32.

        context: (B, L, C_ctx), for cross-attention; pooled: (B, P), added to the timestep embedding;
        concat_channels: (B, C', h, w), concatenated to x; alpha_sigma: (B, 2), of x, required for fractional
        timesteps; noise_level: (B,), of the low-resolution image in concat_channels; adapters: inputs
        from adapters.
        """
        x_in = x if concat_channels is None else torch.cat([x, concat_channels.to(x.dtype)], dim=1)
        out: Tensor = self.unet(x_in, t, context, pooled, noise_level, adapters).float()
        if self.schedule.spec.prediction == "v_prediction":
            return self.eps_from_v(out, x, t, alpha_sigma)
        return out

    def eps_from_v(self, v: Tensor, x: Tensor, t: Tensor, alpha_sigma: Tensor | None = None) -> Tensor:
        """eps = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x (Salimans and Ho 2022, appendix D).

        v, x: (B, C, h, w); t: (B,); alpha_sigma: (B, 2), looked up at t if None. -> (B, C, h, w).
        """
        if alpha_sigma is None:
            index = t.long()
            alpha_sigma = torch.stack(
                [self.sqrt_alpha_bar[index], self.sqrt_one_minus_alpha_bar[index]], dim=1
            )
        alpha, sigma = alpha_sigma[:, :, None, None, None].unbind(1)
        return alpha * v + sigma * x.float()
