// Talks to the service, with the key if it asks for one.

const $ = (id) => document.getElementById(id);
const STORE = "npair-key";
const REFUSED = "That key was refused.";
const sources = new WeakMap(); // what each image element shows, since answers may overtake

/** The service answered with an error, or not at all. title, message: for people. */
export class Refused extends Error {
  constructor(title, message, status) {
    super(message);
    Object.assign(this, { title, status });
  }
}

/** Fetch a path of the service; return the response. Throws Refused, or AbortError. */
export async function ask(path, options = {}) {
  const key = sessionStorage.getItem(STORE);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(
      "The search does not answer",
      "It may have stopped, or the network is gone. Nothing was lost; try again in a moment.",
    );
  }
  if (response.ok) return response;
  if (response.status === 401) {
    await askForKey(key);
    return ask(path, options);
  }
  const body = await response.json().catch(() => ({}));
  const message = body.error?.message ?? `${response.status} ${response.statusText}`;
  throw new Refused("The search failed", message, response.status);
}

/** Show a photo of the gallery in an image element. */
export async function picture(image, id) {
  const path = `photos/${encodeURIComponent(id)}`;
  sources.set(image, path);
  if (!sessionStorage.getItem(STORE)) {
    image.src = path;
    return;
  }
  try {
    const url = URL.createObjectURL(await (await ask(path)).blob());
    if (sources.get(image) === path) image.src = url;
    await image.decode().catch(() => {});
    URL.revokeObjectURL(url);
  } catch {
    image.dispatchEvent(new Event("error"));
  }
}

let asking = null; // one dialog, however many requests were refused

function askForKey(refused) {
  if (sessionStorage.getItem(STORE) !== refused) return Promise.resolve(); // answered meanwhile
  asking ??= new Promise((resolve, reject) => {
    const door = $("door");
    $("door-note").textContent = refused ? REFUSED : "";
    $("key").value = "";
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      const key = $("key").value.trim();
      if (!/^[!-~]+$/.test(key)) { // no header can hold it, so that no request could be sent
        $("door-note").textContent = REFUSED;
        return;
      }
      sessionStorage.setItem(STORE, key);
      door.close("given");
    };
    $("leave").onclick = () => door.close();
    door.onclose = () => {
      asking = null;
      if (door.returnValue === "given") resolve();
      else reject(new Refused("A key is needed", "Without it the search does not answer."));
      door.returnValue = "";
    };
    door.showModal();
  });
  return asking;
}
