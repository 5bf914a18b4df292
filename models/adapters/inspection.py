"""What an adapter is, by the names and shapes of its tensors (`ldm inspect`)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from models.adapters import lora, textual_inversion
from models.adapters.lora_kinds import DORA, MAGNITUDE, kinds_of, trimmed
from models.adapters.network_inspection import network_report
from models.adapters.report import UNKNOWN, AdapterReport, as_json, as_text, dtypes
from models.errors import CheckpointError
from models.formats import few_step
from models.formats.adapter_files import recognise
from models.formats.identify import STABLE_DIFFUSION
from models.formats.lora_keys import BUNDLED_EMBEDDING, split_key, unsupported_kind
from models.formats.safetensors import Header
from models.formats.single_file import read_header
from models.formats.unsupported import is_lora
from models.spec import ModelSpec

__all__ = ["AdapterReport", "as_json", "as_text", "inspect_adapter"]

CONTEXT_ENDS = ("attn2_to_k", "attn2.to_k", "attn2_to_v", "attn2.to_v")  # of layers that read the context
SECOND_ENCODER = ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.")  # SDXL alone has one
BASE_METADATA = ("ss_base_model_version", "modelspec.architecture")  # what trainers say in a header
EMBEDDING_BASES = {
    (768,): "Stable Diffusion 1.x",
    (1024,): "Stable Diffusion 2.x",
    (768, 1280): "Stable Diffusion XL",
}


def inspect_adapter(
    file: Path, allow_pickle: bool = False, model: ModelSpec | None = None
) -> AdapterReport | None:
    """Describe the adapter at a path, and what of it does not fit `model`; None for anything else.

    Raises CheckpointError for a file that cannot be read.
    """
    if (found := recognise(file, allow_pickle)) or file.is_dir():
        return network_report(found, allow_pickle, model) if found else None
    header = read_header(file, allow_pickle)
    if is_lora(header.tensors):
        return lora_report(file, header, allow_pickle, model)
    if is_embedding(header):
        return embedding_report(file, header, allow_pickle, model)
    return None


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
        dtypes=dtypes(header.tensors),
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
        dtypes=dtypes(header.tensors),
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
