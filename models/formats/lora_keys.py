"""Names of tensors in LoRA files: the module that a tensor changes, and its part in the change. No torch."""

from __future__ import annotations

import re

SUFFIXES = {  # end of a key -> part
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".dora_scale": "dora_scale",
    ".alpha": "alpha",
    ".scalar": "scalar",
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{
        f".lokr_{name}": f"lokr_{name}"
        for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    },
    **{f".{name}.weight": name for name in ("a1", "a2", "b1", "b2")},
    ".diff": "diff",
    ".w_norm": "diff",
    ".diff_b": "diff_b",
    ".b_norm": "diff_b",
}  # fmt: skip
UNSUPPORTED = {  # part of a key -> the kind of change
    ".oft_": "OFT or BOFT",
    ".on_input": "IA3",
    ".vera_lambda": "VeRA",
    ".lora_embedding_": "LoRA of embeddings",
    ".lora_B.bias": "LoRA with biases",
    ".set_weight": "replaced weights",
    ".reshape_weight": "reshaped weights",
}
BUNDLED_EMBEDDING = "bundle_emb."  # before the tensors of a textual inversion in a LoRA file
PEFT_PREFIX = "base_model.model."  # before PEFT's names of modules
# diffusers of early 2023: attention processors with layers of their own.
PROCESSOR = re.compile(r"(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight$")


def split_key(key: str) -> tuple[str, str]:
    """The module of a tensor, without PEFT's prefix, and which part of the change it is; "" if unknown."""
    if found := PROCESSOR.search(key):
        module, (leaf, part) = key[: found.start()].replace(PEFT_PREFIX, ""), found.groups()
        if module.endswith("self_attn"):  # a text encoder
            return f"{module}.{leaf}_proj", part
        return f"{module}.to_{leaf}" + (".0" if leaf == "out" else ""), part
    for suffix, part in SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix).replace(PEFT_PREFIX, ""), part
    return "", ""


def unsupported_kind(keys: list[str]) -> tuple[str, str] | None:
    """(kind, first key of it) of changes that cannot be merged; None if there are none."""
    for part, kind in UNSUPPORTED.items():
        if found := [key for key in keys if part in key]:
            return kind, found[0]
    return None
