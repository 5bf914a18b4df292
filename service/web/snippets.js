// The current request as code, and as a link.

import { key, url } from "./api.js";

const IMAGES = ["image", "mask", "init_image", "segmentation"];

/** The request with a file name in the place of each image. */
function named(request) {
  const files = [];
  const body = { ...request };
  for (const name of IMAGES) {
    if (body[name]) {
      body[name] = `@${name}.png`;
      files.push(name);
    }
  }
  return { body, files };
}

const quote = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

function curl(task, request) {
  const { body, files } = named(request);
  const auth = key.get() ? ` \\\n  -H "Authorization: Bearer $LDM_API_KEY"` : "";
  const head = `curl ${quote(url(task))} -H 'Content-Type: application/json' -H 'Accept: image/png'${auth}`;
  let json = quote(JSON.stringify(body));
  for (const name of files) json = json.replace(`@${name}.png`, `'"$(base64 -w0 ${name}.png)"'`);
  return files.length ? `echo ${json} | ${head} \\\n  -d @- -o result.png\n` : `${head} \\\n  -d ${json} -o result.png\n`;
}

function python(task, request) {
  const { body, files } = named(request);
  let literal = JSON.stringify(body, null, 4).replace(/: true/g, ": True").replace(/: false/g, ": False").replace(/: null/g, ": None");
  for (const name of files) literal = literal.replace(`"@${name}.png"`, `base64_of("${name}.png")`);
  const helper = files.length ? `\n\ndef base64_of(path):\n    return base64.b64encode(open(path, "rb").read()).decode()\n` : "";
  const auth = key.get() ? `, headers={"Authorization": "Bearer " + os.environ["LDM_API_KEY"]}` : "";
  return `import base64\n${key.get() ? "import os\n" : ""}\nimport httpx\n${helper}\nrequest = ${literal}\n` +
    `response = httpx.post(${JSON.stringify(url(task))}, json=request, timeout=600${auth})\nresponse.raise_for_status()\n` +
    `for i, image in enumerate(response.json()["images"]):\n    open(f"result-{i}.png", "wb").write(base64.b64decode(image["data"]))\n`;
}

function javascript(task, request) {
  const { body, files } = named(request);
  let literal = JSON.stringify(body, null, 2);
  for (const name of files) literal = literal.replace(`"@${name}.png"`, `base64Of("${name}.png")`);
  const helper = files.length ? `const base64Of = (path) => readFileSync(path).toString("base64");\n` : "";
  const auth = key.get() ? `, Authorization: \`Bearer \${process.env.LDM_API_KEY}\`` : "";
  return `import { ${files.length ? "readFileSync, " : ""}writeFileSync } from "node:fs";\n\n${helper}const response = await fetch(${JSON.stringify(url(task))}, {\n` +
    `  method: "POST",\n  headers: { "Content-Type": "application/json"${auth} },\n  body: JSON.stringify(${literal.replaceAll("\n", "\n  ")}),\n});\n` +
    `const { images } = await response.json();\nimages.forEach((image, i) => writeFileSync(\`result-\${i}.png\`, Buffer.from(image.data, "base64")));\n`;
}

/** A link to this page that fills in the request; images are left out. */
function link(task, request) {
  const { body, files } = named(request);
  for (const name of files) delete body[name];
  const json = new TextEncoder().encode(JSON.stringify({ task, request: body }));
  const base64 = btoa(String.fromCharCode(...json)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  return `${url("./")}#request=${base64}`;
}

export const snippets = { curl, python, javascript, link };

/** The {task, request} in the address, or null. */
export function fromLink(hash) {
  const found = /^#request=([A-Za-z0-9_-]+)$/.exec(hash);
  if (!found) return null;
  try {
    const binary = atob(found[1].replaceAll("-", "+").replaceAll("_", "/"));
    const { task, request } = JSON.parse(new TextDecoder().decode(Uint8Array.from(binary, (c) => c.charCodeAt(0))));
    return ["generate", "inpaint", "upscale"].includes(task) && typeof request === "object" ? { task, request } : null;
  } catch {
    return null;
  }
}
