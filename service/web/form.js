// The request form: shows what the chosen model takes, reads and fills in requests, shows errors at their field.

import { $, base64Of, blobOf, h } from "./dom.js";
import { BoxEditor, ImagePicker, MaskEditor } from "./editors.js";

const NUMBERS = ["width", "height", "steps", "guidance_scale", "n", "scale", "noise_level", "eta", "priority"];
const SCENE = ["prompt", "negative_prompt", "class_label", "width", "height", "steps", "guidance_scale", "sampler", "n", "seed", "init_image", "boxes", "segmentation", "loras", "advanced"];
const FIELDS = {
  generate: SCENE,
  inpaint: ["image", "mask", "prompt", "negative_prompt", "steps", "guidance_scale", "sampler", "n", "seed", "loras", "advanced"],
  upscale: ["image", "prompt", "negative_prompt", "steps", "guidance_scale", "sampler", "n", "scale", "noise_level", "seed", "loras", "advanced"],
};
const VERBS = { generate: "Generate", inpaint: "Inpaint", upscale: "Upscale" };
const MAX_PREVIEWS = 8;

/** Which of the page's tasks a model does. */
const does = (model, task) =>
  task === "inpaint" ? model.tasks.includes("inpainting")
  : task === "upscale" ? model.tasks.includes("upscaling")
  : model.tasks.some((name) => name !== "inpainting" && name !== "upscaling");

/** Why the seed of a request cannot be sent, or null: JSON of a larger number would be another seed, of a text none. */
export const seedError = ({ seed }) =>
  seed === undefined || Number.isSafeInteger(seed) ? null : `A whole number from 0 to ${Number.MAX_SAFE_INTEGER}.`;

const file = (blob) => (blob ? base64Of(blob) : undefined);

export class Form {
  constructor(changed) {
    this.models = [];
    this.changed = changed;
    this.lastSeed = null;
    const pickers = Object.fromEntries([...document.querySelectorAll("[data-picker]")].map((element) => [element.dataset.picker, element]));
    this.image = new ImagePicker(pickers.image, "image", async (blob) => { await this.mask.setImage(blob); changed(); });
    this.initImage = new ImagePicker(pickers.init_image, "image to start from", changed);
    this.segmentation = new ImagePicker(pickers.segmentation, "segmentation map", changed);
    this.mask = new MaskEditor($("mask-editor"));
    this.boxes = new BoxEditor($("box-editor"), changed);
    const form = $("form");
    form.addEventListener("input", (event) => { this.clearError(event.target); this.changed(); });
    for (const radio of form.elements.task) radio.onchange = () => this.showTask();
    $("model").onchange = () => this.showModel();
    $("strength").oninput = () => { $("strength-value").value = Number($("strength").value).toFixed(2); };
    for (const side of ["width", "height"]) $(side).addEventListener("input", () => this.sized());
    $("seed-random").onclick = () => { $("seed").value = ""; this.changed(); };
    $("seed-last").onclick = () => { $("seed").value = this.lastSeed ?? ""; this.changed(); };
  }

  get task() { return $("form").elements.task.value; }
  set task(task) { $("form").elements.task.value = task; this.showTask(); }
  get model() { return this.models.find((model) => model.name === $("model").value); }

  setModels(models) {
    this.models = models;
    this.showTask();
  }

  showTask() {
    const able = this.models.filter((model) => does(model, this.task)), before = $("model").value;
    $("model").replaceChildren(...able.map((model) => h("option", {}, model.name)));
    if (able.some((model) => model.name === before)) $("model").value = before;
    const notice = $("task-notice");
    notice.hidden = able.length > 0;
    notice.textContent = this.models.length ? "No model of this server does this task." : "The server is loading a model.";
    $("submit").disabled = !able.length;
    $("submit").firstChild.textContent = `${VERBS[this.task]} `;
    this.showModel();
  }

  showModel() {
    const { model } = this, shown = new Set(["model", ...FIELDS[this.task]]);
    if (model) {
      for (const input of ["prompt", "class_label", "boxes", "segmentation"]) if (!model.inputs.includes(input)) shown.delete(input);
      if (!model.inputs.includes("prompt")) shown.delete("negative_prompt");
      if (!model.guided) { shown.delete("guidance_scale"); shown.delete("negative_prompt"); }
      if (!model.loras.length) shown.delete("loras");
      if (!model.upscaling?.max_noise_level) shown.delete("noise_level");
      this.fillChoices(model);
    }
    for (const part of document.querySelectorAll("#form > [data-field], #form > .grid > [data-field]")) part.hidden = !shown.has(part.dataset.field);
    document.querySelector("[data-field=prompt_options]").hidden = !model?.inputs.includes("prompt");
    this.sized();
    this.clearErrors();
    this.changed();
  }

  fillChoices(model) {
    const { defaults, limits } = model;
    for (const name of ["width", "height"]) Object.assign($(name), { min: limits.size_multiple, step: limits.size_multiple, placeholder: defaults[name] });
    Object.assign($("steps"), { max: limits.max_steps, placeholder: defaults.steps });
    Object.assign($("n"), { max: limits.max_n });
    $("guidance_scale").placeholder = defaults.guidance_scale;
    $("scale").placeholder = model.upscaling?.scale ?? "";
    $("noise_level").placeholder = defaults.noise_level;
    $("eta").placeholder = defaults.eta;
    const choices = (names, usual) => [h("option", { value: "" }, usual ?? "the sampler's own"), ...names.filter((name) => name !== usual).map((name) => h("option", {}, name))];
    for (const [id, names, usual] of [["sampler", model.samplers, defaults.sampler], ["spacing", model.spacings, defaults.spacing]]) {
      const before = $(id).value;
      $(id).replaceChildren(...choices(names, usual));
      if (names.includes(before) && before !== usual) $(id).value = before;
    }
    $("labels").replaceChildren(...model.labels.map((label) => h("option", { value: label.name })));
    $("loras").replaceChildren(...model.loras.map((name) => h("div", {},
      h("label", { for: `lora-${name}` }, name),
      h("input", { id: `lora-${name}`, "data-lora": name, type: "number", step: "any", min: "-10", max: "10", placeholder: "0" }))));
  }

