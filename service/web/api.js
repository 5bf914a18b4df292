// The HTTP API: requests, errors and event streams. Addresses are relative, so that a path prefix works.

const BASE = new URL(".", document.baseURI);
const RETRY_MS = [500, 1000, 2000, 4000, 8000];

export class ApiError extends Error {
  constructor(status, detail, retryAfter) {
    super(detail.message.replace(/^request\./, "")); // the form's fields are those of the job's request
    this.status = status;
    this.param = detail.param;
    this.code = detail.code;
    this.retryAfter = retryAfter;
  }
}

export const key = {
  get: () => sessionStorage.getItem("ldm-key") ?? "",
  set: (value) => sessionStorage.setItem("ldm-key", value),
};

/** Called when the server answers 401; resolves to true once a key was entered. */
let askForKey = async () => false;
export const onUnauthorized = (ask) => { askForKey = ask; };

export const url = (path) => new URL(path, BASE).href;

async function send(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const response = await fetch(url(path), { ...options, headers, cache: "no-store" });
  if (response.status === 401 && (await askForKey())) return send(path, options);
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const fallback = { message: `The server answered ${response.status}.`, param: null, code: "unknown" };
  const detail = await response.json().then((body) => body.error ?? fallback, () => fallback);
  return new ApiError(response.status, detail, Number(response.headers.get("Retry-After")) || null);
}

export const get = async (path) => (await send(path)).json();
export const text = async (path) => (await send(path)).text();
export const remove = async (path) => (await send(path, { method: "DELETE" })).json();
export async function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return (await send(path, { method: "POST", headers, body: JSON.stringify(body), signal })).json();
}

/** Server-sent events as {id, event, data}; ends with the response. */
async function* read(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    for (let end; (end = buffer.indexOf("\n\n")) >= 0; buffer = buffer.slice(end + 2)) {
      const event = { event: "message", data: "" };
      for (const line of buffer.slice(0, end).split("\n")) {
        const colon = line.indexOf(":");
        if (colon > 0) event[line.slice(0, colon)] = line.slice(colon + 1).trimStart();
      }
      if (event.data) yield { ...event, data: JSON.parse(event.data) };
    }
  }
}

/** Follow an event stream through lost connections until `last(event)` is true or `signal` aborts. */
export async function* follow(path, last, signal) {
  let id = null;
  for (let failures = 0; failures < RETRY_MS.length; ) {
    try {
      const headers = id === null ? {} : { "Last-Event-ID": id };
      for await (const event of read(await send(path, { headers, signal }))) {
        failures = 0;
        id = event.id ?? id;
        yield event;
        if (last(event)) return;
      }
    } catch (error) {
      if (error instanceof ApiError || signal?.aborted) throw error;
    }
    await new Promise((resume) => setTimeout(resume, RETRY_MS[failures++]));
  }
  throw new Error("The connection to the server is lost.");
}
