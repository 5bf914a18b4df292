"""Files with the names and shapes of weights, and zeros that take no space on most file systems."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_hollow(
    file: Path, shapes: Mapping[str, Sequence[int]], words: Mapping[str, str] | None = None
) -> Path:
    """A safetensors file of float32 zeros, sparse on disk. words: metadata.

    The largest tensors come first, so that all but a few small ones are well aligned.
    """
    header, end = {"__metadata__": dict(words or {})}, 0
    for key, shape in sorted(shapes.items(), key=lambda item: -math.prod(item[1])):
        begin, end = end, end + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return file
