// The gallery of this browser: images and how they were made, in IndexedDB.

const NAME = "latent-diffusion", STORE = "images";

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function run(mode, work) {
  const database = await open();
  try {
    return await new Promise((resolve, reject) => {
      const request = work(database.transaction(STORE, mode).objectStore(STORE));
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
  } finally {
    database.close();
  }
}

/** Keep {blob, task, request, model, seed, width, height, created}; returns it with its id. */
export async function keep(image) {
  return { ...image, id: await run("readwrite", (store) => store.add(image)) };
}
export const all = async () => (await run("readonly", (store) => store.getAll())).reverse();
export const forget = (id) => run("readwrite", (store) => store.delete(id));
export const clear = () => run("readwrite", (store) => store.clear());
