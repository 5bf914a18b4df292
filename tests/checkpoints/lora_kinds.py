"""Files with every kind of change, and each kind's written formula."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, einsum, kron

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"  # 64 x 32
CONVOLUTION = "down_blocks.0.resnets.0.conv1"  # 32 x 32 x 3 x 3
NORM = "mid_block.attentions.0.norm"  # 64
NATIVE = {
    LINEAR: "middle_block.1.transformer_blocks.0.attn2.to_k",
    CONVOLUTION: "input_blocks.1.0.in_layers.2",
    NORM: "middle_block.1.norm",
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) / 2


def kohya(module: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"lora_unet_{module.replace('.', '_')}.{part}": tensor for part, tensor in parts.items()}


def double(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {part: tensor.double() for part, tensor in parts.items()}


LOW_RANK = {"lora_down.weight": draw(4, 32), "lora_up.weight": draw(64, 4), "alpha": torch.tensor(2.0)}
LOHA = {
    "hada_w1_a": draw(64, 4), "hada_w1_b": draw(4, 32), "hada_w2_a": draw(64, 4, seed=1),
    "hada_w2_b": draw(4, 32, seed=1), "alpha": torch.tensor(2.0),
}  # fmt: skip
LOHA_TUCKER = {
    "hada_w1_a": draw(4, 32), "hada_w1_b": draw(4, 32, seed=1), "hada_t1": draw(4, 4, 3, 3),
    "hada_w2_a": draw(4, 32, seed=2), "hada_w2_b": draw(4, 32, seed=3), "hada_t2": draw(4, 4, 3, 3, seed=1),
    "alpha": torch.tensor(2.0),
}  # fmt: skip
HUGE = torch.tensor(1e9)


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(out, in, kh, kw): the core of (r1, r2, kh, kw) between a (r1, out) and b (r2, in)."""
    return einsum("ijkl,ip,jr->prkl", core, a, b)


def blocks(first: Tensor, second: Tensor) -> Tensor:
    """The Kronecker product for a convolution, entry by entry."""
    rows, columns = second.shape[:2]
    out = torch.zeros(first.shape[0] * rows, first.shape[1] * columns, *second.shape[2:], dtype=torch.float64)
    for i in range(first.shape[0]):
        for j in range(first.shape[1]):
            out[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = first[i, j] * second
    return out


W1, W2 = draw(8, 4), draw(8, 8)
W1_FACTORS = {"lokr_w1_a": draw(8, 3), "lokr_w1_b": draw(3, 4)}
W2_FACTORS = {"lokr_w2_a": draw(8, 2), "lokr_w2_b": draw(2, 8)}
GLORA = {
    "a1.weight": draw(32, 4),
    "a2.weight": draw(4, 32),
    "b1.weight": draw(64, 4),
    "b2.weight": draw(4, 32),
}
OLD_GLORA = {
    "a2.weight": draw(32, 4),
    "a1.weight": draw(4, 32),
    "b2.weight": draw(64, 4),
    "b1.weight": draw(4, 32),
}

Formula = Callable[[dict[str, Tensor], Tensor], Tensor]
# module, parts, and what is added to the module's weight w, with the parts p in float64.
CASES: dict[str, tuple[str, dict[str, Tensor], Formula]] = {
    "LoHa": (
        LINEAR,
        LOHA,
        lambda p, w: 0.5 * (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]),
    ),
    "LoHa, no alpha": (
        LINEAR,
        {part: tensor for part, tensor in LOHA.items() if part != "alpha"},
        lambda p, w: (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]),
    ),
    "LoHa of a convolution": (
        CONVOLUTION,
        {
            "hada_w1_a": draw(32, 4),
            "hada_w1_b": draw(4, 288),
            "hada_w2_a": draw(32, 4, seed=1),
            "hada_w2_b": draw(4, 288, seed=1),
        },
        lambda p, w: ((p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])).reshape(w.shape),
    ),
    "LoHa, Tucker": (
        CONVOLUTION,
        LOHA_TUCKER,
        lambda p, w: (
            0.5
            * tucker(p["hada_t1"], p["hada_w1_a"], p["hada_w1_b"])
            * tucker(p["hada_t2"], p["hada_w2_a"], p["hada_w2_b"])
        ),
    ),
    "LoKr, both whole": (
        LINEAR,
        {"lokr_w1": W1, "lokr_w2": W2, "alpha": HUGE},
        lambda p, w: kron(p["lokr_w1"], p["lokr_w2"]),
    ),
    "LoKr, second factored": (
        LINEAR,
        {"lokr_w1": W1, **W2_FACTORS, "alpha": torch.tensor(6.0)},
        lambda p, w: 3 * kron(p["lokr_w1"], p["lokr_w2_a"] @ p["lokr_w2_b"]),
    ),
    "LoKr, first factored": (
        LINEAR,
        {**W1_FACTORS, "lokr_w2": W2, "alpha": torch.tensor(6.0)},
        lambda p, w: 2 * kron(p["lokr_w1_a"] @ p["lokr_w1_b"], p["lokr_w2"]),
    ),
    "LoKr, both factored": (
        LINEAR,
        {**W1_FACTORS, **W2_FACTORS, "alpha": torch.tensor(6.0)},
        lambda p, w: 3 * kron(p["lokr_w1_a"] @ p["lokr_w1_b"], p["lokr_w2_a"] @ p["lokr_w2_b"]),
    ),
    "LoKr of a convolution": (
        CONVOLUTION,
        {"lokr_w1": draw(4, 4), "lokr_w2": draw(8, 8, 3, 3)},
        lambda p, w: blocks(p["lokr_w1"], p["lokr_w2"]),
    ),
    "LoKr of a convolution, second factored": (
        CONVOLUTION,
        {
            "lokr_w1": draw(4, 8),
            "lokr_w2_a": draw(8, 2),
            "lokr_w2_b": draw(2, 36),
            "alpha": torch.tensor(2.0),
        },
        lambda p, w: blocks(p["lokr_w1"], (p["lokr_w2_a"] @ p["lokr_w2_b"]).reshape(8, 4, 3, 3)),
    ),
    "LoKr, Tucker": (
        CONVOLUTION,
        {
            "lokr_w1": draw(4, 8),
            "lokr_t2": draw(2, 2, 3, 3),
            "lokr_w2_a": draw(2, 8),
            "lokr_w2_b": draw(2, 4),
            "alpha": torch.tensor(1.0),
        },
        lambda p, w: 0.5 * blocks(p["lokr_w1"], tucker(p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])),
    ),
    "full differences": (CONVOLUTION, {"diff": draw(32, 32, 3, 3), "alpha": HUGE}, lambda p, w: p["diff"]),
    "differences of a norm": (NORM, {"w_norm": draw(64)}, lambda p, w: p["w_norm"]),
    "GLoRA": (
        LINEAR,
        GLORA | {"alpha": torch.tensor(2.0)},
        lambda p, w: 0.5 * (p["b1.weight"] @ p["b2.weight"] + w @ p["a1.weight"] @ p["a2.weight"]),
    ),
    "GLoRA of older files": (
        LINEAR,
        OLD_GLORA | {"alpha": torch.tensor(2.0)},
        lambda p, w: 0.5 * (p["b2.weight"] @ p["b1.weight"] + w @ p["a2.weight"] @ p["a1.weight"]),
    ),
    "LoRA with a stored scalar": (
        LINEAR,
        LOW_RANK | {"scalar": torch.tensor(3.0)},
        lambda p, w: 1.5 * p["lora_up.weight"] @ p["lora_down.weight"],
    ),
}
