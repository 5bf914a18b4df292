"""What requests can ask for. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from models.formats.identify import Source
from models.spec import ModelSpec
from service.catalogue import Entry, Ignored
from service.device.adapter_store import AdapterFile

if TYPE_CHECKING:
    from models.adapters.textual_inversion import Embedding


@dataclass(frozen=True)
class Contents:
    """The models that are served, and what fits them.

    number: of the catalogue that was read. loras: by name. vaes: model -> VAE that replaces its own. ignored:
    the files that cannot be used. An unchanged file keeps its Source, Entry or Embedding object. adapters: by
    kind and name, controls and reference adapters.
    """

    number: int = 0
    sources: Mapping[str, Source] = field(default_factory=dict)
    specs: Mapping[str, ModelSpec] = field(default_factory=dict)
    loras: Mapping[str, Entry] = field(default_factory=dict)
    vaes: Mapping[str, Path] = field(default_factory=dict)
    embeddings: tuple[Embedding, ...] = ()
    adapters: Mapping[tuple[str, str], AdapterFile] = field(default_factory=dict)
    ignored: tuple[Ignored, ...] = ()
