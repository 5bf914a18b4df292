"""The kinds of changes in LoRA files, as formulas: LoRA, LoHa, LoKr, GLoRA, full differences, DoRA.

The names of parts are those of LyCORIS. W is the weight that is changed, D what is added to it. Every formula
is computed in the type of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]
Parts = Mapping[str, Tensor]
Shapes = Mapping[str, Shape]  # of parts, as trimmed() returns them

DORA, MAGNITUDE = "dora_scale", "magnitude"  # LyCORIS's and PEFT's names
NUMBERS = ("alpha", "scalar")  # parts that are one number


class Kind(NamedTuple):
    """A kind of change.

    parts: a module with any of these parts is of this kind. expected: (shapes of a module's parts, trimmed
    shape of the weight) -> the shapes that the parts must have; raises KeyError for a missing part. rank:
    shapes of the parts -> the divisor of alpha; None: alpha is not used. delta: (parts, weight) -> D before
    it is scaled.
    """

    name: str
    parts: frozenset[str]
    expected: Callable[[Shapes, Shape], dict[str, Shape]]
    rank: Callable[[Shapes], int | None]
    delta: Callable[[Parts, Tensor], Tensor]


def trimmed(shape: Sequence[int]) -> Shape:
    """A shape without trailing axes of 1 after the second axis, so that a 1x1 convolution is a matrix."""
    sides = list(shape)
    while len(sides) > 2 and sides[-1] == 1:
        sides.pop()
    return tuple(sides)


def side(shape: Shape, axis: int) -> int:
    """The size of an axis; 0 if the shape has fewer axes."""
    return shape[axis] if len(shape) > axis else 0


def ratio(whole: int, part: int) -> int:
    """whole / part; 0 if that is not a whole number."""
    return whole // part if part and whole % part == 0 else 0


def product(a: Tensor, b: Tensor, core: Tensor | None = None) -> Tensor:
    """a @ b, or Tucker's form with a core (r1, r2, kh, kw), a (r1, out) and b (r2, in); a matrix."""
    if core is None:
        return a.flatten(1) @ b.flatten(1)
    core = core.reshape(*core.shape[:2], *(core.shape[2:] or (1, 1)))
    return torch.einsum("ijkl,jr,ip->prkl", core, b.flatten(1), a.flatten(1)).flatten(1)


def factors(a: str, b: str, core: str, shapes: Shapes, out: int, kernel: Shape) -> dict[str, Shape]:
    """Shapes of a product() of `out` rows; kernel: input channels and sides of the convolution's kernel."""
    if core in shapes:
        first, second = side(shapes[core], 0), side(shapes[core], 1)
        return {
            a: (first, out),
            b: (second, kernel[0]),
            core: trimmed((first, second, *kernel[1:])),
        }
    rank = side(shapes[b], 0)
    return {a: (out, rank), b: (rank, torch.Size(kernel).numel())}


# LoRA (Hu et al. 2021), with a convolution in the middle: LoCon's Tucker form


def lora_shapes(shapes: Shapes, target: Shape) -> dict[str, Shape]:
    out, into, *kernel = target
    rank, outer = side(shapes["down"], 0), side(shapes["up"], 1)
    if "mid" in shapes:
        middle = trimmed((outer, rank, *kernel))
        return {"down": (rank, into), "up": (out, outer), "mid": middle}
    return {"down": (rank, into, *kernel), "up": (out, rank)}


def lora_delta(parts: Parts, weight: Tensor) -> Tensor:
    up, down = parts["up"].flatten(1), parts["down"].flatten(1)  # (out, r), (r, in..)
    if "mid" not in parts:
        return (up @ down).reshape(weight.shape)
    middle = parts["mid"].reshape(*parts["mid"].shape[:2], *(weight.shape[2:] or (1, 1)))
    return torch.einsum("oa,abhw,bi->oihw", up, middle, down).reshape(weight.shape)


# LoHa (Hyeon-Woo et al. 2021): the elementwise product of two low-rank matrices


def loha_shapes(shapes: Shapes, target: Shape) -> dict[str, Shape]:
    out, *kernel = target
    found: dict[str, Shape] = {}
    for number in (1, 2):
        a, b, core = f"hada_w{number}_a", f"hada_w{number}_b", f"hada_t{number}"
        found |= factors(a, b, core, shapes, out, tuple(kernel))
    return found


