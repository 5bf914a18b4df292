// Live mode: while the user types, an image of the prompt is requested after each pause, in few steps.

import { ApiError, post } from "./api.js";
import { $, blobOf } from "./dom.js";
import { seedError } from "./form.js";
import { tileOf } from "./results.js";

const PAUSE_MS = 150; // without a key press, before an image is requested

/** The few-step settings of a model, or of its first few-step LoRA, and that LoRA; null if there are none. */
export function fewSteps(model) {
  if (model?.few_step) return { settings: model.few_step, loras: {} };
  const [lora] = Object.entries(model?.lora_settings ?? {});
  return lora ? { settings: lora[1], loras: { [lora[0]]: 1 } } : null;
}

/** The form's request, run in few steps, with one image. */
function fewStepRequest(request, { settings, loras }) {
  const { steps, guidance_scale, sampler, spacing, eta } = settings;
  const { n, negative_prompt, ...kept } = request, all = { ...request.loras, ...loras };
  const stepping = { sampler, spacing: spacing ?? undefined, eta: eta || undefined };
  return { ...kept, steps, guidance_scale, ...stepping, loras: Object.keys(all).length ? all : undefined };
}

export class Live {
  /** actions: what can be done with an image, as for other results. */
  constructor(form, actions) {
    Object.assign(this, { form, actions, timer: null, controller: new AbortController() });
    this.seed = Math.floor(Math.random() * 2 ** 32); // of all live images, so that only the prompt changes them
    $("live").onchange = () => this.toggle();
  }

  get on() { return $("live").checked && !$("live-field").hidden; }

  /** Call when the model or the task changes, and after every change of the form. */
  changed() {
    $("live-field").hidden = this.form.task !== "generate" || !fewSteps(this.form.model);
    this.stop();
    $("live-view").hidden = !this.on;
    if (this.on) this.timer = setTimeout(() => this.draw(), PAUSE_MS);
  }

  toggle() {
    $("live-image").replaceChildren();
    this.changed();
  }

  /** Cancels the request that is running, which the server notices by the closed connection. */
  stop() {
    clearTimeout(this.timer);
    this.controller.abort();
  }

  async draw() {
    const { signal } = (this.controller = new AbortController());
    const fast = fewSteps(this.form.model), written = await this.form.read();
    if (!written.prompt && written.class_label === undefined && !written.boxes) return this.say("Type a prompt.");
    const error = seedError(written);
    if (error) return this.say(`Seed: ${error}`);
    const request = { seed: this.seed, ...fewStepRequest(written, fast) };
    try {
      const result = await post("generate", request, signal);
      if (!signal.aborted) this.show(request, result);
    } catch (error) {
      if (!signal.aborted) this.say(error instanceof ApiError ? error.message : "The connection to the server is lost.");
    }
  }

  show(request, { images: [image], model, timings }) {
    const { width, height, seed } = image, blob = blobOf(image.data, image.media_type);
    const before = $("live-image").querySelector("img");
    if (before) URL.revokeObjectURL(before.src);
    const tile = tileOf({ blob, task: "generate", request, model, seed, width, height, created: Date.now() }, this.actions);
    tile.style.aspectRatio = `${width} / ${height}`;
    $("live-image").replaceChildren(tile);
    this.say(`${request.prompt ?? "Image"}: ${request.steps} steps, ${timings.total.toFixed(2)} s`);
  }

  say(text) { $("live-text").textContent = text; }
}
