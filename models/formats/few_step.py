"""Recognises models and LoRAs that were distilled to few steps, and knows how each kind is usually run.

Their tensors look like any other model's, except those of a latent consistency model, which takes the
guidance scale. So the names that files, headers and configurations give decide; they set defaults only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from models.spec import Defaults, FewStep, ModelSpec, Spacing

MAX_NAMED_STEPS = 16  # larger numbers before "step" in a name are something else
HEADER_NAMES = ("modelspec.title", "ss_output_name")
SDXL_TURBO_SIZE = 512  # pixels along a side; SDXL's own models are twice as large
EMBEDDED = FewStep("LCM", 4, 8.5, "lcm")  # a UNet that takes the guidance scale (Luo et al. 2023)


class Kind(NamedTuple):
    """A kind of few-step model. pattern: found in a name in the form of plain()."""

    name: str
    pattern: str
    sampler: str
    spacing: Spacing | None
    steps: int  # unless the name says how many
    guidance_scale: float = 1.0
    eta: float = 0.0
    first_timestep: int | None = None


# The first match counts. Sources: the model cards and the pipelines of diffusers.
KINDS = (
    Kind("DMD2, 1 step", r"\bdmd2.*\b1 ?step", "lcm", "trailing", 1, first_timestep=399),
    Kind("DMD2", r"\bdmd2", "lcm", "trailing", 4),
    Kind("Hyper-SD UNet", r"\bhyper ?sd.*\b1 ?step.*\bunet", "lcm", "trailing", 1, first_timestep=800),
    Kind("Hyper-SD with guidance", r"\bhyper ?sd.*\bcfg", "ddim", "trailing", 8, 5.0),
    Kind("Hyper-SD, 1 step", r"\bhyper ?sd.*\b1 ?steps?\b", "tcd", None, 1, eta=1.0),
    Kind("Hyper-SD", r"\bhyper ?sd", "ddim", "trailing", 8),
    Kind("TCD", r"\btcd\b", "tcd", None, 4, eta=0.3),
    Kind("Lightning", r"(sd|xl).*lightning|lightning.*\d ?steps?\b", "euler", "trailing", 4),
    Kind("SDXL-Turbo", r"\bsd ?xl ?turbo\b", "euler_ancestral", "trailing", 4),
    Kind("SD-Turbo", r"\bsd ?turbo\b", "euler_ancestral", "trailing", 4),
    Kind("LCM", r"\blcm\b", "lcm", None, 4),
    Kind("progressive distillation", r"\bfew steps?\b", "lcm", None, 4),  # by `ldm train few-steps`
)
SCHEDULERS = {"LCMScheduler": "LCM", "TCDScheduler": "TCD"}  # of diffusers folders, used by nothing else
# Lightning's model for one step predicts x_0; no other part of its file says so.
PREDICTS_X_0 = re.compile(r"lightning.*\b1 ?steps?\b.*\bx0\b")


def plain(name: str) -> str:
    """A name in lower case, with single spaces between its words and numbers."""
    return " ".join(re.findall(r"[a-z0-9]+", name.lower()))


def of_name(name: str) -> FewStep | None:
    """The usual settings of a model or LoRA with this name; None if it names no kind."""
    text = plain(name)
    kind = next((kind for kind in KINDS if re.search(kind.pattern, text)), None)
    if kind is None:
        return None
    named = next((int(n) for n in re.findall(r"\b(\d{1,2}) ?steps?\b", text)), kind.steps)
    steps = named if 1 <= named <= MAX_NAMED_STEPS else kind.steps
    fields = kind.guidance_scale, kind.sampler, kind.spacing, kind.eta, kind.first_timestep
    return FewStep(kind.name, steps, *fields)


def of_names(names: Iterable[tuple[str, str]]) -> tuple[FewStep, str] | None:
    """The settings and the origin of the first of these (origin, name) that names a kind."""
    for origin, name in names:
        if found := of_name(name):
            return found, origin
    return None


def header_names(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """(origin, name) of the names in a safetensors header."""
    return [(f"{key} in the file's header", metadata[key]) for key in HEADER_NAMES if key in metadata]


def predicts_x_0(name: str) -> bool:
    """Whether a model with this name predicts x_0."""
    return bool(PREDICTS_X_0.search(plain(name)))


def note(found: FewStep, origin: str) -> str:
    """A sentence for the user on these settings and their origin."""
    spacing = f", spacing {found.spacing}" if found.spacing else ""
    return (
        f"usual settings of {found.kind} ({origin}): {found.sampler}{spacing}, {found.steps} steps, "
        f"guidance {found.guidance_scale:g}"
    )


def with_few_steps(spec: ModelSpec, names: Iterable[tuple[str, str]]) -> tuple[ModelSpec, str | None]:
    """The spec with the defaults of its few-step kind, and a note; unchanged if it is of no kind.

    names: (origin, name), the most trustworthy first.
    """
    if not spec.texts or spec.upscaling or spec.unet is None:
        return spec, None
    found, origin = of_names(names) or (None, "")
    if spec.embeds_guidance:
        # A LoRA or a later distillation may be merged in, but guidance stays an input.
        found, origin = EMBEDDED, "its UNet takes the guidance scale"
    if found is None:
        return spec, None
    schedule = spec.schedule
    if found.spacing == "trailing":
        schedule = replace(schedule, spacing="trailing", first_timestep=found.first_timestep)
    changed = replace(spec, few_step=found, schedule=schedule, defaults=with_settings(spec.defaults, found))
    return changed, note(found, origin)


def with_settings(defaults: Defaults, found: FewStep) -> Defaults:
    largest = SDXL_TURBO_SIZE if found.kind == "SDXL-Turbo" else max(defaults.width, defaults.height)
    return replace(
        defaults,
        width=min(largest, defaults.width),
        height=min(largest, defaults.height),
        steps=found.steps,
        guidance_scale=found.guidance_scale,
        sampler=found.sampler,
        spacing=found.spacing,
        eta=found.eta,
    )
