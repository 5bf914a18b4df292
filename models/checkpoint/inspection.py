"""`ldm inspect`: describes a checkpoint and its problems without reading weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models.checkpoint import parts
from models.checkpoint.loading import open_model
from models.checkpoint.parts import OpenedModel, Part
from models.checkpoint.tokenizers import CLIP_FILES, has_clip_tokenizer
from models.formats import companions, ldm
from models.formats.averages import WeightChoice
from models.formats.diffusers_tables import TOKENIZERS
from models.formats.identify import Source, identify
from models.spec import ClassSpec, ModelSpec, Prediction, SegmentationSpec, TokenSpec


@dataclass(frozen=True)
class NetworkReport:
    """A network of a model: its parameters, and how many of them the file has in each type."""

    name: str
    parameters: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class Report:
    """The output of `ldm inspect`."""

    name: str
    layout: str
    family: str
    tasks: tuple[str, ...]
    image: tuple[int, int]  # default width and height
    latent: tuple[int, int, int]  # channels, rows, columns of such an image
    networks: tuple[NetworkReport, ...]
    averaged: bool  # the UNet's weights are averages over its training (EMA)
    schedule: dict[str, Any] | None
    prediction_origin: str  # as in identify.Source
    scale_factor: float
    conditioner: str
    notes: tuple[str, ...]
    problems: tuple[str, ...]


def inspect(
    source: str | Path | Source,
    allow_pickle: bool = False,
    prediction: Prediction | None = None,
    weights: WeightChoice = "auto",
) -> Report:
    """Describe a checkpoint. allow_pickle, prediction, weights: as for load().

    Raises CheckpointError if the checkpoint cannot be identified.
    """
    if not isinstance(source, Source):
        source = identify(source, allow_pickle, prediction, weights)
    opened = open_model(source)
    spec = opened.spec
    width, height = spec.defaults.width, spec.defaults.height
    return Report(
        name=spec.name,
        layout=layout(source),
        family=family(source),
        tasks=spec.tasks,
        image=(width, height),
        latent=spec.latent_shape(width, height),
        networks=tuple(map(network, opened.parts)),
        averaged=source.averaged,
        schedule=asdict(spec.schedule) if spec.unet else None,
        prediction_origin=source.prediction_origin,
        scale_factor=spec.autoencoder.scale_factor,
        conditioner=conditioner(spec),
        notes=tuple(notes(opened)),
        problems=tuple(problems(opened)),
    )


def layout(source: Source) -> str:
    if source.file is None or source.layout != "single file":
        return source.layout
    return f"single file ({source.file.suffix.removeprefix('.')})"


def family(source: Source) -> str:
    """The family, with the names of the paper's published checkpoints."""
    if source.file and (paper := ldm.FAMILIES.get(source.family)):
        return f"{source.family} ({paper.published})"
    return source.family


def conditioner(spec: ModelSpec) -> str:
    """A description of the model's conditioner."""
    condition = spec.condition
    if spec.texts:
        shapes = " and ".join(f"{text.layers}x{text.width}" for text in spec.texts)
        return f"CLIP's text transformer, {shapes}, {spec.texts[0].tokens} tokens"
    if isinstance(condition, TokenSpec):
        tokens = "BERT's vocabulary" if not condition.objects else "boxes"
        return f"transformer over {tokens}, {condition.layers}x{condition.width}, {condition.tokens} tokens"
    if isinstance(condition, ClassSpec):
        return f"embedding of {condition.classes} classes, {condition.width} wide"
    if isinstance(condition, SegmentationSpec):
        return f"map of {condition.classes} classes as {condition.channels} channels"
    return "none with weights of its own"


def network(part: Part) -> NetworkReport:
    name, types = type(part.network).__name__, Counter[str]()
    for key in part.names.values():
        if entry := part.weights.stored.get(key):
            types[entry.dtype] += entry.count
    return NetworkReport(name, sum(p.numel() for p in part.network.parameters()), dict(types))


def notes(opened: OpenedModel) -> Iterator[str]:
    """Facts that the user should know, no errors."""
    if opened.duplicates:
        yield f"the file has the first stage twice: {len(opened.duplicates)} tensors are redundant"
    yield from opened.notes
    if opened.spec.uses_bert_tokens and companions.find_vocabulary(opened.source.folder) is None:
        yield companions.VOCABULARY_MISSING


def problems(opened: OpenedModel) -> Iterator[str]:
    """The reasons for which load() would refuse the checkpoint."""
    yield from parts.problems(opened)
    if not opened.source.text_encoders:
        for name in (TOKENIZERS[number] for number in opened.spec.encoder_numbers):
            if not has_clip_tokenizer(opened.source.folder / name):
                yield f"{name}/{CLIP_FILES[0]} is missing"


def as_json(report: Report) -> str:
    return json.dumps(asdict(report), indent=2)


def as_text(report: Report) -> str:
    """The report as lines of a label and a text."""
    schedule, (width, height) = report.schedule, report.image
    lines = [
        ("layout", report.layout),
        ("family", report.family),
        ("tasks", ", ".join(report.tasks) or "none"),
        ("images", f"{width}x{height}, from latents of {'x'.join(map(str, report.latent))}"),
    ]
    for network in report.networks:
        types = ", ".join(network.dtypes) or "nothing in the file"
        averaged = ", averaged (EMA)" if report.averaged and network.name == "UNet" else ""
        lines.append((network.name, f"{network.parameters:,} parameters, {types}{averaged}"))
    lines.append(("conditioner", report.conditioner))
    if schedule:
        betas = f"betas {schedule['beta_start']:g} to {schedule['beta_end']:g} ({schedule['beta_schedule']})"
        if schedule["sigma_range"]:
            low, high = schedule["sigma_range"]
            betas = f"noise levels {low:g} to {high:g} of data of {schedule['sigma_data']:g} (EDM)"
        kind = f"{schedule['timesteps']} steps, {betas}"
        lines.append(("schedule", kind + (", zero terminal SNR" if schedule["zero_terminal_snr"] else "")))
        origin = f" ({report.prediction_origin})" if report.prediction_origin else ""
        lines.append(("predicts", schedule["prediction"] + origin))
    lines.append(("scale factor", f"{report.scale_factor:g}"))
    lines += [("note", note) for note in report.notes] + [("PROBLEM", text) for text in report.problems]
    width = max(len(label) for label, _ in lines)
    return "\n".join([report.name, *(f"  {label:<{width}}  {text}" for label, text in lines)])
