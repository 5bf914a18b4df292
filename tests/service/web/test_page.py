"""The page at / in a real browser, against a server of the bundled models."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect, sync_playwright

from tests.helpers.servers import Server

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SECONDS = 180_000  # milliseconds that images may take on a busy machine
MAX_BYTES = 150_000  # of all files of the page together

pytestmark = pytest.mark.skipif(
    not Path(CHROMIUM).exists() and not os.environ.get("LDM_TESTS_MUST_NOT_SKIP"),
    reason="chromium is not installed",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=SECONDS)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


class Visit:
    """A page, and what its browser complained about or fetched from other hosts."""

    def __init__(self, context: BrowserContext, address: str) -> None:
        self.page: Page = context.new_page()
        self.page.set_default_timeout(SECONDS)
        self.problems: list[str] = []
        self.page.on("console", lambda m: m.type in ("error", "warning") and self.problems.append(m.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on(
            "request", lambda r: r.url.startswith(("data:", "blob:", address)) or self.problems.append(r.url)
        )
        self.page.goto(address)
        expect(self.page.locator("#model option").first).to_be_attached(timeout=SECONDS)

    def submit(self, **fields: str) -> Locator:
        """Fill in the form, send it with the keyboard and return the new card."""
        count = self.page.locator(".card").count()
        for name, value in fields.items():
            self.page.locator(f"#{name}").fill(value)
        self.page.keyboard.press("Control+Enter")
        expect(self.page.locator(".card")).to_have_count(count + 1)
        return self.page.locator(".card").first

    def finished(self, card: Locator, images: int = 1) -> Locator:
        """The images of a card, once they are all there."""
        tiles = card.locator("button.frame")
        expect(tiles).to_have_count(images, timeout=SECONDS)
        return tiles


@pytest.fixture
def visit(browser: Browser, bundled: Server) -> Iterator[Visit]:
    context = browser.new_context(accept_downloads=True)
    visit = Visit(context, str(bundled.client.base_url))
    yield visit
    assert visit.problems == []
    context.close()


def test_shows_previews_and_keeps_the_images_in_the_gallery(visit: Visit):
    page = visit.page
    card = visit.submit(prompt="red apple on a blue background", n="2", steps="200")
    preview = card.locator("img.preview").first
    first = preview.get_attribute("src")
    expect(preview).not_to_have_attribute("src", first)
    expect(card.get_by_role("status")).to_contain_text("Step")
    expect(page.locator("#strip-text")).to_contain_text("rows of 1 job")
    visit.finished(card, 2)
    page.reload()
    page.get_by_role("link", name="Gallery").click()
    expect(page.locator("#gallery-grid button")).to_have_count(2)


def test_live_mode_draws_in_few_steps_while_one_types(visit: Visit):
    page = visit.page
    page.get_by_label("Live: an image while you type").check()
    with page.expect_request("**/generate") as sent:
        page.locator("#prompt").press_sequentially("ghost", delay=20)
    body = sent.value.post_data_json
    assert body["prompt"] == "ghost"
    assert (body["steps"], body["guidance_scale"], body["loras"]) == (4, 1, {"few-steps": 1})
    assert body["sampler"] == "lcm"
    live = page.get_by_role("region", name="Live")
    expect(live.get_by_role("status")).to_contain_text("ghost: 4 steps")
    live.get_by_role("button", name="Open: ghost").click()
    expect(page.locator("#viewer")).to_contain_text("few-steps")


def test_live_mode_cancels_the_former_request(visit: Visit, bundled: Server):
    page = visit.page
    page.get_by_label("Live: an image while you type").check()
    page.locator("#width").fill("512")
    page.locator("#height").fill("512")
    with page.expect_event("requestfailed") as cancelled:
        with page.expect_request("**/generate"):
            page.locator("#prompt").fill("rocket")
        page.locator("#prompt").fill("red apple")
    assert cancelled.value.post_data_json["prompt"] == "rocket"
    expect(page.locator("#live-text")).to_contain_text("red apple: 4 steps")
    assert bundled.health()["jobs"] == 0


def test_live_mode_is_offered_for_prompts_alone_and_works_by_keyboard(visit: Visit):
    page = visit.page
    box = page.get_by_label("Live: an image while you type")
    page.locator("#prompt").focus()
    page.keyboard.press("Tab")
    expect(box).to_be_focused()
    page.keyboard.press("Space")
    expect(page.locator("#live-text")).to_have_text("Type a prompt.")
    page.get_by_text("Inpaint", exact=True).click()
    expect(box).to_be_hidden()
    expect(page.locator("#live-view")).to_be_hidden()


def test_live_mode_needs_a_few_step_lora_or_model(visit: Visit):
    offered = visit.page.evaluate(
        "async () => { const { fewSteps } = await import('./page/live.js');"
        " return [{lora_settings: {}, few_step: null}, {lora_settings: {}, few_step: {steps: 2}},"
        " {lora_settings: {fast: {steps: 4}}, few_step: null}].map(fewSteps); }"
    )
    assert offered == [
        None,
        {"settings": {"steps": 2}, "loras": {}},
        {"settings": {"steps": 4}, "loras": {"fast": 1}},
    ]


def test_cancels_a_running_job(visit: Visit, bundled: Server):
    card = visit.submit(prompt="ghost", steps="900")
    expect(card.get_by_role("status")).to_contain_text("Step")
    card.get_by_role("button", name="Cancel").click()
    expect(card.get_by_role("status")).to_have_text("Cancelled")
    assert bundled.health()["jobs"] == 0


def test_repaints_what_was_painted_over_and_nothing_else(visit: Visit):
    page = visit.page
    visit.finished(visit.submit(prompt="red apple on a blue background", steps="5")).click()
    page.locator("#viewer").get_by_role("button", name="Inpaint").click()
    canvas = page.locator("#mask-editor canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + 90, steps=4)
    page.mouse.up()
    with page.expect_request("**/jobs") as sent:
        card = visit.submit(prompt="ghost", steps="5")
    body = sent.value.post_data_json
    assert body["task"] == "inpaint"
    assert {"image", "mask"} <= body["request"].keys()
    visit.finished(card)


def test_an_empty_mask_is_an_error_at_the_mask(visit: Visit):
    page = visit.page
    visit.finished(visit.submit(prompt="ghost", steps="2")).click()
    page.locator("#viewer").get_by_role("button", name="Inpaint").click()
    expect(page.locator("#mask-editor canvas")).to_be_visible()
    page.locator("#submit").click()
    expect(page.locator("[data-field=mask] .error")).to_contain_text("Paint over")


def test_a_seed_that_javascript_cannot_hold_is_an_error_at_the_seed(visit: Visit):
    page = visit.page
    for seed in ("18446744073709551615", "abc"):
        page.fill("#prompt", "red apple")
        page.fill("#seed", seed)
        page.click("#submit")
        expect(page.locator("[data-field=seed] .error")).to_contain_text("9007199254740991")


def test_places_objects_by_dragging(visit: Visit):
    page = visit.page
    page.get_by_text("Place objects").click()
    canvas = page.locator("#box-editor canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 10, box["y"] + 10)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    page.get_by_label("Box 1: label").fill("ghost")
    with page.expect_request("**/jobs") as sent:
        card = visit.submit(steps="5")
    (placed,) = sent.value.post_data_json["request"]["boxes"]
    assert placed["name"] == "ghost"
    assert abs(placed["w"] - 0.46) < 0.05
    visit.finished(card)


def test_upscales_and_compares(visit: Visit):
    page = visit.page
    visit.finished(visit.submit(prompt="ghost", steps="2")).click()
    page.locator("#viewer").get_by_role("button", name="Upscale").click()
    expect(page.locator("[data-picker=image] img")).to_be_visible()
    visit.finished(visit.submit()).click()
    page.get_by_label("Before and after").fill("80")
    expect(page.locator("img.after")).to_have_css("clip-path", "inset(0px 0px 0px 80%)")


def test_shows_the_servers_errors_at_their_fields(visit: Visit):
    page = visit.page
    card = visit.submit(prompt="ghost", steps="1001")
    expect(page.locator("[data-field=steps] .error")).to_contain_text("steps")
    expect(page.locator("#steps")).to_have_attribute("aria-invalid", "true")
    expect(card.locator(".error")).to_be_visible()
    visit.problems[:] = [text for text in visit.problems if "422" not in text]  # the browser's own line


def test_a_full_queue_says_when_to_try_again(visit: Visit, bundled: Server):
    body = {"task": "generate", "request": {"prompt": "ghost", "steps": 900}}
    jobs = []
    while (answer := bundled.client.post("/jobs", json=body)).status_code == 202:
        jobs.append(answer.json()["id"])
    try:
        card = visit.submit(prompt="ghost")
        expect(card.locator(".error")).to_contain_text("queue is full")
        expect(card.get_by_role("button", name="Try again in")).to_be_disabled()
    finally:
        for job in jobs:
            bundled.client.delete(f"/jobs/{job}")
    visit.problems[:] = [text for text in visit.problems if "429" not in text]


def test_a_link_and_a_file_bring_a_request_back(visit: Visit, bundled: Server, tmp_path: Path):
    page = visit.page
    page.locator("#prompt").fill("ghost on a yellow background")
    page.locator("#seed").fill("7")
    page.locator("#steps").fill("4")
    link = page.evaluate(
        "async () => (await import('./page/snippets.js'))"
        ".snippets.link('generate', {prompt: 'rocket', seed: 5})"
    )
    visit.finished(visit.submit()).click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    file = tmp_path / "image.png"
    download.value.save_as(file)
    page.goto(link)
    expect(page.locator("#prompt")).to_have_value("rocket")
    expect(page.locator("#seed")).to_have_value("5")
    data = page.evaluate_handle(
        "(bytes) => { const dropped = new DataTransfer();"
        " dropped.items.add(new File([new Uint8Array(bytes)], 'a.png')); return dropped; }",
        list(file.read_bytes()),
    )
    page.dispatch_event("body", "drop", {"dataTransfer": data})
    expect(page.locator("#prompt")).to_have_value("ghost on a yellow background")
    expect(page.locator("#seed")).to_have_value("7")
    expect(page.locator("#steps")).to_have_value("4")


def test_code_for_the_request_runs(visit: Visit, tmp_path: Path):
    import subprocess
    import sys

    code = visit.page.evaluate(
        "async () => { const { snippets } = await import('./page/snippets.js'); const request = "
        '{prompt: "it\'s a ghost", steps: 2, seed: 1, prompt_weights: true};'
        " return ['python', 'javascript', 'curl'].map((kind) => snippets[kind]('generate', request)); }"
    )
    for text, command, name in zip(
        code, ([sys.executable], ["node"], ["bash"]), ("a.py", "a.mjs", "a.sh"), strict=True
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text)
        subprocess.run([*command, name], cwd=folder, check=True, timeout=60)
        assert [file for file in folder.iterdir() if file.suffix == ".png"]


def test_asks_for_the_key_and_keeps_it_for_the_tab(browser: Browser, start_server):
    with start_server(LDM_API_KEYS="secret-key") as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(str(server.client.base_url))
        page.get_by_label("Key", exact=True).fill("secret-key")
        page.get_by_role("button", name="Use key").click()
        expect(page.locator("#model option").first).to_be_attached(timeout=SECONDS)
        page.locator("#prompt").fill("a")
        page.keyboard.press("Control+Enter")
        expect(page.locator("button.frame")).to_have_count(1, timeout=SECONDS)
        assert page.evaluate("() => [sessionStorage.length, localStorage.length]") == [1, 0]
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_has_no_accessibility_violation(browser: Browser, bundled: Server, scheme: str):
    context = browser.new_context(color_scheme=scheme, bypass_csp=True)
    visit = Visit(context, str(bundled.client.base_url))
    visit.page.get_by_label("Live: an image while you type").check()
    visit.finished(visit.submit(prompt="ghost", steps="2"))
    expect(visit.page.locator("#live-text")).to_contain_text("ghost: 4 steps")
    for summary in visit.page.locator("summary:visible").all():
        summary.click()
    for view in ("Create", "Gallery", "Status"):
        visit.page.get_by_role("link", name=view).click()
        found = Axe().run(visit.page)
        assert found.violations_count == 0, found.generate_report()
    context.close()


def test_works_behind_a_path_prefix(browser: Browser, bundled: Server):
    base = str(bundled.client.base_url)

    def forward(route: Route) -> None:
        route.fulfill(response=route.fetch(url=route.request.url.replace("/prefix/", "/")))

    context = browser.new_context()
    context.route("**/prefix/**", forward)
    page = context.new_page()
    page.goto(f"{base}/prefix/")
    expect(page.locator("#model option").first).to_be_attached(timeout=SECONDS)
    context.unroute_all(behavior="ignoreErrors")
    context.close()


def test_does_not_shift_while_it_loads_and_works(browser: Browser, bundled: Server):
    context = browser.new_context(viewport={"width": 390, "height": 844})
    context.add_init_script(
        "window.shift = 0; new PerformanceObserver((list) => { for (const entry of list.getEntries())"
        " if (!entry.hadRecentInput) window.shift += entry.value; })"
        ".observe({type: 'layout-shift', buffered: true})"
    )
    visit = Visit(context, str(bundled.client.base_url))
    visit.finished(visit.submit(prompt="ghost", steps="2"))
    assert visit.page.evaluate("window.shift") < 0.1  # "good" by Core Web Vitals
    context.close()


def test_needs_no_other_host_and_no_inline_code(bundled: Server):
    answer = bundled.client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert "<style" not in answer.text
    assert " style=" not in answer.text
    assert " on" + "click=" not in answer.text


def test_is_small_and_names_only_its_own_files(bundled: Server):
    folder = Path(__file__).resolve().parents[3] / "service" / "web"
    files = [file for file in folder.iterdir() if file.suffix in (".html", ".css", ".js", ".svg")]
    assert sum(file.stat().st_size for file in files) < MAX_BYTES
    for file in files:
        assert bundled.client.get(f"/page/{file.name}").content == file.read_bytes()
    assert bundled.client.get("/page/..%2fapi%2fapp.py").status_code == 404
    assert httpx.get(f"{bundled.client.base_url}/page/page.py").status_code == 404
