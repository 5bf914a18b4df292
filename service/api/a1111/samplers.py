"""A1111's samplers and schedulers, and the native sampler and timestep spacing for each pair of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from models.spec import NoiseSpacing, Spacing
from service.api.a1111.schemas import Processing
from service.requests.checks import require

Native = tuple[str, Spacing | None]  # a native sampler and its spacing; None: the model's own


@dataclass(frozen=True)
class SchedulerNames:
    """A1111's names of a scheduler, which chooses the noise levels of the steps."""

    label: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class SamplerNames:
    """A1111's names of a sampler, and the native sampler for each scheduler that it supports.

    timesteps: the sampler has its own timesteps and ignores the scheduler. uses: A1111's parameters, besides
    the scheduler, that change its images.
    """

    aliases: tuple[str, ...]
    native: Mapping[str, Native]
    timesteps: bool = False
    uses: frozenset[str] = frozenset()


AUTOMATIC = "automatic"
SCHEDULERS = {
    AUTOMATIC: SchedulerNames("Automatic"),
    "uniform": SchedulerNames("Uniform"),
    "karras": SchedulerNames("Karras"),
    "exponential": SchedulerNames("Exponential"),
    "polyexponential": SchedulerNames("Polyexponential"),  # at its default rho, 1, equal to exponential
    "sgm_uniform": SchedulerNames("SGM Uniform", ("SGMUniform",)),
    "simple": SchedulerNames("Simple"),
    "normal": SchedulerNames("Normal"),
    "ddim": SchedulerNames("DDIM", ("ddim_uniform",)),
    "beta": SchedulerNames("Beta"),
}


def with_schedulers(native: str, automatic: NoiseSpacing | None = None) -> dict[str, Native]:
    """The native sampler for each A1111 scheduler. automatic: the sampler's own choice for "Automatic"."""
    choices: dict[str, Native] = {
        "uniform": (native, "linspace"),
        "normal": (native, "linspace"),
        "sgm_uniform": (native, "sgm_uniform"),
        "simple": (native, "simple"),
        "ddim": (native, "leading"),
        "beta": (native, "beta"),
        "karras": ("dpmpp_2m_karras", None) if native == "dpmpp_2m" else (native, "karras"),
        "exponential": (native, "exponential"),
        "polyexponential": (native, "exponential"),
    }
    return {AUTOMATIC: choices[automatic] if automatic else (native, None)} | choices


def without_schedulers(alias: str, native: str, uses: frozenset[str] = frozenset()) -> SamplerNames:
    return SamplerNames((alias,), {AUTOMATIC: (native, None)}, timesteps=True, uses=uses)


EULER, EULER_A = "Euler", "Euler a"
S_CHURN, NOISE = frozenset({"s_churn"}), frozenset({"eta", "s_noise"})
SAMPLERS = {
    "DPM++ 2M": SamplerNames(("k_dpmpp_2m", "dpmpp_2m"), with_schedulers("dpmpp_2m", "karras")),
    "DPM++ SDE": SamplerNames(
        ("k_dpmpp_sde", "dpmpp_sde"), with_schedulers("dpmpp_sde", "karras"), uses=NOISE
    ),
    "DPM++ 2M SDE": SamplerNames(
        ("k_dpmpp_2m_sde", "dpmpp_2m_sde"), with_schedulers("dpmpp_2m_sde", "exponential"), uses=NOISE
    ),
    "DPM++ 3M SDE": SamplerNames(
        ("k_dpmpp_3m_sde", "dpmpp_3m_sde"), with_schedulers("dpmpp_3m_sde", "exponential"), uses=NOISE
    ),
    EULER_A: SamplerNames(
        ("k_euler_a", "k_euler_ancestral", "euler_a", "euler_ancestral"),
        with_schedulers("euler_ancestral"),
        uses=NOISE,
    ),
    EULER: SamplerNames(("k_euler",), with_schedulers("euler"), uses=S_CHURN),
    "LMS": SamplerNames(("k_lms",), with_schedulers("lms")),
    "Heun": SamplerNames(("k_heun",), with_schedulers("heun"), uses=S_CHURN),
    "DPM2": SamplerNames(("k_dpm_2", "dpm_2"), with_schedulers("dpm2", "karras"), uses=S_CHURN),
    "DPM2 a": SamplerNames(
        ("k_dpm_2_a", "k_dpm_2_ancestral", "dpm_2_ancestral"),
        with_schedulers("dpm2_ancestral", "karras"),
        uses=NOISE,
    ),
    "DDIM": without_schedulers("ddim", "ddim", frozenset({"eta"})),
    "DDPM": without_schedulers("ddpm", "ddpm"),
    "PLMS": without_schedulers("plms", "plms"),
    "UniPC": without_schedulers("unipc", "unipc"),
    "LCM": without_schedulers("k_lcm", "lcm"),
    "TCD": without_schedulers("tcd", "tcd", frozenset({"eta"})),  # of Forge
}
NEUTRAL = {"s_churn": 0.0, "s_noise": 1.0}  # values that do not change images

