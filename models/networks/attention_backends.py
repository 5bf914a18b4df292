"""Scaled dot-product attention: on a GPU by the fastest implementation that gives the right result there.

torch has several implementations, and its own choice is neither always the fastest nor always one that works:
cuDNN's refuses some shapes with an error. So each is tried at the first call with a head width and a number
of tokens, and those that are right are kept, fastest first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

log = logging.getLogger(__name__)

TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4}  # relative to the largest value
CHECKED_TOKENS = 256  # queries of the first row whose results are checked
TIMED_CALLS = 3
MAX_SCORE_BYTES = 2**30  # of the matrix of scores that plain() may hold
# Parts of the messages with which torch and cuDNN refuse a shape; nothing is wrong with the device then.
REFUSALS = ("No available kernel", "cuDNN Frontend error", "No execution plans", "No valid execution plans")

Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
Timer = Callable[[Callable[[], object]], float]  # a call -> its seconds


@dataclass(frozen=True)
class Backend:
    """An implementation: (q, k, v, causal) -> out, all (B, heads, tokens, width)."""

    name: str
    attend: Attend


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Attention of q (B, heads, N, C) to k and v (B, heads, L, C) -> (B, heads, N, C).

    causal: position i attends to positions up to i.
    """
    if not q.is_cuda or torch.is_grad_enabled():
        return scaled_dot_product_attention(q, k, v, is_causal=causal)
    return on_gpu.attend(q, k, v, causal)


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Two matrix products and a softmax. Raises ValueError if the scores take too much memory."""
    if q[..., 0].numel() * k.shape[-2] * q.element_size() > MAX_SCORE_BYTES:
        raise ValueError("the scores do not fit")
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    out: Tensor = scores.softmax(-1) @ v
    return out


def by_torch(backend: SDPBackend) -> Attend:
    """One of torch's implementations."""

    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal)

    return run


def device_seconds(call: Callable[[], object]) -> float:
    """Seconds of a call on the current CUDA device, the least of a few; waits for the device."""
    seconds: list[float] = []
    for _ in range(TIMED_CALLS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return min(seconds)


class BackendTable:
    """The usable backends of each kind of call, best first.

    A kind is a dtype, a head width, whether it is causal, and the numbers of tokens up to the next power of
    two. candidates: in the order in which they are preferred where calls are not timed.
    """

    def __init__(
        self, candidates: Sequence[Backend], seconds: Callable[[Callable[[], object]], float]
    ) -> None:
        self.candidates = tuple(candidates)
        self._seconds = seconds
        self._usable: dict[Hashable, list[Backend]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """Attention by the best backend; one that refuses the call is not used for its kind again."""
        tokens = (q.shape[-2] - 1).bit_length(), (k.shape[-2] - 1).bit_length()
        kind = (q.device, q.dtype, q.shape[-1], causal, *tokens)
        if kind not in self._usable:
            if q.is_cuda and torch.cuda.is_current_stream_capturing():  # nothing can be timed here
                return scaled_dot_product_attention(q, k, v, is_causal=causal)
            self._usable[kind] = self.rank(q, k, v, causal)
        usable = self._usable[kind]
        while usable:
            try:
                return usable[0].attend(q, k, v, causal)
            except (RuntimeError, ValueError) as error:
                if not is_refusal(error):
                    raise
                log.warning("attention by %s refuses %s: %s", usable[0].name, tuple(q.shape), error)
                del usable[0]
        return scaled_dot_product_attention(q, k, v, is_causal=causal)

    def rank(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> list[Backend]:
        """The backends whose result for these inputs is right: the fastest first.

        With torch's deterministic algorithms in the order of the candidates, because a measurement may differ
        in the next process.
        """
        first = slice(0, 1), slice(None), slice(0, CHECKED_TOKENS)
        exact = plain(q[first].float(), k[:1].float(), v[:1].float(), causal)
        right: dict[Backend, float] = {}
        for backend in self.candidates:
            try:
                error = relative_error(backend.attend(q, k, v, causal)[first], exact)
                if not error <= TOLERANCE[q.dtype]:
                    log.warning("attention by %s is off: its relative error is %.1e", backend.name, error)
                elif torch.are_deterministic_algorithms_enabled():
                    right[backend] = len(right)
                else:
                    right[backend] = self._seconds(lambda: backend.attend(q, k, v, causal))  # noqa: B023
            except (RuntimeError, ValueError) as error:
                if not isinstance(error, torch.OutOfMemoryError) and not is_refusal(error):
                    raise
        ranked = sorted(right, key=right.__getitem__)
        if ranked and not torch.are_deterministic_algorithms_enabled():
            times = ", ".join(f"{each.name} {1000 * right[each]:.2f} ms" for each in ranked)
            log.info("attention of %s to %s: %s", tuple(q.shape), tuple(k.shape), times)
        return ranked


def relative_error(out: Tensor, exact: Tensor) -> float:
    error: float = ((out.float() - exact).abs().max() / exact.abs().max()).item()
    return error


def is_refusal(error: Exception) -> bool:
    """Whether an implementation cannot run this shape; any other error is a failure."""
    return isinstance(error, ValueError) or any(part in str(error) for part in REFUSALS)


on_gpu = BackendTable(
    (
        Backend("flash", by_torch(SDPBackend.FLASH_ATTENTION)),
        Backend("cuDNN", by_torch(SDPBackend.CUDNN_ATTENTION)),
        Backend("efficient", by_torch(SDPBackend.EFFICIENT_ATTENTION)),
        Backend("products", plain),
    ),
    device_seconds,
)
