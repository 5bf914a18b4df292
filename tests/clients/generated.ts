// The client that @hey-api/openapi-ts generates into ./generated; arguments: the server's address and an API key.
import { writeFileSync } from "node:fs";
import { createImage, editImage, generate, listModels } from "./generated/index.js";
import { client } from "./generated/client.gen.js";

const [baseUrl, key, output] = process.argv.slice(2) as [string, string, string];
client.setConfig({ baseUrl, headers: { "X-API-Key": key } });

const models = await listModels({ throwOnError: true });
const made = await generate({ body: { prompt: "red apple on a blue background", steps: 3, seed: 0 }, throwOnError: true });
const image = Buffer.from(made.data.images[0]!.data, "base64");
const edited = await editImage({
  body: { prompt: "tomato", image: [new Blob([image], { type: "image/png" })], steps: 3 },
  throwOnError: true,
});
const created = await createImage({ body: { prompt: "ghost", steps: 3, response_format: "url" }, throwOnError: true });
const refused = await generate({ body: { prompt: "p", width: 1 } });

writeFileSync(
  output,
  JSON.stringify({
    models: models.data.models.map((model) => model.name),
    seed: made.data.images[0]!.seed,
    edited: edited.data.size,
    hasUrl: typeof created.data.data[0]!.url === "string",
    param: refused.error?.error.param,
  }),
);
