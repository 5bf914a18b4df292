// The status view and the strip of UNet calls.

import { get, text } from "./api.js";
import { $, colourOf, h } from "./dom.js";

const MAX_CALLS = 240;
const BAR = 6;
const BUSY_MS = 250, IDLE_MS = 2000;

export class Strip {
  constructor() {
    this.calls = [];
    this.last = null;
    new ResizeObserver(() => this.draw()).observe($("strip"));
    new ResizeObserver(() => this.draw()).observe($("strip-large"));
  }

  /** Fetch new UNet calls for ever, often while there are some. */
  async watch() {
    for (;;) {
      let wait = IDLE_MS;
      if (!document.hidden) {
        try {
          const { last, calls } = await get(`activity?after=${this.last ?? 0}`);
          if (last < this.last) this.calls = []; // the server was started again
          if (this.last !== null) for (const call of calls) this.add(call);
          if (calls.length && this.last !== null) wait = BUSY_MS;
          this.last = last;
        } catch (error) {
          $("strip-text").textContent = error.message;
        }
      }
      await new Promise((resume) => { this.wake = resume; setTimeout(resume, wait); });
    }
  }

  add(call) {
    this.calls.push(call);
    if (this.calls.length > MAX_CALLS) this.calls.shift();
    const jobs = call.jobs.length;
    $("strip-text").textContent = `${call.rows} rows of ${jobs} ${jobs === 1 ? "job" : "jobs"} in one call, ${Math.round(call.seconds * 1000)} ms`;
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.draw());
  }

  draw() {
    for (const id of ["strip", "strip-large"]) {
      const canvas = $(id), height = canvas.clientHeight, width = canvas.clientWidth;
      if (!width) continue;
      canvas.width = width * devicePixelRatio;
      canvas.height = height * devicePixelRatio;
      const context = canvas.getContext("2d");
      context.scale(devicePixelRatio, devicePixelRatio);
      const shown = this.calls.slice(-Math.floor(width / BAR));
      const tallest = Math.max(8, ...shown.map((call) => call.padded)), unit = (height - 2) / tallest;
      shown.forEach((call, i) => {
        const x = width - (shown.length - i) * BAR;
        let y = height - 1;
        for (const { tag, rows } of call.jobs) {
          context.fillStyle = colourOf(tag);
          context.fillRect(x, y - rows * unit, BAR - 1, rows * unit);
          y -= rows * unit;
        }
        const padding = (call.padded - call.rows) * unit;
        if (padding > 0) {
          context.strokeStyle = "#8888";
          context.strokeRect(x + 0.5, y - padding + 0.5, BAR - 2, padding);
        }
      });
    }
  }
}

/** The value of a metric, summed over its labels; NaN if it is not there. */
const sample = (metrics, name) => {
  const lines = [...metrics.matchAll(new RegExp(`^${name}(?:\\{[^}]*\\})? ([0-9.e+-]+)$`, "gm"))];
  return lines.length ? lines.reduce((sum, line) => sum + Number(line[1]), 0) : NaN;
};

/** Fill in the status view once. */
export async function showStatus(models) {
  const [health, metrics] = await Promise.all([get("health").catch((error) => ({ status: error.code ?? "down", models: [], jobs: 0, capacity: 0 })), text("metrics").catch(() => "")]);
  const calls = sample(metrics, "ldm_unet_rows_count"), rows = sample(metrics, "ldm_unet_rows_sum");
  const running = sample(metrics, "ldm_jobs_running"), waiting = sample(metrics, "ldm_jobs_waiting");
  const number = (value) => (Number.isFinite(value) ? String(Math.round(value * 10) / 10) : "–");
  const facts = [["State", health.status], ["Queue", `${health.jobs} of ${health.capacity}`], ["Running", number(running)], ["Waiting", number(waiting)],
    ["Worker restarts", number(sample(metrics, "ldm_worker_restarts_total"))], ["Rows per UNet call", number(rows / calls)], ["Models loaded", String(health.models.length)]];
  $("facts").replaceChildren(...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  $("models-table").tBodies[0].replaceChildren(...models.map((model) => h("tr", {}, h("th", { scope: "row" }, model.name), h("td", {}, model.tasks.join(", ")),
    h("td", {}, `${model.defaults.width}×${model.defaults.height}`), h("td", {}, String(model.defaults.steps)))));
}
