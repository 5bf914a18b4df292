// Small helpers for building the page.

export const $ = (id) => document.getElementById(id);

/** Create an element: h("button", {type: "button", onclick}, "Text", child). */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (typeof value === "function") element[name] = value;
    else if (value === true) element.setAttribute(name, "");
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const button = (text, onclick, label) =>
  h("button", { type: "button", class: "quiet", onclick, "aria-label": label }, text);

export const base64Of = async (blob) => {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let binary = "";
  for (let i = 0; i < bytes.length; i += 32768) binary += String.fromCharCode(...bytes.subarray(i, i + 32768));
  return btoa(binary);
};

export function blobOf(base64, type) {
  const binary = atob(base64);
  return new Blob([Uint8Array.from(binary, (c) => c.charCodeAt(0))], { type });
}

export async function bitmapOf(blob) {
  return createImageBitmap(blob);
}

/** A PNG of the canvas. */
export const pngOf = (canvas) => new Promise((resolve) => canvas.toBlob(resolve, "image/png"));

export function download(blob, name) {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** The tag of a job in /activity: CRC-32 of its id, 8 hexadecimal digits. */
export function tagOf(id) {
  let crc = 0xffffffff;
  for (const char of id) {
    crc ^= char.charCodeAt(0);
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ((crc ^ 0xffffffff) >>> 0).toString(16).padStart(8, "0");
}

/** A colour for a job's tag, the same everywhere on the page. */
export const colourOf = (tag) => `hsl(${parseInt(tag, 16) % 360} 62% 52%)`;
