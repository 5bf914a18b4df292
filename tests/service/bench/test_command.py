"""`ldm bench`, on the tiny model."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from service.bench.chart import stacked
from service.bench.command import supported
from service.bench.load import Answer, Sample, intervals
from service.bench.mix import DEFAULT, Entry, Request, draw, to_request
from service.cli.main import main

MODEL = {
    "name": "any",
    "defaults": {"width": 64, "height": 64, "guidance_scale": 3.0},
    "limits": {"size_multiple": 8},
    "tasks": ["text-to-image"],
    "control_details": [
        {"name": "fill", "types": [], "inpainting": True},
        {"name": "edges", "types": [], "inpainting": False},
        {"name": "union", "types": ["pose", "depth"], "inpainting": False},
    ],
    "reference_adapters": ["style"],
}
MIX = """
[[requests]]
steps = 2
n = 2

[[requests]]
task = "image-to-image"
steps = 4
strength = 0.5
guidance_scale = 1
width = 0.6

[[requests]]
task = "inpainting"
steps = 2
"""


@pytest.fixture
def mix(tmp_path: Path) -> str:
    file = tmp_path / "mix.toml"
    file.write_text(MIX)
    return str(file)


def bench(folder: Path, *flags: str) -> dict:
    """The results of a successful run."""
    assert main(["bench", "--json", str(folder / "run.json"), *flags]) == 0
    return json.loads((folder / "run.json").read_text())


def test_the_report_agrees_with_what_the_server_counted(server, mix, tmp_path):
    before, chart = server.metric("ldm_images_total"), tmp_path / "run.png"
    flags = ("--mix", mix, "--requests", "8", "--clients", "4", "--chart", str(chart))
    load = bench(tmp_path, "--url", str(server.client.base_url), *flags)["load"]
    warm_up = 4  # every entry once
    assert server.metric("ldm_images_total") - before == load["images"] + warm_up
    assert load["requests"] == load["latency"]["all"]["requests"] == 8
    assert load["errors"] == {}
    assert 1 <= load["rows_per_call"] <= 16
    assert 0 < load["unet_share"] <= 1
    with Image.open(chart) as image:
        assert image.format == "PNG"


@pytest.mark.slow
def test_bench_starts_a_server_and_compares_with_solo_and_in_process_runs(tiny, mix, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ("--model", str(tiny), "--dtype", "float32", "--mix", mix, "--requests", "4", "--rate", "50")
    numbers = bench(tmp_path, *flags, "--against-solo", "--bare")
    load, solo = numbers["load"], numbers["solo"]
    assert load["requests"] == solo["requests"] == 4
    assert load["images"] == solo["images"]
    assert solo["rows_per_call"] <= 4  # one request of two images
    assert numbers["against_solo"] > 0
    assert numbers["http_to_bare"] > 0


def test_rejected_requests_are_counted_by_status(server, tmp_path):
    mix = tmp_path / "mix.json"
    mix.write_text('{"requests": [{"steps": 1001}]}')
    flags = ("--mix", str(mix), "--requests", "1", "--json", str(tmp_path / "run.json"))
    assert main(["bench", "--url", str(server.client.base_url), *flags]) == 1
    assert json.loads((tmp_path / "run.json").read_text())["load"]["errors"] == {"422": 1}


def test_an_invalid_mix_is_refused_before_anything_runs(tmp_path, capsys):
    mix = tmp_path / "mix.json"
    mix.write_text('{"requests": [{"step": 10}]}')
    assert main(["bench", "--mix", str(mix)]) == 2
    assert "requests.0.step is not a field" in capsys.readouterr().err


def test_the_same_seed_draws_the_same_requests():
    first, again, other = (list(islice(draw(DEFAULT, MODEL, seed), 20)) for seed in (1, 1, 2))
    assert first == again != other


def test_an_entry_with_controls_uses_the_models_own_in_turn():
    entry = Entry(controls=3, reference_images=2)
    assert entry.problem(MODEL) is None
    body = to_request(entry, MODEL, "p", 0).body
    used = [(each["model"], each.get("type")) for each in body["controls"]]
    assert used == [("edges", None), ("union", "pose"), ("edges", None)]
    assert [each["adapter"] for each in body["reference_images"]] == ["style", "style"]


@pytest.mark.parametrize(
    ("entry", "lacks", "said"),
    [
        (Entry(task="inpainting"), {}, "text-to-image"),
        (Entry(controls=1), {"control_details": MODEL["control_details"][:1]}, "--controlnet"),
        (Entry(reference_images=1), {"reference_adapters": []}, "--reference-adapter"),
    ],
)
def test_a_mix_that_the_model_cannot_run_is_refused(entry, lacks, said):
    with pytest.raises(ValueError, match=said):
        supported([entry], MODEL | lacks)
    assert entry not in supported(None, MODEL | lacks)


def test_bands_of_concurrent_requests_do_not_overlap():
    bodies = [(index / 2, 1 + index % 5, 1 + index % 4) for index in range(40)]
    answers = [
        Answer(Request("text-to-image", {"n": 1}, rows), sent, sent + 9, "200", 0.25, denoise)
        for sent, denoise, rows in bodies
    ]
    bands = list(stacked(answers))
    assert len(bands) == len(answers)
    for answer, joined, low in bands:
        for other, later, start in bands:
            if answer is not other and joined <= later < joined + answer.denoise:
                assert start >= low + answer.request.rows or start + other.request.rows <= low


def test_samples_taken_during_a_unet_call_are_skipped():
    points = [(0, 0, 0, 0), (1, 0, 0, 2), (2, 1, 6, 2), (3, 1, 6, 2), (4, 3, 10, 0), (5, 3, 10, 0)]
    names = ("ldm_unet_rows_count", "ldm_unet_rows_sum", "ldm_jobs_running")
    samples = [Sample(at, dict(zip(names, values, strict=True))) for at, *values in points]
    assert list(intervals(samples)) == [(0, 2, 6), (2, 4, 2), (4, 5, 0)]
