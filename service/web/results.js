// Cards of running jobs, finished images and the viewer.

import { ApiError, follow, post, remove } from "./api.js";
import { $, base64Of, blobOf, button, colourOf, download, h, tagOf } from "./dom.js";
import * as store from "./store.js";

const ENDED = ["done", "failed", "cancelled"];
const EXTENSIONS = { "image/png": "png", "image/jpeg": "jpg", "image/webp": "webp" };
const seconds = (value) => (value < 1 ? "less than 1 s" : `${Math.round(value)} s`);

/** Start a job and show it. `actions` are what can be done with its images. */
export async function startJob(body, form, actions) {
  const card = new Card(body, form, actions);
  $("results").prepend(card.element);
  $("empty").hidden = true;
  await card.run();
}

class Card {
  constructor(body, form, actions) {
    Object.assign(this, { body, form, actions, controller: new AbortController(), id: null });
    const { request } = body;
    const title = request.prompt || request.class_label || (request.boxes ?? []).map((box) => box.name).join(", ") || body.task;
    this.frames = h("div", { class: "frames" });
    this.progress = h("progress", { max: 1, value: 0, "aria-label": "Progress" });
    this.text = h("span", { class: "small", role: "status" }, "Sending");
    this.cancelButton = button("Cancel", () => this.cancel());
    this.footer = h("div", { class: "row wrap" }, this.text, h("span", { class: "spacer" }), this.cancelButton);
    this.element = h("article", { class: "card", "aria-label": String(title) }, h("p", { class: "title" }, String(title)), this.frames, this.progress, this.footer);
    this.tiles = Array.from({ length: request.n ?? 1 }, () => h("div", { class: "frame" }));
    const { width, height } = this.size();
    for (const tile of this.tiles) tile.style.aspectRatio = `${width} / ${height}`;
    this.frames.append(...this.tiles);
  }

  size() {
    const { model } = this.form, { request } = this.body;
    return { width: request.width ?? model?.defaults.width ?? 1, height: request.height ?? model?.defaults.height ?? 1 };
  }

  async run() {
    try {
      const job = await post("jobs", this.body);
      this.id = job.id;
      this.element.style.borderTop = `3px solid ${colourOf(tagOf(job.id))}`;
      for await (const { event, data } of follow(`jobs/${job.id}/events`, ({ event }) => ENDED.includes(event), this.controller.signal)) await this.show(event, data);
    } catch (error) {
      if (!this.controller.signal.aborted) this.fail(error);
    }
  }

  async show(event, data) {
    if (event === "queued") this.text.textContent = `Position ${data.position ?? "?"}${data.estimate ? `, about ${seconds(data.estimate)}` : ""}`;
    else if (event === "step") {
      this.progress.max = data.steps || 1;
      this.progress.value = data.step;
      this.text.textContent = data.step < data.steps ? `Step ${data.step} of ${data.steps}` : "Decoding";
    } else if (event === "preview") this.preview(data);
    else if (event === "done") await this.finish(data.result);
    else if (event === "failed") this.fail(new ApiError(500, data.error));
    else this.end("Cancelled");
  }

  preview({ index, data, media_type: type }) {
    const url = `data:${type};base64,${data}`, image = this.tiles[index].querySelector("img");
    if (image) image.src = url;
    else this.tiles[index].append(h("img", { src: url, class: "preview", alt: "Preview" }));
  }

  async cancel() {
    this.cancelButton.disabled = true;
    if (this.id) await remove(`jobs/${this.id}`).catch(() => null);
    else { this.controller.abort(); this.end("Cancelled"); }
  }

  end(text) {
    this.progress.remove();
    this.cancelButton.remove();
    this.text.textContent = text;
  }

