// npm openai against the server whose /v1 address is the argument: prints what it received as JSON.
import { readFileSync } from "node:fs";
import OpenAI, { toFile } from "openai";

const [baseURL, imagePath] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const prompt = "red apple on a blue background";

const generated = await client.images.generate({
  model: "dall-e-3",
  prompt,
  quality: "hd",
  style: "vivid",
  size: "1024x1024",
  n: 1,
});
const file = await fetch(generated.data[0].url);

const image = await toFile(readFileSync(imagePath), "image.png", { type: "image/png" });
const edited = await client.images.edit({ model: "gpt-image-1", image, prompt: "tomato", quality: "low" });

const types = [];
const stream = await client.images.generate({ model: "gpt-image-1", prompt, stream: true, partial_images: 1 });
for await (const event of stream) types.push(event.type);

let refused;
try {
  await client.images.generate({ prompt, background: "transparent" });
} catch (error) {
  refused = { status: error.status, param: error.param };
}

console.log(
  JSON.stringify({
    size: generated.size,
    fileStatus: file.status,
    fileType: file.headers.get("content-type"),
    editedKeys: Object.keys(edited.data[0]),
    types,
    refused,
  }),
);
