"""What a job's client should know: texts that are cut off, and controls that never act."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from models.conditioning.conditioner import TextConditioner, TokenConditioner
from service.device.inputs import prompt_options
from service.device.phases import Phase, Window
from service.device.state import JobState

MAX_WARNING_CHARS = 80  # of the ignored end of a prompt, which a warning quotes


def warnings_of(state: JobState) -> tuple[str, ...]:
    """The warnings of a job that has started."""
    return (*prompt_warnings(state), *window_warnings(state.phases[0]))


def prompt_warnings(state: JobState) -> Iterator[str]:
    """A warning for each text of the prompts that is longer than the model can read."""
    job, conditioner, composition = state.job, state.bundle.conditioner, state.phases[0].outline.composition
    if not isinstance(conditioner, TextConditioner | TokenConditioner):
        return
    texts = [("prompt", job.prompt), ("negative_prompt", job.negative_prompt)]
    if composition:
        names = ("negative_prompt" if is_negative else "prompt" for is_negative in composition.is_negative)
        texts = list(zip(names, composition.texts, strict=True))
    for name, text in texts:
        if cut_off := conditioner.overflow(text, prompt_options(job)):
            if len(cut_off) > MAX_WARNING_CHARS:
                cut_off = cut_off[:MAX_WARNING_CHARS] + "..."
            yield f"{name} is longer than the model can read; ignored: {cut_off}"


def window_warnings(phase: Phase) -> Iterator[str]:
    """A warning for each control and reference image whose window contains no step."""
    groups: dict[str, Sequence[Window]] = {"controls": phase.controls, "reference_images": phase.references}
    outline = phase.outline
    for field, uses in groups.items():
        for index, use in enumerate(uses):
            if not any(outline.acts_at(use, call) for call in range(len(phase))):
                yield f"{field}.{index} has no effect: no step of the run lies in its window"
