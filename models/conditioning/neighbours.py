"""Images beside the prompt in the context of a retrieval-augmented model (Blattmann et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from models.conditioning.text_encoder import Context


def with_neighbours(context: Context, vectors: Tensor, is_negative: Sequence[bool]) -> Context:
    """The contexts (N, L, C) of prompts with k image vectors (k, C) after their own: (N, L + k, C).

    As in the published script, each vector has length 1, and negative prompts have zeros in their place.
    """
    own = normalize(vectors.to(context.tokens), dim=-1)
    rows = torch.stack([torch.zeros_like(own) if negative else own for negative in is_negative])
    return context._replace(tokens=torch.cat([context.tokens, rows], dim=1))
