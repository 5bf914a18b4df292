"""From what the UNet predicts to eps, and guidance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.sampling.schedule import Schedule


class Denoiser:
    """The UNet as a predictor of eps, whatever it was trained to predict."""

    def __init__(self, unet: nn.Module, schedule: Schedule) -> None:
        self.unet = unet
        self.schedule = schedule
        device = next(unet.parameters()).device
        ab = torch.from_numpy(schedule.alpha_bar)
        # Tables of (T,) float32 beside the weights, whatever type those have; the roots are taken in float64.
        self.sqrt_alpha_bar = ab.sqrt().to(device, torch.float32)
        self.sqrt_one_minus_alpha_bar = (1 - ab).sqrt().to(device, torch.float32)

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        pooled: Tensor | None = None,
        beside: Tensor | None = None,
        level: Tensor | None = None,
        noise_level: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, h, w); t (B,); context (B, L, C_ctx); pooled (B, P), what it is told beside the timestep;
        beside (B, C', h, w), channels that the UNet takes after those of x; level (B, 2), the alpha and sigma
        of x, needed where t is not whole; noise_level (B,), of what is beside x.
        -> eps (B, C, h, w), float32.
        """
        x_in = x if beside is None else torch.cat([x, beside.to(x.dtype)], dim=1)
        out = self.unet(x_in, t, context, pooled, noise_level).float()
        return self.eps_from_v(out, x, t, level) if self.schedule.spec.prediction == "v_prediction" else out

    def eps_from_v(self, v: Tensor, x: Tensor, t: Tensor, level: Tensor | None = None) -> Tensor:
        """eps = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x (Salimans and Ho 2022, appendix D)."""
        if level is None:
            index = t.long()
            level = torch.stack([self.sqrt_alpha_bar[index], self.sqrt_one_minus_alpha_bar[index]], dim=1)
        alpha, sigma = level[:, :, None, None, None].unbind(1)
        return alpha * v + sigma * x.float()


def guide(eps_uncond: Tensor, eps_cond: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2021, equation 6, with scale = 1 + w).

    eps: (B, C, h, w); scale: a number, or (B,) for one of each row. -> (B, C, h, w).
    """
    if isinstance(scale, Tensor) and scale.dim():
        scale = scale[:, None, None, None]
    return eps_uncond + scale * (eps_cond - eps_uncond)