  sized() {
    const { model } = this;
    if (model) this.boxes.setRatio(Number($("width").value) || model.defaults.width, Number($("height").value) || model.defaults.height);
  }

  /** Whether a field is part of the request now. */
  shows(name) {
    const element = document.querySelector(`[data-field="${name}"]`);
    return element && !element.hidden && !element.parentElement.closest("[hidden]");
  }

  /** The request of the form, without fields that hold nothing. */
  async read() {
    const request = { model: $("model").value || undefined };
    for (const name of ["prompt", "negative_prompt", "class_label", "sampler", "spacing"])
      if (this.shows(name) && $(name).value.trim()) request[name] = $(name).value;
    for (const name of NUMBERS)
      if (this.shows(name) && $(name).value !== "") request[name] = Number($(name).value);
    if (request.n === 1) delete request.n;
    if (!request.priority) delete request.priority;
    if ($("seed").value.trim()) request.seed = Number($("seed").value);
    if ($("output_format").value !== "png") request.output_format = $("output_format").value;
    if (this.shows("prompt_options") && $("prompt_weights").checked) request.prompt_weights = true;
    if (this.shows("prompt_options") && $("long_prompts").checked) request.long_prompts = "chunk";
    if (this.shows("loras")) {
      const loras = [...document.querySelectorAll("[data-lora]")].filter((input) => Number(input.value));
      if (loras.length) request.loras = Object.fromEntries(loras.map((input) => [input.dataset.lora, Number(input.value)]));
    }
    if (this.task === "generate") {
      if (this.shows("boxes") && this.boxes.boxes.length) request.boxes = this.boxes.boxes;
      if (this.shows("segmentation") && this.segmentation.blob) request.segmentation = await file(this.segmentation.blob);
      if (this.initImage.blob) Object.assign(request, { init_image: await file(this.initImage.blob), strength: Number($("strength").value) });
    } else {
      if (this.image.blob) request.image = await file(this.image.blob);
      if (this.task === "inpaint" && this.image.blob) {
        const mask = await this.mask.blob();
        if (mask) request.mask = await file(mask);
      }
    }
    return request;
  }

  /** The body of POST /jobs. */
  async job() {
    const request = await this.read(), body = { task: this.task, request };
    const steps = request.steps ?? this.model?.defaults.steps ?? MAX_PREVIEWS;
    if (this.task !== "upscale") body.preview_every = Math.max(1, Math.round(steps / MAX_PREVIEWS));
    return body;
  }

  /** Fill in a request, e.g. one made earlier or read from a file. */
  async fill(task, request) {
    this.task = task;
    if (this.models.some((model) => model.name === request.model && does(model, task))) $("model").value = request.model;
    this.showModel();
    for (const name of ["prompt", "negative_prompt", "sampler", "spacing", ...NUMBERS]) $(name).value = request[name] ?? (name === "n" ? 1 : name === "priority" ? 0 : "");
    const { class_label: label } = request;
    $("class_label").value = typeof label === "number" ? (this.model?.labels[label]?.name ?? label) : (label ?? "");
    $("seed").value = request.seed ?? "";
    $("output_format").value = request.output_format ?? "png";
    $("prompt_weights").checked = request.prompt_weights === true;
    $("long_prompts").checked = request.long_prompts === "chunk";
    for (const input of document.querySelectorAll("[data-lora]")) input.value = request.loras?.[input.dataset.lora] ?? "";
    this.boxes.set(request.boxes ?? []);
    if (request.boxes?.length) $("box-editor").closest("details").open = true;
    this.initImage.set(request.init_image ? blobOf(request.init_image, "image/png") : null);
    this.segmentation.set(request.segmentation ? blobOf(request.segmentation, "image/png") : null);
    if (request.strength) $("strength").value = request.strength;
    if (request.image) this.image.set(blobOf(request.image, "image/png"));
    this.sized();
    this.changed();
  }

  showError(error) {
    this.clearErrors();
    const name = (error.param ?? "").replace(/^request\./, "").split(".")[0];
    const input = $(name), field = document.querySelector(`[data-field="${name}"]`);
    if (!field || field.hidden) {
      $("form-error").textContent = error.message;
      return;
    }
    field.closest("details")?.setAttribute("open", "");
    const text = error.message.replace(/^request\./, "");
    field.append(h("p", { class: "error", id: `error-${name}`, role: "alert" }, text));
    if (input) {
      input.setAttribute("aria-invalid", "true");
      input.setAttribute("aria-describedby", `error-${name}`);
      input.focus();
    }
  }

  clearError(input) {
    if (!input.hasAttribute("aria-invalid")) return;
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-describedby");
    $(`error-${input.id}`)?.remove();
  }

  clearErrors() {
    $("form-error").textContent = "";
    for (const text of document.querySelectorAll("#form .field > .error")) text.remove();
    for (const input of document.querySelectorAll("#form [aria-invalid]")) {
      input.removeAttribute("aria-invalid");
      input.removeAttribute("aria-describedby");
    }
  }
}
