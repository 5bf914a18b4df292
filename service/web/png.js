// Reads the parameters that this service writes into PNG files (text chunk "parameters", JSON).

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];

/** The parameters of an image made here, or null. */
export async function parametersOf(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  if (!SIGNATURE.every((byte, i) => bytes[i] === byte)) return null;
  const view = new DataView(bytes.buffer);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const found = textOf(type, bytes.subarray(at + 8, at + 8 + length));
    if (found?.keyword === "parameters") return parse(found.text);
    if (type === "IEND") return null;
    at += 12 + length;
  }
  return null;
}

function textOf(type, data) {
  const end = data.indexOf(0);
  if (end < 0 || (type !== "tEXt" && type !== "iTXt")) return null;
  const keyword = new TextDecoder("latin1").decode(data.subarray(0, end));
  if (type === "tEXt") return { keyword, text: new TextDecoder("latin1").decode(data.subarray(end + 1)) };
  if (data[end + 1] !== 0) return null; // compressed: not written by this service
  const language = data.indexOf(0, end + 3);
  const translated = data.indexOf(0, language + 1);
  return { keyword, text: new TextDecoder().decode(data.subarray(translated + 1)) };
}

function parse(text) {
  try {
    const value = JSON.parse(text);
    return value && typeof value === "object" ? value : null;
  } catch {
    return null;
  }
}
