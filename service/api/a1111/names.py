"""Names of files as A1111 and its clients write them."""

from __future__ import annotations

import re

HASH = re.compile(r"\s*\[[0-9A-Za-z]*\]$")  # at the end of a model's title
SUFFIX = re.compile(r"\.(safetensors|ckpt|pth?|bin)$", re.IGNORECASE)


def plain_names(name: str) -> tuple[str, ...]:
    """What a title may mean: NAME, NAME [hash], NAME.safetensors, or a path that ends so."""
    plain = HASH.sub("", name.strip())
    return name, plain, SUFFIX.sub("", plain), SUFFIX.sub("", re.split(r"[/\\]", plain)[-1])
