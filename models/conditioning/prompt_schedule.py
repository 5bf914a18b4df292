"""Prompts that change during a run, in the syntax of AUTOMATIC1111's web UI. Imports no torch.

`[from:to:when]` is `from` up to a step and `to` after it, `[to:when]` appears and `[from::when]` vanishes;
`[a|b]` changes at every step. `when` is a step, or with a decimal point a part of the run. `AND` separates
prompts that are combined, each with a weight: `a cat :1.2 AND a dog`.

Steps are counted as that program does. A schedule is made for steps counted from 1 and looked up with steps
counted from 0, so that `[a:b:5]` is `a` in six steps, and `[a|b]` is a, a, b, a, b, ...
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

MAX_DEPTH = 100  # of nested brackets
MAX_PARTS = 16  # joined by AND
MAX_TEXTS = 64  # of a run; each is encoded once and kept
TOKEN = re.compile(r"(?P<text>(?:[^\\\[\]():|]|\\.)+)|(?P<mark>[\[\]():|])")
NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*")
AND = re.compile(r"\bAND\b")
PART_WEIGHT = re.compile(r"(.*?)(?:\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+)))?\s*", re.DOTALL)
CLOSES = {")": "(", "]": "["}


class PromptError(ValueError):
    """A prompt has too many or too deeply nested parts; the message continues the name of its field."""


class Edited(NamedTuple):
    """`before` up to the step or part `when`, `after` from then on."""

    before: Nodes
    after: Nodes
    when: str


class Alternating(NamedTuple):
    """One of the options in turn."""

    options: tuple[Nodes, ...]


Nodes = tuple["str | Edited | Alternating", ...]


@dataclass
class Frame:
    """What follows an open bracket so far: nodes, and the separators `:` and `|` between them."""

    bracket: str
    nodes: list[str | Edited | Alternating] = field(default_factory=list)
    separators: list[tuple[int, str]] = field(default_factory=list)  # index of the node that follows, mark

    def parts(self) -> list[Nodes]:
        """The nodes between the separators."""
        bounds = [0, *(index for index, _ in self.separators), len(self.nodes)]
        return [tuple(self.nodes[begin:end]) for begin, end in pairwise(bounds)]

    def closed(self) -> Nodes | None:
        """What the bracket means when it is closed here; None if it has no meaning."""
        marks, parts = "".join(mark for _, mark in self.separators), self.parts()
        if not marks:
            close = ")" if self.bracket == "(" else "]"
            return (self.bracket, *self.nodes, close)
        if self.bracket == "(":
            return ("(", *parts[0], ":", *parts[1], ")") if marks == ":" else None
        if set(marks) == {"|"}:
            return (Alternating(tuple(parts)),)
        last = parts[-1][0] if len(parts[-1]) == 1 else None
        number = NUMBER.fullmatch(last) if isinstance(last, str) else None
        if number is None or marks not in (":", "::"):
            return None
        return (Edited(parts[0] if marks == "::" else (), parts[-2], number[1]),)

    def literal(self) -> Iterator[str | Edited | Alternating]:
        """The nodes of a bracket without a meaning, as text."""
        yield self.bracket
        separators = iter([*self.separators, (len(self.nodes), "")])
        index, mark = next(separators)
        for number, node in enumerate((*self.nodes, "")):
            while number == index and mark:
                yield mark
                index, mark = next(separators)
            yield node


def parse(prompt: str) -> Nodes:
    """The texts and changes of a prompt. A prompt against the grammar is one text. Raises PromptError."""
    top: list[str | Edited | Alternating] = []
    frames: list[Frame] = []

    def give_up() -> None:
        """Take all open brackets as text."""
        for frame in frames:
            top.extend(frame.literal())
        frames.clear()

    position = 0
    while position < len(prompt):
        match = TOKEN.match(prompt, position)
        if match is None:  # a backslash at the end of a line
            return (prompt,)
        position, mark = match.end(), match["mark"]
        nodes = frames[-1].nodes if frames else top
        if mark is None:
            nodes.append(match[0])
        elif mark in "([":
            frames.append(Frame(mark))
            if len(frames) > MAX_DEPTH:
                raise PromptError(f"must have brackets that are at most {MAX_DEPTH} deep")
        elif mark in CLOSES and frames:
            meaning = frames[-1].closed() if frames[-1].bracket == CLOSES[mark] else None
            if meaning is None:
                give_up()
                top.append(mark)
            else:
                frames.pop()
                (frames[-1].nodes if frames else top).extend(meaning)
        elif frames and (mark == ":" or frames[-1].bracket == "["):
            frames[-1].separators.append((len(nodes), mark))
        elif mark == "|":
            return (prompt,)
        else:
            top.append(mark)
    give_up()
    return (prompt,) if "|" in top else tuple(top)


def text_at(nodes: Nodes, step: int, steps: int, first_pass: int | None = None) -> str:
    """The text at a step, counted from 1. first_pass: as for schedule()."""
    return "".join(_texts(nodes, step, steps, first_pass))


def _texts(nodes: Nodes, step: int, steps: int, first_pass: int | None) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, Edited):
            chosen = node.before if step <= last_step(node.when, steps, first_pass) else node.after
            yield from _texts(chosen, step, steps, first_pass)
        else:
            yield from _texts(node.options[(step - 1) % len(node.options)], step, steps, first_pass)


def last_step(when: str, steps: int, first_pass: int | None) -> int:
    """The last step, counted from 1, with the text before `when`; 0 or less: no step has it."""
    if "." in when:
        step = (float(when) - (first_pass is not None)) * steps
    else:
        step = float(when) - (first_pass or 0)
    return int(min(max(step, -1.0), float(steps)))


def change_steps(nodes: Nodes, steps: int, first_pass: int | None) -> Iterator[int]:
    """The steps, counted from 1, after which the text may change."""
    for node in nodes:
        if isinstance(node, Edited):
            yield last_step(node.when, steps, first_pass)
            yield from change_steps((*node.before, *node.after), steps, first_pass)
        elif isinstance(node, Alternating):
            yield from range(1, steps + 1)


def schedule(prompt: str, steps: int, first_pass: int | None = None) -> list[tuple[int, str]]:
    """(last step, text) in order of the steps, which are counted from 1.

    first_pass: steps of the first pass of a run with two; both passes share one axis. In the second, parts
    of the run are counted from 1 on, and steps from first_pass on. Raises PromptError.
    """
    nodes = parse(prompt)
    ends = {step for step in change_steps(nodes, steps, first_pass) if step >= 1}
    return [(end, text_at(nodes, end, steps, first_pass)) for end in sorted(ends | {steps})]


class Part(NamedTuple):
    """One of the prompts that AND combines."""

    text: str
    weight: float = 1.0


def split(prompt: str) -> list[Part]:
    """The parts of a prompt that are separated by AND. A single part may have a weight, too."""
    parts = []
    for text in AND.split(prompt):
        match = PART_WEIGHT.fullmatch(text)
        assert match is not None
        parts.append(Part(match[1], float(match[2] or 1.0)))
    return parts


class StepPrompts(NamedTuple):
    """The prompts of one UNet call, as indices of Composition.texts, and the weight of each positive one."""

    negative: int
    positive: tuple[int, ...]
    weights: tuple[float, ...]


class Composition(NamedTuple):
    """The prompts of a run.

    texts: distinct ones: the first negative and the first positive one, then all others; is_negative: of
    each; calls: one for each UNet call.
    """

    texts: tuple[str, ...]
    is_negative: tuple[bool, ...]
    calls: tuple[StepPrompts, ...]


@lru_cache(64)
def compose(
    prompt: str, negative_prompt: str, calls: int, steps: int, first_pass: int | None = None
) -> Composition:
    """The prompts of a run of `calls` UNet calls.

    steps: of the whole schedule: more than `calls` if the run is shorter, and twice the sampler's steps if it
    calls the UNet twice a step. first_pass: as for schedule(). Raises PromptError.
    """
    parts = split(prompt)
    if len(parts) > MAX_PARTS:
        raise PromptError(f"must have at most {MAX_PARTS} parts joined by AND")
    positives = [schedule(part.text, steps, first_pass) for part in parts]
    negatives = schedule(negative_prompt, steps, first_pass)
    weights = tuple(part.weight for part in parts)
    numbers: dict[tuple[bool, str], int] = {}

    def number(is_negative: bool, entries: Sequence[tuple[int, str]], call: int) -> int:
        return numbers.setdefault((is_negative, current(entries, call)), len(numbers))

    run = tuple(
        StepPrompts(
            number(True, negatives, call),
            tuple(number(False, positive, call) for positive in positives),
            weights,
        )
        for call in range(calls)
    )
    if len(numbers) > MAX_TEXTS:
        raise PromptError(f"must have at most {MAX_TEXTS} versions in a run, not {len(numbers)}")
    return Composition(tuple(text for _, text in numbers), tuple(kind for kind, _ in numbers), run)


def current(entries: Sequence[tuple[int, str]], call: int) -> str:
    """The text of a UNet call, counted from 0; after the last step the first text."""
    index = bisect_left(entries, call, key=lambda entry: entry[0])
    return entries[index % len(entries)][1]