SAMPLER_NAMES = {
    spelling.lower(): name for name, row in SAMPLERS.items() for spelling in (name, *row.aliases)
}
SCHEDULER_NAMES = {
    spelling.lower(): name for name, row in SCHEDULERS.items() for spelling in (name, row.label, *row.aliases)
}


@dataclass(frozen=True)
class SamplerChoice:
    """A request's sampler and scheduler, with A1111's names and with the native ones."""

    name: str  # A1111's name of the sampler
    scheduler: str  # A1111's name of the scheduler
    sampler: str
    spacing: Spacing | None
    eta: float | None
    warnings: tuple[str, ...] = field(default=())

    @property
    def scheduler_label(self) -> str:
        return SCHEDULERS[self.scheduler].label


def choose_sampler(body: Processing) -> SamplerChoice:
    """Look up a request's sampler and scheduler; sampler_name may name both. Raises InvalidRequest."""
    wanted, scheduler = split_name(body.sampler_name or body.sampler_index or EULER, body.scheduler)
    name = SAMPLER_NAMES.get(wanted, "")
    require([("sampler_name", bool(name), f"must be one of {', '.join(SAMPLERS)}")])
    row, warnings = SAMPLERS[name], []
    if row.timesteps and scheduler != AUTOMATIC:
        warnings.append(f"scheduler is ignored: {name} has its own timesteps.")
        scheduler = AUTOMATIC
    labels = ", ".join(SCHEDULERS[supported].label for supported in row.native)
    require([("scheduler", scheduler in row.native, f"must be one of {labels} with {name}")])
    native, eta = row.native[scheduler], body.eta
    if name == EULER_A and eta is not None:
        require([("eta", eta in (0.0, 1.0), f"must be 0 or 1 with {name}")])
        native = native if eta else SAMPLERS[EULER].native[scheduler]
    elif "s_noise" in row.uses:
        require([("eta", eta in (None, 1.0), f"must be 1 with {name}")])
    ignored = [] if not eta or "eta" in row.uses else ["eta"]
    for field_name, neutral in NEUTRAL.items():
        value = getattr(body, field_name)
        if value not in (None, neutral):
            used = field_name in row.uses and not (name == EULER_A and eta == 0.0)
            require([(field_name, not used, f"must be {neutral:g} with {name}")])
            ignored.append(field_name)
    warnings += [f"{field_name} is ignored: {name} does not use it." for field_name in ignored]
    return SamplerChoice(
        name, scheduler, *native, eta if row.timesteps and "eta" in row.uses else None, tuple(warnings)
    )


def split_name(sampler: str, scheduler: str | None) -> tuple[str, str]:
    """(sampler, scheduler) in lower case; a scheduler's name at the end of `sampler` takes precedence.

    An unknown scheduler is returned unchanged.
    """
    wanted = sampler.strip().lower()
    if wanted not in SAMPLER_NAMES:
        for spelling in sorted(SCHEDULER_NAMES, key=len, reverse=True):  # "SGM Uniform" before "Uniform"
            if wanted.endswith(f" {spelling}"):
                return wanted.removesuffix(f" {spelling}"), SCHEDULER_NAMES[spelling]
    given = (scheduler or AUTOMATIC).strip().lower()
    return wanted, SCHEDULER_NAMES.get(given, given)
