"""The relative error between two computations of the same tensor, and its limit."""

from __future__ import annotations

LIMIT = 3e-5  # largest relative error of one network; a whole run may have 1e-4


def relative_error(ours, theirs):
    """|ours - theirs| / |theirs|. Fails if the reference is almost constant."""
    assert theirs.std() > 0.1
    return ((ours - theirs).norm() / theirs.norm()).item()
