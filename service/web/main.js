// The page at /: wires the views, the form and the results together.

import { get, key, onUnauthorized } from "./api.js";
import { $ } from "./dom.js";
import { Form, seedError } from "./form.js";
import { Live } from "./live.js";
import { parametersOf } from "./png.js";
import { asBase64, startJob, tileOf } from "./results.js";
import { fromLink, snippets } from "./snippets.js";
import { showStatus, Strip } from "./status.js";
import * as store from "./store.js";

const POLL_MS = 2000;
const VIEWS = ["create", "gallery", "status"];

const form = new Form(() => live.changed());
const strip = new Strip();

const actions = {
  made: () => showGallery(),
  again: (image) => open(image.task, image.request),
  vary: async (image) => { await open(image.task, { ...image.request, seed: undefined }); await submit(); },
  inpaint: async (image) => open("inpaint", { prompt: image.request.prompt, image: await asBase64(image) }),
  upscale: async (image) => open("upscale", { image: await asBase64(image) }),
  startFrom: async (image) => {
    await open("generate", { ...image.request, init_image: await asBase64(image), image: undefined, mask: undefined, strength: 0.75, seed: undefined });
    $("strength").closest("details").open = true;
  },
};

const live = new Live(form, actions);

async function open(task, request) {
  location.hash = "#create";
  show("create");
  await form.fill(task, request);
  $("form").scrollIntoView({ block: "start" });
}

async function submit() {
  form.clearErrors();
  const body = await form.job();
  if (body.task !== "generate" && !body.request.image) return form.showError({ param: "image", message: "Choose an image first." });
  if (body.task === "inpaint" && !body.request.mask) return form.showError({ param: "mask", message: "Paint over what is to be replaced." });
  const error = seedError(body.request);
  if (error) return form.showError({ param: "seed", message: error });
  strip.wake?.();
  return startJob(body, form, actions);
}

function show(view) {
  for (const name of VIEWS) $(name).hidden = name !== view;
  for (const link of document.querySelectorAll("[data-view]")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (view === "gallery") showGallery();
  if (view === "status") showStatus(form.models);
  strip.draw();
}

async function showGallery() {
  if ($("gallery").hidden) return;
  const images = await store.all().catch(() => []);
  $("gallery-empty").hidden = images.length > 0;
  $("gallery-grid").replaceChildren(...images.map((image) => tileOf(image, actions)));
}

async function loadModels() {
  try {
    form.setModels((await get("models")).models);
  } catch (error) {
    $("form-error").textContent = error.status === 503 ? "" : error.message;
    if (error.status === 401) return;
    setTimeout(loadModels, POLL_MS);
  }
}

/** Ask for an API key; true once one was entered. */
let asking = null;
onUnauthorized(() => {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key-button").hidden = false;
    dialog.onclose = () => {
      asking = null;
      const given = dialog.returnValue === "ok" && $("key").value;
      if (given) key.set($("key").value);
      $("key").value = dialog.returnValue = "";
      resolve(Boolean(given));
    };
    dialog.showModal();
  });
  return asking;
});

async function readDropped(file) {
  const parameters = await parametersOf(file);
  if (!parameters) return form.showError({ param: null, message: "This file holds no parameters of an image made here." });
  return open("generate", parameters);
}

function wire() {
  $("form").onsubmit = (event) => { event.preventDefault(); submit(); };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("create").hidden) { event.preventDefault(); submit(); }
  });
  for (const closer of document.querySelectorAll("[data-close]")) closer.onclick = () => closer.closest("dialog").close();
  for (const copier of document.querySelectorAll("[data-copy]")) copier.onclick = async () => {
    const text = snippets[copier.dataset.copy](form.task, await form.read());
    const done = await navigator.clipboard?.writeText(text).then(() => true, () => false);
    $("copied").textContent = done ? "Copied." : text;
  };
  $("key-button").onclick = () => $("key-dialog").showModal();
  $("gallery-clear").onclick = async () => { if (confirm("Delete every image of this gallery?")) { await store.clear(); await showGallery(); } };
  addEventListener("hashchange", route);
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => { event.preventDefault(); if (event.dataTransfer.files[0]) readDropped(event.dataTransfer.files[0]); });
  addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
    if (file) (form.task === "generate" ? form.initImage : form.image).set(file);
  });
  document.addEventListener("visibilitychange", () => strip.wake?.());
  setInterval(() => { if (!$("status").hidden && !document.hidden) showStatus(form.models); }, POLL_MS);
}

function route() {
  const linked = fromLink(location.hash);
  if (linked) open(linked.task, linked.request);
  else if (VIEWS.includes(location.hash.slice(1))) show(location.hash.slice(1));
}

wire();
await loadModels();
route();
strip.watch();
