"""What `ldm inspect` says about an adapter."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

from models.formats.safetensors import Stored

UNKNOWN = "unknown"


@dataclass(frozen=True)
class AdapterReport:
    """The output of `ldm inspect` for an adapter.

    kinds: kind of change -> number of modules. ranks: rank -> number of modules. vectors: of an embedding.
    ignored: tensors that no model reads, or that the given model has no place for.
    """

    name: str
    adapter: str
    base_model: str
    dtypes: dict[str, int]
    kinds: dict[str, int] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    vectors: int = 0
    parameters: int = 0  # of an adapter with a network of its own
    bytes: int = 0  # of its weights, as they are stored
    details: dict[str, str] = field(default_factory=dict)  # label -> fact about such a network
    embeddings: tuple[str, ...] = ()  # in a LoRA file
    few_step: str = ""  # usual settings of a LoRA for few steps, and what says so
    ignored: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def dtypes(tensors: Mapping[str, Stored]) -> dict[str, int]:
    """Numbers of each type."""
    types = Counter[str]()
    for stored in tensors.values():
        types[stored.dtype] += stored.count
    return dict(types.most_common())


def as_json(report: AdapterReport) -> str:
    return json.dumps(asdict(report), indent=2)


def as_text(report: AdapterReport) -> str:
    """The report as lines of a label and a text."""
    lines = list(text_lines(report))
    width = max(len(label) for label, _ in lines)
    return "\n".join([report.name, *(f"  {label:<{width}}  {text}" for label, text in lines)])


def text_lines(report: AdapterReport) -> Iterator[tuple[str, str]]:
    yield "adapter", report.adapter
    yield "base model", report.base_model
    if report.kinds:
        yield "kinds", ", ".join(f"{kind}: {count} modules" for kind, count in report.kinds.items())
    if report.ranks:
        yield "ranks", ", ".join(f"{rank} ({count} modules)" for rank, count in report.ranks.items())
    if report.vectors:
        yield "vectors", str(report.vectors)
    if report.parameters:
        yield "parameters", f"{report.parameters:,}, {report.bytes / 2**20:.1f} MiB"
    yield from report.details.items()
    yield "types", ", ".join(report.dtypes)
    if report.embeddings:
        yield "embeddings", ", ".join(report.embeddings)
    if report.few_step:
        yield "few steps", report.few_step
    for key in report.ignored:
        yield "ignored", key
    for problem in report.problems:
        yield "PROBLEM", problem
