"""The choice among implementations of attention, on a CPU with stand-ins that lie, refuse and fail."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from models.networks.attention_backends import Backend, BackendTable, attend, plain

REFUSAL = "cuDNN Frontend error: No execution plans support the graph."


def inputs(tokens: int = 12, keys: int = 12, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, count, width, generator=draw) for count in (tokens, keys, keys))


def right(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=causal)


def wrong(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return right(q, k, v, causal) * 1.01


def refusing(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    raise RuntimeError(REFUSAL)


def broken(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def table(*seconds: float, **backends) -> BackendTable:
    """A table of these backends; `seconds`: of each that is timed, in turn."""
    times: Iterator[float] = iter(seconds)
    return BackendTable([Backend(name, run) for name, run in backends.items()], lambda call: next(times))


def names(backends) -> list[str]:
    return [backend.name for backend in backends]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "keys"), [(12, 12), (300, 300), (9, 4)])
def test_plain_attention_is_torchs(tokens, keys, causal):
    q, k, v = inputs(tokens, keys)
    torch.testing.assert_close(plain(q, k, v, causal), right(q, k, v, causal))


def test_the_fastest_right_backend_is_first():
    ranked = table(3.0, 1.0, 2.0, a=right, b=right, lies=wrong, c=right).rank(*inputs(), False)
    assert names(ranked) == ["b", "c", "a"]


def test_with_deterministic_algorithms_nothing_is_timed():
    torch.use_deterministic_algorithms(True)
    try:
        ranked = table(a=refusing, b=right, c=right).rank(*inputs(), False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert names(ranked) == ["b", "c"]


def test_a_kind_of_call_is_ranked_once():
    ranks = []

    class Counting(BackendTable):
        def rank(self, q, k, v, causal):
            ranks.append((q.shape[-2], q.shape[-1], causal))
            return super().rank(q, k, v, causal)

    backends = Counting([Backend("a", right)], lambda call: 1.0)
    for tokens, width, causal in [(9, 8, False), (16, 8, False), (17, 8, False), (9, 4, False), (9, 8, True)]:
        q, k, v = inputs(tokens, tokens, width)
        assert torch.equal(backends.attend(q, k, v, causal), right(q, k, v, causal))
    assert ranks == [(9, 8, False), (17, 8, False), (9, 4, False), (9, 8, True)]


def test_a_backend_that_refuses_a_later_shape_is_replaced_by_the_next(caplog):
    def refuses_odd(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return refusing(q, k, v, causal) if q.shape[-2] % 2 else right(q, k, v, causal)

    backends = table(1.0, 2.0, odd=refuses_odd, other=right)
    for tokens in (12, 11, 12):
        q, k, v = inputs(tokens, tokens)
        assert torch.equal(backends.attend(q, k, v, False), right(q, k, v, False))
    assert caplog.text.count("refuses") == 1


def test_without_a_usable_backend_torch_chooses():
    q, k, v = inputs()
    assert torch.equal(table(a=refusing, b=wrong).attend(q, k, v, False), right(q, k, v, False))


def test_a_device_failure_is_not_a_refusal():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        table(a=broken, b=right).attend(*inputs(), False)


def test_on_a_cpu_torch_chooses():
    q, k, v = inputs()
    assert torch.equal(attend(q, k, v, causal=True), right(q, k, v, True))
