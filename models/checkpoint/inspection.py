"""What a checkpoint is and what is wrong with it, without reading a weight."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models.checkpoint.folder import Opened, Part, faults, listed, open_model
from models.formats import companions, single_file, stable_diffusion
from models.formats.diffusers_read import TOKENIZERS
from models.spec import ClassSpec, ModelSpec, Prediction, SegmentationSpec, TokenSpec

FAMILIES = {  # rows of models.zoo -> what they are, and the published models
    "unconditional VQ": "unconditional (celebahq, ffhq, lsun_beds)",
    "unconditional KL": "unconditional (lsun_churches)",
    "class": "class-conditional (cin256)",
    "class or none": "class-conditional with guidance (cin256-v2)",
    "text VQ": "text (text2img256)",
    "text KL": "text (txt2img-1p4B)",
    "masked picture": "inpainting by concatenation (inpainting_big)",
    "low-resolution picture": "super-resolution (bsr_sr)",
    "boxes": "layout of boxes (layout2img-openimages256)",
    "segmentation": "semantic synthesis (semantic_synthesis)",
    "neighbours": "retrieval-augmented (rdm768)",
}
STABLE = {  # by the context's width
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "Stable Diffusion XL",
}


@dataclass(frozen=True)
class Network:
    """A network of a model: parameters that it has, and how many the file holds of each type."""

    name: str
    parameters: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class Report:
    """What `ldm inspect` says."""

    name: str
    layout: str
    family: str
    tasks: tuple[str, ...]
    picture: tuple[int, int]  # width, height by default
    latent: tuple[int, int, int]  # channels, rows, columns of such a picture
    networks: tuple[Network, ...]
    averaged: bool  # the UNet's weights are averages over its training
    schedule: dict[str, Any] | None
    scale_factor: float
    conditioner: str
    notes: tuple[str, ...]
    problems: tuple[str, ...]


def inspect(path: Path, allow_pickle: bool = False, prediction: Prediction | None = None) -> Report:
    """Of a folder or a single file; prediction: as of read_spec().

    Raises CheckpointError where it is not even known what it is.
    """
    opened = open_model(path, "cpu", allow_pickle, prediction)
    spec, file = opened.spec, single_file.weights_of(path)
    width, height = spec.defaults.width, spec.defaults.height
    return Report(
        name=spec.name,
        layout=layout(path, file),
        family=family(opened, file),
        tasks=spec.tasks,
        picture=(width, height),
        latent=spec.latent_shape(width, height),
        networks=tuple(map(network, opened.parts)),
        averaged=opened.averaged,
        schedule=asdict(spec.schedule) if spec.unet else None,
        scale_factor=spec.autoencoder.scale_factor,
        conditioner=conditioner(spec),
        notes=tuple(notes(opened, path)),
        problems=tuple(problems(opened, path)),
    )


def layout(path: Path, file: Path | None) -> str:
    if file is None:
        return "diffusers folder"
    return "folder of a single file" if path.is_dir() else f"single file ({file.suffix.removeprefix('.')})"


def family(opened: Opened, file: Path | None) -> str:
    """Which of the known models it is like."""
    spec = opened.spec
    if spec.unet is None:
        return f"first stage alone ({'VQ' if spec.autoencoder.codes else 'KL'}-f{spec.autoencoder.factor})"
    if file:
        kind = single_file.kind_of(file, opened.weights.stored, spec)
        return FAMILIES.get(kind, kind)  # those of Stable Diffusion are called as they are
    if spec.upscaling and spec.texts:
        return "Stable Diffusion x4 upscaler"
    if spec.upscaling:
        told = ", told the noise on the picture" if spec.upscaling.noise else ""
        return f"super-resolution, {spec.autoencoder.factor}x{told}"
    known = STABLE.get(spec.unet.context_width, "text (Stable Diffusion's structure)")
    return known + (" inpainting" if spec.mask_channels else "")


def conditioner(spec: ModelSpec) -> str:
    """What a request's wishes go through."""
    condition = spec.condition
    if spec.texts:
        shapes = " and ".join(f"{text.layers}x{text.width}" for text in spec.texts)
        return f"CLIP's text transformer, {shapes}, {spec.texts[0].tokens} tokens"
    if isinstance(condition, TokenSpec):
        what = "BERT's words" if not condition.objects else "boxes"
        return f"transformer over {what}, {condition.layers}x{condition.width}, {condition.tokens} tokens"
    if isinstance(condition, ClassSpec):
        return f"{condition.classes} classes, {condition.width} wide"
    if isinstance(condition, SegmentationSpec):
        return f"map of {condition.classes} classes as {condition.channels} channels"
    return "none of its own"


def network(part: Part) -> Network:
    kind = type(part.network).__name__
    types = Counter()
    for name in part.names.values():
        if entry := part.weights.stored.get(name):
            types[entry.dtype] += entry.count
    return Network(kind, sum(p.numel() for p in part.network.parameters()), dict(types))


def notes(opened: Opened, path: Path) -> Iterator[str]:
    """What is worth knowing and no fault."""
    if opened.copies:
        yield f"the first stage is there twice: {len(opened.copies)} tensors more than needed"
    if (file := single_file.weights_of(path)) and single_file.is_guessed(file, opened.weights.stored):
        taken = opened.spec.schedule.prediction
        yield f"eps or v, no tensor shows: taken for {taken}; a YAML file beside it or --prediction tells"
    if opened.spec.uses_bert_tokens and companions.find(path) is None:
        yield companions.WANTED
    if opened.spec.lacks_text_encoder:
        yield companions.TEXT_WANTED


def problems(opened: Opened, path: Path) -> Iterator[str]:
    """What load() would refuse."""
    for part in opened.parts:
        for what, keys in faults(part).items():
            if keys:
                yield f"{type(part.network).__name__}: {listed(what, keys)}"
    if opened.rest:
        yield listed("unexpected", list(opened.rest))
    if opened.weights and stable_diffusion.places(opened.weights.stored):
        return
    folder = path if path.is_dir() else path.parent
    for tokenizer, _ in zip(TOKENIZERS, opened.spec.texts, strict=False):
        if not any((folder / tokenizer / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            yield f"{tokenizer}/vocab.json is missing"


def as_json(report: Report) -> str:
    return json.dumps(asdict(report), indent=2)


def as_text(report: Report) -> str:
    """Lines for people."""
    schedule, (width, height) = report.schedule, report.picture
    lines = [
        ("layout", report.layout),
        ("family", report.family),
        ("tasks", ", ".join(report.tasks) or "none"),
        ("pictures", f"{width}x{height}, of latents {'x'.join(map(str, report.latent))}"),
    ]
    for network in report.networks:
        types = ", ".join(network.dtypes) or "nothing in the file"
        averaged = ", averaged (EMA)" if report.averaged and network.name == "UNet" else ""
        lines.append((network.name, f"{network.parameters:,} parameters, {types}{averaged}"))
    lines.append(("conditioner", report.conditioner))
    if schedule:
        betas = f"{schedule['beta_start']:g} to {schedule['beta_end']:g}"
        kind = f"{schedule['timesteps']} steps, betas {betas} ({schedule['beta_schedule']})"
        lines.append(("schedule", f"{kind}, predicts {schedule['prediction']}"))
    lines.append(("latents", f"times {report.scale_factor:g}"))
    lines += [("note", note) for note in report.notes] + [("PROBLEM", fault) for fault in report.problems]
    wide = max(len(label) for label, _ in lines)
    return "\n".join([report.name, *(f"  {label:<{wide}}  {text}" for label, text in lines)])
