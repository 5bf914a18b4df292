"""A1111's fields that divide a run into phases: the second pass (hires fix) and the refiner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.api.a1111.checks import NO_MODEL
from service.api.a1111.samplers import choose_sampler
from service.api.a1111.schemas import Processing, TextToImage
from service.api.a1111.session import A1111Session
from service.requests.checks import require

DEFAULT_SCALE = 2.0
DEFAULT_STRENGTH = 0.75
DEFAULT_UPSCALER = "Latent"
MAX_STRENGTH = 0.999  # A1111 takes a larger one for this one
UPSCALERS: Mapping[str, str] = {  # name -> native name
    "Latent": "latent",
    "Latent (antialiased)": "latent_antialiased",
    "Latent (bicubic)": "latent_bicubic",
    "Latent (bicubic antialiased)": "latent_bicubic_antialiased",
    "Latent (nearest)": "latent_nearest",
    "Latent (nearest-exact)": "latent_nearest_exact",
    "Lanczos": "lanczos",
    "Nearest": "nearest",
    "None": "lanczos",  # A1111 resizes with it where the upscaler changes nothing
}
# Field -> its values that mean the value of the first pass, besides null.
OF_THE_FIRST_PASS: Mapping[str, tuple[Any, ...]] = {
    "hr_checkpoint_name": ("", "None", "Use same checkpoint"),
    "hr_sampler_name": ("", "Use same sampler"),
    "hr_scheduler": ("", "Use same scheduler"),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
}


def hires_strength(body: Processing) -> float | None:
    """The denoising strength of the second pass; None without one."""
    if not (isinstance(body, TextToImage) and body.enable_hr):
        return None
    return DEFAULT_STRENGTH if body.denoising_strength is None else body.denoising_strength


def hires_of(body: Processing, steps: int) -> dict[str, Any] | None:
    """The native field `hires`; None without a second pass. steps: of the first. Raises InvalidRequest."""
    strength = hires_strength(body)
    if strength is None or not isinstance(body, TextToImage):
        return None
    check_hires(body, strength)
    # A1111 runs all of these steps, of a schedule that is so much longer.
    upscaler = body.hr_upscaler or DEFAULT_UPSCALER  # or an upscaling model
    run = body.hr_second_pass_steps or steps
    whole = int(run / min(strength, MAX_STRENGTH))
    sides = {"width": body.hr_resize_x or None, "height": body.hr_resize_y or None}
    resized = any(sides.values())
    return (sides if resized else {"scale": DEFAULT_SCALE if body.hr_scale is None else body.hr_scale}) | {
        "strength": run / whole,
        "steps": whole,
        "upscaler": UPSCALERS.get(upscaler, upscaler),
        "prompt": body.hr_prompt or None,
        "negative_prompt": body.hr_negative_prompt or None,
    }


def check_hires(body: TextToImage, strength: float) -> None:
    """Raise InvalidRequest for what a second pass cannot do."""
    first = {
        "hr_sampler_name": (body.sampler_name, choose_sampler(body).name),
        "hr_scheduler": (body.scheduler, choose_sampler(body).scheduler_label),
    }
    same = {name: (None, *neutral, *first.get(name, ())) for name, neutral in OF_THE_FIRST_PASS.items()}
    require(
        (
            ("denoising_strength", 0 < strength <= 1, "must be above 0 and at most 1 with enable_hr"),
            *(
                (name, getattr(body, name) in allowed, "is not supported; it must be that of the first pass")
                for name, allowed in same.items()
            ),
            (
                "hr_cfg",
                body.hr_cfg in (None, body.cfg_scale),
                "is not supported; it must be that of the first pass",
            ),
            ("hr_prompt", "<" not in (body.hr_prompt or ""), "must not name extra networks"),
        )
    )


def hires_lines(body: Processing) -> dict[str, Any]:
    """The lines of an infotext about the second pass."""
    if hires_strength(body) is None or not isinstance(body, TextToImage):
        return {}
    resized = body.hr_resize_x or body.hr_resize_y
    return {
        "Hires upscale": None if resized else (DEFAULT_SCALE if body.hr_scale is None else body.hr_scale),
        "Hires resize": f"{body.hr_resize_x or 0}x{body.hr_resize_y or 0}" if resized else None,
        "Hires steps": body.hr_second_pass_steps or None,
        "Hires upscaler": body.hr_upscaler or DEFAULT_UPSCALER,
        "Hires prompt": body.hr_prompt or None,
        "Hires negative prompt": body.hr_negative_prompt or None,
    }


def refiner_of(body: Processing, session: A1111Session) -> dict[str, Any] | None:
    """The native field `refiner`; None without one. Raises InvalidRequest, and NotFound for the model."""
    name, switch_at = body.refiner_checkpoint, body.refiner_switch_at
    if name is None or name in NO_MODEL or (switch_at is not None and switch_at >= 1):
        return None
    is_part = switch_at is not None and switch_at > 0
    require([("refiner_switch_at", is_part, "must be above 0 with refiner_checkpoint")])
    return {"model": session.find(name, "refiner_checkpoint"), "switch_at": switch_at}