def loha_delta(parts: Parts, weight: Tensor) -> Tensor:
    first, second = (
        product(parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"], parts.get(f"hada_t{n}")) for n in (1, 2)
    )
    return (first * second).reshape(weight.shape)


# LoKr (Yeh et al. 2023): the Kronecker product of two matrices, each whole or a low-rank product


def lokr_shapes(shapes: Shapes, target: Shape) -> dict[str, Shape]:
    out, into, *kernel = target
    if "lokr_w1" in shapes:
        rows, columns = side(shapes["lokr_w1"], 0), side(shapes["lokr_w1"], 1)
        found = {"lokr_w1": (rows, columns)}
    else:
        rows, columns = side(shapes["lokr_w1_a"], 0), side(shapes["lokr_w1_b"], 1)
        rank = side(shapes["lokr_w1_b"], 0)
        found = {"lokr_w1_a": (rows, rank), "lokr_w1_b": (rank, columns)}
    inner = (ratio(into, columns), *kernel)
    if "lokr_w2" in shapes:
        return found | {"lokr_w2": trimmed((ratio(out, rows), *inner))}
    return found | factors("lokr_w2_a", "lokr_w2_b", "lokr_t2", shapes, ratio(out, rows), inner)


def lokr_rank(shapes: Shapes) -> int | None:
    """None, for a scale of 1, if both matrices are whole."""
    factor = shapes.get("lokr_w2_b") or shapes.get("lokr_w1_b")
    return factor[0] if factor else None


def lokr_delta(parts: Parts, weight: Tensor) -> Tensor:
    first, second = (
        parts[f"lokr_w{n}"].flatten(1)
        if f"lokr_w{n}" in parts
        else product(parts[f"lokr_w{n}_a"], parts[f"lokr_w{n}_b"], parts.get(f"lokr_t{n}"))
        for n in (1, 2)
    )
    return torch.kron(first.contiguous(), second.contiguous()).reshape(weight.shape)


# GLoRA (Chavan et al. 2023): b1 @ b2 + W @ a1 @ a2; in older files b2 @ b1 + W @ a2 @ a1


def glora_shapes(shapes: Shapes, target: Shape) -> dict[str, Shape]:
    out, into, *kernel = target
    a1, b1 = shapes["a1"], shapes["b1"]
    if glora_is_older(a1, b1, out, into):
        rank = a1[0]
        return {"a1": (rank, into), "a2": (into, rank), "b1": (rank, into, *kernel), "b2": (out, rank)}
    rank = side(a1, 1)
    return {"a1": (into, rank), "a2": (rank, into), "b1": (out, rank), "b2": (rank, into, *kernel)}


def glora_is_older(a1: Shape, b1: Shape, out: int, into: int) -> bool:
    """Whether a file is older: then a1 and b1 are (r, in) instead of (in, r) and (out, r)."""
    return side(a1, 1) == side(b1, 1) == into and (side(a1, 0), side(b1, 0)) != (into, out)


def glora_rank(shapes: Shapes) -> int:
    return min(shapes["a1"])


def glora_delta(parts: Parts, weight: Tensor) -> Tensor:
    a1, a2, b1, b2 = (parts[name].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    if glora_is_older(tuple(a1.shape), tuple(parts["b1"].shape), *weight.shape[:2]):
        a1, a2, b1, b2 = a2, a1, b2, b1
    through = torch.einsum("oi...,ij,jk->ok...", weight, a1, a2)
    return (b1 @ b2).reshape(weight.shape) + through


# Full differences: D itself


def full_shapes(shapes: Shapes, target: Shape) -> dict[str, Shape]:
    return {"diff": target}


def full_delta(parts: Parts, weight: Tensor) -> Tensor:
    return parts["diff"].reshape(weight.shape)


def no_rank(_: Shapes) -> None:
    return None


LORA = Kind("LoRA", frozenset({"down", "up", "mid"}), lora_shapes, lambda s: s["down"][0], lora_delta)
LOHA = Kind(
    "LoHa",
    frozenset({f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}),
    loha_shapes,
    lambda shapes: shapes["hada_w1_b"][0],
    loha_delta,
)
LOKR = Kind(
    "LoKr",
    frozenset({f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}),
    lokr_shapes,
    lokr_rank,
    lokr_delta,
)
GLORA = Kind("GLoRA", frozenset({"a1", "a2", "b1", "b2"}), glora_shapes, glora_rank, glora_delta)
FULL = Kind("full differences", frozenset({"diff"}), full_shapes, no_rank, full_delta)
KINDS = (LORA, LOHA, LOKR, GLORA, FULL)


def kinds_of(parts: set[str]) -> list[Kind]:
    """The kinds that a module's parts belong to: one, unless the file is damaged."""
    return [kind for kind in KINDS if kind.parts & parts]


# DoRA (Liu et al. 2024)


def magnitude_shape(part: str, shape: Shape, target: Shape) -> Shape:
    """`shape` if magnitudes of this weight can have it, else a shape that they can have."""
    out, into = target[:2]
    if part == MAGNITUDE:
        return shape if torch.Size(shape).numel() == out else (out,)
    return shape if shape in ((out,), (out, 1), (1, into)) else (out, 1)


def magnitude_of(parts: Parts, weight: Tensor) -> Tensor | None:
    """DoRA's magnitudes, if any: PEFT's, one per output, as (out, 1, ...); LyCORIS's unchanged."""
    if MAGNITUDE in parts:
        return parts[MAGNITUDE].reshape(-1, *(1 for _ in weight.shape[1:]))
    return parts.get(DORA)


def dora_delta(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """W' - W for W' = magnitude * (W + D) / |W + D| (Liu et al. 2024, equation 5).

    The norm is taken per output or per input, as the magnitude's shape is (out, 1, ...) or (1, in, 1, ...).
    """
    changed = weight + delta
    kept = 0 if magnitude.shape[0] == magnitude.numel() == weight.shape[0] else 1
    others = [axis for axis in range(weight.ndim) if axis != kept]
    norm: Tensor = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
    norm = norm + torch.finfo(changed.dtype).eps
    return magnitude.reshape(norm.shape) * changed / norm - weight
