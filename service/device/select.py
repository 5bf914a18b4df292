"""The choice of the device, and what a loaded model needs to run on it."""

from __future__ import annotations

import torch
from torch import Tensor

from models.latent_diffusion import LatentDiffusion
from models.networks.unet import stack_layers
from service.settings import SettingError

TRIAL_TIMESTEPS = (0.02, 0.98)  # fractions of the schedule at which a trial run looks for overflow


def choose_device(name: str) -> torch.device:
    """The device that a setting names. Raises SettingError if it does not exist, or for several devices."""
    if "," in name:
        raise SettingError(f"device is {name}; only ldm serve can use several devices")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise SettingError(f"device is {name}, but the number of CUDA devices is {count}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # kernels and streams use the current device
    return device


def prepare_for_device(bundle: LatentDiffusion, device: torch.device) -> LatentDiffusion:
    """Set the memory format and the dtypes that a loaded model runs best with; returns the same model.

    On CUDA, networks become channels_last, in which convolutions are fastest, and linear layers of one input
    become one product. On a CPU weights stay where they are, because they may be mapped from files.
    A network that overflows in float16 becomes bfloat16. A trial run finds that here, because an overflow at
    the first image would spoil that image and those that share its calls.
    """
    unet, autoencoder = bundle.unet, bundle.autoencoder
    if device.type == "cuda":
        autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stub
        if unet is not None:
            unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stub
    if unet is not None and unet.dtype == torch.float16 and not try_unet(bundle).isfinite().all():
        unet.to(torch.bfloat16)
    if autoencoder.dtype == torch.float16 and not try_decoder(bundle).isfinite().all():
        autoencoder.to(torch.bfloat16)
    if unet is not None and device.type == "cuda":
        stack_layers(unet)
    return bundle


@torch.inference_mode()
def try_unet(bundle: LatentDiffusion) -> Tensor:
    """The UNet's output for random input at the default size, near both ends of the schedule."""
    assert bundle.unet is not None
    eps: Tensor = bundle.unet(*trial_inputs(bundle))
    return eps


def trial_inputs(bundle: LatentDiffusion, max_side: int = 0) -> tuple[Tensor | None, ...]:
    """Random inputs of the UNet for two rows, near both ends of the schedule.

    At the default size; max_side: largest side of the latent, 0 for no limit.
    """
    unet_spec, device, defaults = bundle.spec.unet_spec, bundle.device, bundle.spec.defaults
    generator = torch.Generator().manual_seed(0)

    def noise(*sizes: int) -> Tensor:
        return torch.randn(2, *sizes, generator=generator).to(device)

    _, *size = bundle.spec.latent_shape(defaults.width, defaults.height)
    size = [min(side, max_side or side) for side in size]
    timesteps = [fraction * len(bundle.schedule.alpha_bar) for fraction in TRIAL_TIMESTEPS]
    t = torch.tensor(timesteps, device=device)
    context = noise(*bundle.spec.context_shape) if bundle.spec.context_shape else None
    pooled = noise(unet_spec.added_width) if unet_spec.added_width else None
    x = noise(unet_spec.in_channels, *size)
    return x, t, context, pooled, bundle.noise_levels([0, 0])


@torch.inference_mode()
def try_decoder(bundle: LatentDiffusion) -> Tensor:
    """The VAE decoder's output for a random latent of the default size."""
    defaults = bundle.spec.defaults
    shape = bundle.spec.latent_shape(defaults.width, defaults.height)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    return bundle.decode(noise.to(bundle.device))
