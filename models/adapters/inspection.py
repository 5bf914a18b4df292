"""What a LoRA or an embedding is, by the names and shapes of its tensors (`ldm inspect`)."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from models.adapters import lora, textual_inversion
from models.adapters.lora_kinds import DORA, MAGNITUDE, kinds_of, trimmed
from models.errors import CheckpointError
from models.formats import few_step
from models.formats.identify import STABLE_DIFFUSION
from models.formats.lora_keys import BUNDLED_EMBEDDING, split_key, unsupported_kind
from models.formats.safetensors import Header
from models.formats.single_file import read_header
from models.spec import ModelSpec

CONTEXT_ENDS = ("attn2_to_k", "attn2.to_k", "attn2_to_v", "attn2.to_v")  # of layers that read the context
SECOND_ENCODER = ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.")  # SDXL alone has one
BASE_METADATA = ("ss_base_model_version", "modelspec.architecture")  # what trainers say in a header
EMBEDDING_BASES = {
    (768,): "Stable Diffusion 1.x",
    (1024,): "Stable Diffusion 2.x",
    (768, 1280): "Stable Diffusion XL",
}
UNKNOWN = "unknown"


@dataclass(frozen=True)
class AdapterReport:
    """The output of `ldm inspect` for a LoRA or an embedding.

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
    embeddings: tuple[str, ...] = ()  # in a LoRA file
    few_step: str = ""  # usual settings of a LoRA for few steps, and what says so
    ignored: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def inspect_adapter(
    file: Path, allow_pickle: bool = False, model: ModelSpec | None = None
) -> AdapterReport | None:
    """Describe a LoRA or an embedding, and what of it does not fit `model`; None for other files.

    Raises CheckpointError for a file that cannot be read.
    """
    header = read_header(file, allow_pickle)
    if is_lora(header):
        return lora_report(file, header, allow_pickle, model)
    if is_embedding(header):
        return embedding_report(file, header, allow_pickle, model)
    return None


def is_lora(header: Header) -> bool:
    """Whether most tensors have names that LoRA files have."""
    known = [key for key in header.tensors if split_key(key)[1] or unsupported_kind([key])]
    return 2 * len(known) > len(header.tensors)


def is_embedding(header: Header) -> bool:
    """Whether the tensors are vectors for one text encoder, or for two."""
    names = set(header.tensors)
    two = any(names == set(pair) for pair in textual_inversion.ENCODER_KEYS)
    return (two or len(names) == 1) and all(len(shape) in (1, 2) for shape in header.shapes.values())


def lora_report(file: Path, header: Header, allow_pickle: bool, model: ModelSpec | None) -> AdapterReport:
    modules: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)  # module -> part -> shape
    unread: list[str] = []
    words: set[str] = set()
    for key, stored in header.tensors.items():
        module, part = split_key(key)
        if key.startswith(BUNDLED_EMBEDDING):
            words.add(key.removeprefix(BUNDLED_EMBEDDING).partition(".")[0])
        elif part:
            modules[module][part] = trimmed(stored.shape)
        elif not unsupported_kind([key]):
            unread.append(key)
    kinds, ranks = Counter[str](), Counter[int]()
    for parts in modules.values():
        for kind in kinds_of(set(parts)):
            kinds[f"{kind.name} (DoRA)" if {DORA, MAGNITUDE} & parts.keys() else kind.name] += 1
            if rank := rank_of(parts):
                ranks[rank] += 1
    problems, ignored, usual = [], tuple(unread), lora.few_step_of(file, header)
    if found := unsupported_kind(list(header.tensors)):
        problems.append(f"{found[0]} is not supported: {found[1]}")
    elif model:
        try:
            ignored = lora.open_loras({file.stem: file}, {model.name: model}, "cpu", allow_pickle)[
                model.name
            ][file.stem].ignored
        except CheckpointError as error:
            problems.append(str(error))
    return AdapterReport(
        name=file.stem,
        adapter="LoRA",
        base_model=base_of_lora(modules, header),
        dtypes=dtypes(header),
        kinds=dict(kinds),
        ranks=dict(sorted(ranks.items())),
        embeddings=tuple(sorted(words)),
        few_step=few_step.note(*usual) if usual else "",
        ignored=ignored,
        problems=tuple(problems),
    )


def embedding_report(
    file: Path, header: Header, allow_pickle: bool, model: ModelSpec | None
) -> AdapterReport:
    problems: list[str] = []
    widths: tuple[int, ...] = ()
    vectors = 0
    try:
        embedding = textual_inversion.read_embedding(file.stem, file, allow_pickle)
        widths, vectors = embedding.widths, len(embedding.vectors[0])
        if model:
            textual_inversion.check_fits(embedding, file, [model])
    except CheckpointError as error:
        problems.append(str(error))
    return AdapterReport(
        name=file.stem,
        adapter="textual inversion embedding",
        base_model=EMBEDDING_BASES.get(
            widths, f"{UNKNOWN} (vectors {textual_inversion.joined(widths)} wide)"
        ),
        dtypes=dtypes(header),
        vectors=vectors,
        problems=tuple(problems),
    )


def rank_of(parts: Mapping[str, tuple[int, ...]]) -> int | None:
    """The rank of a module's change; None if it has none, or lacks the tensor that shows it."""
    (kind, *_) = kinds_of(set(parts))
    try:
        return kind.rank(parts)
    except LookupError:
        return None


def base_of_lora(modules: Mapping[str, Mapping[str, tuple[int, ...]]], header: Header) -> str:
    """The base model: by the width of its context, by a second text encoder, or by what the header says."""
    for module, parts in modules.items():
        if module.endswith(CONTEXT_ENDS) and (family := STABLE_DIFFUSION.get(inputs(parts))):
            return family
    if any(module.startswith(SECOND_ENCODER) for module in modules):
        return STABLE_DIFFUSION[2048]
    claims = (header.metadata.get(key) for key in BASE_METADATA)
    return next((f"{claim} (according to its header)" for claim in claims if claim), UNKNOWN)


def inputs(parts: Mapping[str, tuple[int, ...]]) -> int:
    """Inputs of the layer that is changed; 0 if the parts do not show it."""
    for part in ("down", "hada_w1_b", "diff", "b2"):
        if len(shape := parts.get(part, ())) > 1:
            return shape[1]
    first, second = ((parts.get(f"lokr_w{n}") or parts.get(f"lokr_w{n}_b") or (0, 0))[-1:] for n in (1, 2))
    return first[0] * second[0]


def dtypes(header: Header) -> dict[str, int]:
    """Numbers of each type."""
    types = Counter[str]()
    for stored in header.tensors.values():
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
    yield "types", ", ".join(report.dtypes)
    if report.embeddings:
        yield "embeddings", ", ".join(report.embeddings)
    if report.few_step:
        yield "few steps", report.few_step
    for key in report.ignored:
        yield "ignored", key
    for problem in report.problems:
        yield "PROBLEM", problem
