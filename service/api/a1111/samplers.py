"""A1111's names of samplers and schedulers, and our sampler and timestep spacing for each pair of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from models.spec import Spacing
from service.api.a1111.schemas import Processing
from service.requests.checks import require

Ours = tuple[str, Spacing | None]  # our sampler, and its spacing; None: the model's own


@dataclass(frozen=True)
class SchedulerNames:
    """A1111's scheduler: a rule for which noise levels the steps visit."""

    label: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class SamplerNames:
    """A1111's sampler, and ours for each scheduler that it can be combined with.

    timesteps: it visits timesteps of its own and ignores the scheduler. uses: the A1111 parameters besides
    the scheduler that change its images.
    """

    aliases: tuple[str, ...]
    ours: Mapping[str, Ours]
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
}


def combined(ours: str, automatic: Ours | None = None) -> dict[str, Ours]:
    """Our sampler for every scheduler."""
    exponential: Ours = (f"{ours}_exponential", None)
    return {
        AUTOMATIC: automatic or (ours, None),
        "uniform": (ours, "linspace"),
        "normal": (ours, "linspace"),
        "sgm_uniform": (ours, "trailing"),
        "simple": (ours, "trailing"),
        "ddim": (ours, "leading"),
        "karras": (f"{ours}_karras", None),
        "exponential": exponential,
        "polyexponential": exponential,
    }


def on_timesteps(alias: str, ours: str, uses: frozenset[str] = frozenset()) -> SamplerNames:
    return SamplerNames((alias,), {AUTOMATIC: (ours, None)}, timesteps=True, uses=uses)


EULER, EULER_A = "Euler", "Euler a"
SAMPLERS = {
    "DPM++ 2M": SamplerNames(("k_dpmpp_2m",), combined("dpmpp_2m", automatic=("dpmpp_2m_karras", None))),
    EULER_A: SamplerNames(
        ("k_euler_a", "k_euler_ancestral"), combined("euler_ancestral"), uses=frozenset({"eta", "s_noise"})
    ),
    EULER: SamplerNames(("k_euler",), combined("euler"), uses=frozenset({"s_churn"})),
    "DDIM": on_timesteps("ddim", "ddim", frozenset({"eta"})),
    "DDPM": on_timesteps("ddpm", "ddpm"),
    "PLMS": on_timesteps("plms", "plms"),
    "UniPC": on_timesteps("unipc", "unipc"),
    "LCM": on_timesteps("k_lcm", "lcm"),
}
NEUTRAL = {"s_churn": 0.0, "s_noise": 1.0}  # values that change no image

SAMPLER_NAMES = {
    spelling.lower(): name for name, row in SAMPLERS.items() for spelling in (name, *row.aliases)
}
SCHEDULER_NAMES = {
    spelling.lower(): name for name, row in SCHEDULERS.items() for spelling in (name, row.label, *row.aliases)
}


@dataclass(frozen=True)
class SamplerChoice:
    """A request's sampler and scheduler, in A1111's words and in ours."""

    name: str
    scheduler: str
    sampler: str
    spacing: Spacing | None
    eta: float | None
    warnings: tuple[str, ...] = field(default=())

    @property
    def scheduler_label(self) -> str:
        return SCHEDULERS[self.scheduler].label


def choose_sampler(body: Processing) -> SamplerChoice:
    """Look up a request's sampler and scheduler; one name may hold both. Raises InvalidRequest."""
    wanted, scheduler = split_name(body.sampler_name or body.sampler_index or EULER, body.scheduler)
    name = SAMPLER_NAMES.get(wanted, "")
    require([("sampler_name", bool(name), f"must be one of {', '.join(SAMPLERS)}")])
    row, warnings = SAMPLERS[name], []
    if row.timesteps and scheduler != AUTOMATIC:
        warnings.append(f"scheduler is ignored: {name} visits timesteps of its own.")
        scheduler = AUTOMATIC
    offered = ", ".join(SCHEDULERS[known].label for known in row.ours)
    require([("scheduler", scheduler in row.ours, f"must be one of {offered} with {name}")])
    ours, eta = row.ours[scheduler], body.eta
    if name == EULER_A and eta is not None:
        require([("eta", eta in (0.0, 1.0), f"must be 0 or 1 with {name}")])
        ours = ours if eta else SAMPLERS[EULER].ours[scheduler]
    ignored = [] if not eta or "eta" in row.uses else ["eta"]
    for field_name, neutral in NEUTRAL.items():
        value = getattr(body, field_name)
        if value not in (None, neutral):
            used = field_name in row.uses and not (name == EULER_A and eta == 0.0)
            require([(field_name, not used, f"must be {neutral:g} with {name}")])
            ignored.append(field_name)
    warnings += [f"{field_name} is ignored: {name} does not use it." for field_name in ignored]
    return SamplerChoice(name, scheduler, *ours, eta if name == "DDIM" else None, tuple(warnings))


def split_name(sampler: str, scheduler: str | None) -> tuple[str, str]:
    """(sampler, scheduler) in lower case; a scheduler's name at the end of the sampler's takes precedence.

    A scheduler that is not in SCHEDULERS stays as it is.
    """
    wanted = sampler.strip().lower()
    if wanted not in SAMPLER_NAMES:
        for spelling in sorted(SCHEDULER_NAMES, key=len, reverse=True):  # "SGM Uniform" before "Uniform"
            if wanted.endswith(f" {spelling}"):
                return wanted.removesuffix(f" {spelling}"), SCHEDULER_NAMES[spelling]
    given = (scheduler or AUTOMATIC).strip().lower()
    return wanted, SCHEDULER_NAMES.get(given, given)
