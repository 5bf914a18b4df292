"""Images beside the prompt in the context of a retrieval-augmented model (Blattmann et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from models.conditioning.text_encoder import Context

MAX_NEIGHBOURS = 20  # that the published model was trained with


def with_neighbours(pair: Context, vectors: Tensor) -> Context:
    """The contexts (2, L, C) of a prompt with k image vectors (k, C) after its own: (2, L + k, C).

    As in the published script, each vector has length 1, and an unconditional row has zeros in their place.
    """
    own = normalize(vectors.to(pair.tokens), dim=-1)
    both = torch.stack([torch.zeros_like(own), own])
    return pair._replace(tokens=torch.cat([pair.tokens, both], dim=1))
