"""The results of a run, as numbers and as a table."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from service.bench.load import Answer, Run, intervals

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
UNET, DECODE = "ldm_step_seconds_sum", "ldm_decode_seconds_sum"


def latency(answers: Sequence[Answer]) -> dict[str, float]:
    """Statistics of the latencies (seconds from sending to the last byte) of successful requests."""
    ordered = sorted(answer.latency for answer in answers)
    last = len(ordered) - 1
    parts = {name: ordered[min(int(q * len(ordered)), last)] for name, q in QUANTILES.items()}
    return {"requests": len(ordered), "mean": statistics.fmean(ordered)} | parts


def by_task(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """The successful answers, by task."""
    good = [answer for answer in answers if answer.images]
    tasks = sorted({answer.request.task for answer in good})
    return {task: [answer for answer in good if answer.request.task == task] for task in tasks}


def report(run: Run) -> dict[str, Any]:
    """The results, as --json writes them; decode_share is None if the server does not measure decoding."""
    good = [answer for answer in run.answers if answer.images]
    images = sum(answer.images for answer in good)
    tasks = by_task(good) | ({"all": good} if good else {})
    return {
        "seconds": run.seconds,
        "requests": len(run.answers),
        "images": images,
        "errors": dict(Counter(answer.status for answer in run.answers if not answer.images)),
        "images_per_second": images / run.seconds,
        "requests_per_second": len(good) / run.seconds,
        "latency": {task: latency(answers) for task, answers in tasks.items()},
    } | device(run)


def device(run: Run) -> dict[str, Any]:
    """The device's metrics between the first sample and the last."""
    first, last = run.samples[0], run.samples[-1]
    calls = last.since(first, "ldm_unet_rows_count")
    unet = last.since(first, UNET) / run.seconds
    decode = last.since(first, DECODE) / run.seconds if DECODE in last.values else None
    return {
        "rows_per_call": last.rows_per_call(first),
        "padding_per_call": last.since(first, "ldm_unet_padded_rows_total") / max(calls, 1),
        "unet_share": unet,
        "decode_share": decode,
        "other_share": 1 - unet - (decode or 0.0),
        "rows_over_time": [interval._asdict() for interval in intervals(run.samples)],
    }


def table(name: str, r: dict[str, Any]) -> Iterator[str]:
    """The lines of the printed table."""
    yield f"{name}: {r['requests']} requests, {r['images']} images, {r['seconds']:.1f} s"
    yield f"  {'latency, s':16}{'requests':>9}" + "".join(f"{column:>9}" for column in ("mean", *QUANTILES))
    for task, row in r["latency"].items():
        parts = "".join(f"{row[column]:9.3f}" for column in ("mean", *QUANTILES))
        yield f"  {task:16}{row['requests']:9}{parts}"
    errors = ", ".join(f"{count} x {status}" for status, count in sorted(r["errors"].items()))
    yield f"  {r['images_per_second']:.3f} images/s, {r['requests_per_second']:.3f} requests/s"
    yield f"  errors: {errors or 'none'}"
    yield f"  {r['rows_per_call']:.2f} rows per UNet call, and {r['padding_per_call']:.2f} padding rows"
    decode = "VAE decoding not measured by this server"
    if r["decode_share"] is not None:
        decode = f"VAE decoding {r['decode_share']:.0%}"
    yield f"  time: UNet {r['unet_share']:.0%}, {decode}, idle and other {r['other_share']:.0%}"
