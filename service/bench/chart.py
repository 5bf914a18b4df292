"""A chart of a run, drawn with Pillow: rows of UNet calls over time, and latencies by task.

Bands: each request while it was denoised; the height is the number of its rows in a call with all its images.
Start and end come from the timings in the response, precise to about one step. Line: rows per UNet call, the
mean of the calls that ended between two samples of /metrics. Where the bands together are higher than the
line, requests took turns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from service.bench.load import Answer, Run, intervals
from service.bench.report import by_task

SCALE = 2  # the chart is drawn this many times larger and then reduced, for smooth edges
SIZE = (1280, 880)
INK, GRAY, GRID, PAPER = "#222222", "#666666", "#e4e4e4", "#ffffff"
COLOURS = {"text-to-image": "#2a78d6", "image-to-image": "#eb6834", "inpainting": "#1baf7a"}
TINTS = {"text-to-image": "#a9c9ef", "image-to-image": "#f7c2ae", "inpainting": "#a4dfca"}
MAX_BANDS = 80  # more would be too thin to see, so only the beginning of a longer run is drawn


@dataclass(frozen=True)
class Panel:
    """A diagram with axes from 0 to x_max and y_max, at `box` (left, top, right, bottom; before scaling)."""

    draw: ImageDraw.ImageDraw
    box: tuple[int, int, int, int]
    x_max: float
    y_max: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return left + min(x / self.x_max, 1) * (right - left), bottom - min(y / self.y_max, 1) * (
            bottom - top
        )

    def text(self, x: float, y: float, text: str, anchor: str, size: int = 13, fill: str = GRAY) -> None:
        font = ImageFont.load_default(size * SCALE)
        self.draw.text((x * SCALE, y * SCALE), text, fill, font, anchor)

    def axes(self, title: str, x_label: str, y_label: str) -> None:
        left, top, right, bottom = self.box
        for y in ticks(self.y_max):
            self.line([(0, y), (self.x_max, y)], GRID, 1)
            self.text(left - 8, self.at(0, y)[1], f"{y:g}", "rm")
        for x in ticks(self.x_max):
            self.text(self.at(x, 0)[0], bottom + 8, f"{x:g}", "mt")
        self.text(left, top - 34, title, "ls", 17, INK)
        self.text(left, top - 14, y_label, "ls")
        self.text(right, bottom + 26, x_label, "rt")

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: int) -> None:
        places = [(SCALE * x, SCALE * y) for x, y in (self.at(*point) for point in points)]
        self.draw.line(places, colour, width * SCALE)

    def band(self, left: float, right: float, low: float, high: float, colour: str) -> None:
        (x0, y1), (x1, y0) = self.at(left, low), self.at(right, high)
        box = [SCALE * value for value in (x0, y0, max(x1, x0 + 1), y1)]
        self.draw.rectangle(box, colour, PAPER)


def ticks(maximum: float) -> list[float]:
    """At most seven round numbers from 0 to `maximum`."""
    power = 10.0 ** math.floor(math.log10(maximum / 6))
    step = next(factor * power for factor in (1, 2, 5, 10) if 6 * factor * power >= maximum)
    return [round(index * step, 9) for index in range(int(maximum / step) + 1)]


def chart(run: Run) -> Image.Image:
    """The chart of a run."""
    image = Image.new("RGB", (SIZE[0] * SCALE, SIZE[1] * SCALE), PAPER)
    draw = ImageDraw.Draw(image)
    draw_rows(draw, run)
    draw_latency(draw, run)
    return image.resize(SIZE, Image.Resampling.LANCZOS)


def stacked(answers: Sequence[Answer]) -> Iterator[tuple[Answer, float, int]]:
    """(answer, start in seconds, lowest row) of each band, placed in the lowest rows free at its start."""
    active: list[tuple[int, int, float]] = []  # from row, to row, until
    for joined, answer in sorted(((a.sent + a.queue, a) for a in answers), key=lambda pair: pair[0]):
        low, rows = 0, answer.request.rows
        active = sorted(band for band in active if band[2] > joined)
        for start, end, _ in active:
            if low + rows <= start:
                break
            low = max(low, end)
        active.append((low, low + rows, joined + answer.denoise))
        yield answer, joined, low


def draw_rows(draw: ImageDraw.ImageDraw, run: Run) -> None:
    tasks = by_task(run.answers)
    bands = list(stacked([answer for answers in tasks.values() for answer in answers]))
    until = bands[MAX_BANDS][1] if len(bands) > MAX_BANDS else run.seconds
    shown = [part for part in intervals(run.samples) if part.begin < until]
    line = [(at, part.rows) for part in shown for at in (max(part.begin, 0.0), part.end)]
    top = max([low + answer.request.rows for answer, _, low in bands] + [rows for _, rows in line] + [1])
    panel = Panel(draw, (70, 80, 1240, 480), until, top * 1.05)
    part = "" if until == run.seconds else f", the first {until:.0f} of {run.seconds:.0f} s"
    panel.axes(f"Requests joining and leaving the UNet{part}", "seconds", "rows")
    for answer, joined, low in bands[:MAX_BANDS]:
        panel.band(
            joined, joined + answer.denoise, low, low + answer.request.rows, TINTS[answer.request.task]
        )
    panel.line(line, INK, 2)
    legend(panel, {"rows per UNet call": INK} | {task: COLOURS[task] for task in tasks})


def legend(panel: Panel, entries: dict[str, str]) -> None:
    """Names and colours, above the panel at the right."""
    x: float = panel.box[2]
    y = panel.box[1] - 18
    for name, colour in entries.items():
        panel.text(x, y, name, "rm", fill=INK)
        x -= 10 + ImageFont.load_default(13).getlength(name)
        panel.draw.rectangle([SCALE * value for value in (x - 14, y - 4, x, y + 4)], colour)
        x -= 36


def draw_latency(draw: ImageDraw.ImageDraw, run: Run) -> None:
    tasks = by_task(run.answers)
    slowest = max([answer.latency for answer in run.answers if answer.images], default=1.0)
    panel = Panel(draw, (70, 600, 1240, 820), slowest * 1.02, 102)
    panel.axes("Latency by task", "seconds from request to last byte", "% of requests answered within")
    for task, answers in tasks.items():
        steps = [(0.0, 0.0)]
        for index, seconds in enumerate(sorted(answer.latency for answer in answers), 1):
            steps += [(seconds, steps[-1][1]), (seconds, 100 * index / len(answers))]
        panel.line(steps, COLOURS[task], 2)