  fail(error) {
    this.end(error.message);
    this.text.classList.add("error");
    if (error.status === 422 || error.status === 400 || error.status === 404) this.form.showError(error);
    const wait = error.retryAfter;
    const retry = button(wait ? `Try again in ${wait} s` : "Try again", () => { this.element.remove(); startJob(this.body, this.form, this.actions); });
    if (wait) {
      retry.disabled = true;
      setTimeout(() => { retry.disabled = false; retry.textContent = "Try again"; }, wait * 1000);
    }
    this.footer.append(retry, button("Dismiss", () => this.element.remove()));
  }

  async finish(result) {
    const total = result.timings.total;
    this.end(`${total.toFixed(total < 10 ? 1 : 0)} s, seed ${result.images[0].seed}`);
    for (const warning of result.warnings) this.element.append(h("p", { class: "small" }, warning));
    this.form.lastSeed = result.images[0].seed;
    for (const [index, made] of result.images.entries()) {
      const blob = blobOf(made.data, made.media_type);
      const image = { blob, task: this.body.task, request: { ...this.body.request, n: undefined, seed: made.seed }, model: result.model,
        seed: made.seed, width: made.width, height: made.height, created: Date.now() };
      const kept = await store.keep(image).catch(() => image); // private windows have no database
      const tile = tileOf(kept, this.actions);
      tile.style.aspectRatio = `${made.width} / ${made.height}`;
      this.tiles[index].replaceWith(tile);
    }
    this.actions.made();
  }
}

/** A small image that opens the viewer. */
export function tileOf(image, actions) {
  const text = image.request.prompt || image.task;
  return h("button", { type: "button", class: "frame", "aria-label": `Open: ${text}`, onclick: () => view(image, actions) },
    h("img", { src: URL.createObjectURL(image.blob), alt: text, loading: "lazy" }));
}

/** The image in full, how it was made, and what to do with it. */
export function view(image, actions) {
  const dialog = $("viewer"), close = () => dialog.close();
  const name = `${image.model}-${image.seed}.${EXTENSIONS[image.blob.type] ?? "png"}`;
  const act = (text, work) => button(text, async () => { close(); await work(image); });
  const source = image.task === "upscale" && image.request.image ? blobOf(image.request.image, "image/png") : null;
  $("viewer-title").textContent = image.request.prompt || image.task;
  $("viewer-body").replaceChildren(
    source ? comparison(source, image) : h("img", { class: "main", src: URL.createObjectURL(image.blob), alt: image.request.prompt || image.task }),
    h("div", { class: "row wrap" },
      act("Same again", actions.again), act("New seed", actions.vary), act("Inpaint", actions.inpaint), act("Upscale", actions.upscale),
      act("Start from it", actions.startFrom), button("Download", () => download(image.blob, name)),
      image.id === undefined ? null : button("Delete", async () => { close(); await store.forget(image.id); actions.made(); })),
    parametersOf(image));
  dialog.showModal();
}

/** Before and after, with a slider between them. */
function comparison(before, image) {
  const after = h("img", { class: "after", src: URL.createObjectURL(image.blob), alt: "After" });
  const show = (share) => { after.style.clipPath = `inset(0 0 0 ${share}%)`; };
  show(50);
  return h("div", { class: "compare" },
    h("div", { class: "compare" }, h("img", { src: URL.createObjectURL(before), alt: "Before" }), after),
    h("label", { for: "compare-slider" }, "Before and after"),
    h("input", { id: "compare-slider", type: "range", min: "0", max: "100", value: "50", oninput: (event) => show(event.target.value) }));
}

function parametersOf(image) {
  const hidden = ["image", "mask", "init_image", "segmentation", "prompt", "seed", "model"];
  const entries = Object.entries(image.request).filter(([name, value]) => value !== undefined && !hidden.includes(name));
  const rows = [["model", image.model], ["seed", image.seed], ["size", `${image.width}×${image.height}`], ...entries];
  return h("dl", { class: "parameters" }, ...rows.flatMap(([name, value]) =>
    [h("dt", {}, name), h("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value))]));
}

export const asBase64 = (image) => base64Of(image.blob);
