// The search page: takes a photo, asks the service for its neighbours and shows them.
//
// A query is what the history holds: {upload: N} is a photo of this visit, {photo: ID} one of the
// gallery, with its label if a click brought it; null is the start.

import { ask, picture, Refused } from "./service.js";
import { prepare, PhotoError } from "./photo.js";

const FIRST = 12; // neighbours at first
const MOST = 100; // that the API gives: MAX_K
const SOON = 200; // ms until the page says that it searches: most answers come before
const SLOW = 4000; // ms until it says that the server takes its time
const $ = (id) => document.getElementById(id);

const uploads = []; // {file, name, photo, note} in the order of this visit
let info = {};
let running = new AbortController(); // the search that the page waits for

// What the page shows

/** Show a query and search by it, k neighbours. A newer call ends an older one. */
async function show(query, k = FIRST) {
  running.abort();
  const { signal } = (running = new AbortController());
  const upload = uploads[query?.upload];
  if (!query || (!upload && !query.photo)) return showStart();

  showQuery(query, upload);
  const waiting = (reason) => signal.aborted || wait(reason, k === FIRST);
  const timers = [
    setTimeout(waiting, SOON, ""),
    setTimeout(waiting, SLOW, "The server takes its time."),
  ];
  try {
    if (upload && !upload.photo) Object.assign(upload, await prepare(upload.file, upload.name));
    signal.throwIfAborted();
    $("note").textContent = upload ? upload.note : "From the gallery";
    const path = `search?k=${k}${upload ? "" : `&photo=${encodeURIComponent(query.photo)}`}`;
    const response = await ask(path, { method: "POST", body: upload?.photo, signal });
    const answer = await response.json();
    if (!signal.aborted) showAnswer(answer, query, k);
  } catch (error) {
    if (!signal.aborted) showError(error, () => show(query, k));
  } finally {
    timers.forEach(clearTimeout);
  }
}

function showStart() {
  document.title = "npair";
  showGroups([]);
  say({ title: "" });
  $("search").hidden = true;
  $("start").hidden = false;
}

function showQuery(query, upload) {
  const image = $("shown");
  image.hidden = false;
  image.onerror = () => (image.hidden = true);
  if (upload) {
    upload.url ??= URL.createObjectURL(upload.file);
    image.src = upload.url;
  } else {
    picture(image, query.photo);
  }
  $("caption").textContent = upload ? upload.name : query.label || "";
  $("note").textContent = "";
  $("start").hidden = true;
  $("search").hidden = false;
}

/** Show that a search is under way, and a reason if it takes long; keep the cards or blank them. */
function wait(reason, blank) {
  $("more").hidden = true;
  $("results").setAttribute("aria-busy", "true");
  const status = reason || "Searching";
  say({ title: "Searching", detail: reason, action: ["Cancel", cancel], status });
  if (blank) showGroups([["", Array.from({ length: FIRST }, blankCard)]]);
}

function cancel() {
  running.abort();
  const query = history.state;
  stop({ title: "Cancelled", action: ["Search again", () => show(query)] });
}

function showError(error, again) {
  const known = error instanceof PhotoError || error instanceof Refused;
  if (!known) console.error(error);
  const photos = error instanceof PhotoError || [400, 413, 415, 422].includes(error.status);
  stop({
    title: photos ? "This photo cannot be searched" : error.title ?? "The search failed",
    detail: known ? error.message : "The page met an error of its own; reload it.",
    action: photos ? ["Choose another photo", () => $("file").click()] : ["Try again", again],
  });
}

/** End a search without an answer. */
function stop(words) {
  showGroups([]);
  $("more").hidden = true;
  $("results").setAttribute("aria-busy", "false");
  say({ ...words, status: `${words.title}. ${words.detail ?? ""}` });
  document.title = `${words.title} – npair`;
}

function showAnswer(answer, query, k) {
  about(answer);
  const { neighbours, threshold } = answer;
  const same = neighbours.filter((neighbour) => neighbour.same_product);
  const others = neighbours.filter((neighbour) => !neighbour.same_product);
  const cards = (some) => some.map(card);
  $("results").setAttribute("aria-busy", "false");
  showGroups([
    ["Same product", cards(same), "same"],
    [threshold === null ? "Nearest photos" : "Similar, below the threshold", cards(others)],
  ]);
  $("more").hidden = neighbours.length < k || k === MOST;
  $("more").onclick = () => show(history.state, Math.min(2 * k, MOST));
  const words = verdict(neighbours, same.length, threshold, query);
  say({ ...words, status: `${words.kind}: ${words.title}. ${words.detail}` });
  document.title = `${words.title} – npair`;
  if (k === FIRST) $("title").focus({ preventScroll: true });
}

/** Return the answer in words. */
function verdict([nearest], same, threshold, query) {
  if (!nearest && query.photo) {
    const detail = "The gallery has nothing but this photo and its copies.";
    return { kind: "Nothing to compare with", title: "No other photo", detail };
  }
  if (!nearest) {
    const detail = "Fill it on the server: npair index build PHOTOS";
    return { kind: "Nothing to compare with", title: "The gallery is empty", detail };
  }
  const label = nearest.label || "No label";
  const cosine = nearest.cosine.toFixed(3);
  if (threshold === null) {
    const detail = `Cosine ${cosine}. This version has no threshold for the same product.`;
    return { kind: "Nearest", title: label, detail };
  }
  const limit = threshold.toFixed(3);
  if (same === 0) {
    const detail = `The nearest, ${label}, has a cosine of ${cosine}; the threshold is ${limit}.`;
    return { kind: "No photo of the same product", title: "No match", detail };
  }
  const photos = same === 1 ? "1 photo counts" : `${same} photos count`;
  const detail = `${photos} as the same product: cosine ${limit} or more.`;
  return { kind: "Match", title: label, detail };
}

function say({ kind = "", title, detail = "", action, status = "" }) {
  $("kind").textContent = kind;
  $("title").textContent = title;
  $("detail").textContent = detail;
  $("act").hidden = !action;
  if (action) [$("act").textContent, $("act").onclick] = action;
  $("status").textContent = status;
}

/** Show groups of cards: [heading, cards, class]. */
function showGroups(groups) {
  const sections = groups
    .filter(([, cards]) => cards.length)
    .map(([heading, cards, name = ""], number) => {
      const section = $("group").content.cloneNode(true).firstElementChild;
      const title = section.querySelector("h2");
      section.className = name;
      title.textContent = heading;
      title.hidden = !heading;
      title.id = `group-${number}`;
      section.setAttribute("aria-labelledby", title.id);
      section.querySelector("ul").append(...cards);
      return section;
    });
  $("groups").replaceChildren(...sections);
}

function blankCard() {
  const item = $("neighbour").content.cloneNode(true).firstElementChild;
  item.replaceChildren(item.querySelector(".frame"));
  item.querySelector("img").remove();
  return item;
}

function card({ id, label, cosine, columns }) {
  const item = $("neighbour").content.cloneNode(true).firstElementChild;
  const link = item.querySelector("a");
  const image = item.querySelector("img");
  link.href = `?photo=${encodeURIComponent(id)}`;
  link.onclick = (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a tab or window of its own
    event.preventDefault();
    move(image, () => go({ photo: id, label }));
  };
  image.onerror = () => item.classList.add("missing");
  picture(image, id);
  item.querySelector(".label").textContent = label || "No label";
  item.querySelector(".cosine span:last-child").textContent = cosine.toFixed(3);
  const values = Object.entries(columns ?? {}).map(([name, value]) => `${name} ${value}`);
  item.querySelector(".columns").textContent = values.join(" · ");
  return item;
}

/** Let a neighbour's photo become the query's, where motion is welcome. */
function move(image, change) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (still || !document.startViewTransition) return change();
  image.style.viewTransitionName = "query";
  document.startViewTransition(() => {
    image.style.viewTransitionName = "";
    $("shown").style.viewTransitionName = "query";
    change();
  }).finished.finally(() => ($("shown").style.viewTransitionName = ""));
}

function about({ version, photos = info.photos }) {
  const count = photos?.toLocaleString("en");
  $("about").textContent = `Version ${version}` + (count ? ` · ${count} photos` : "");
}

// What a person does

/** Go on to a query, so that the back button returns to the one before. */
function go(query) {
  history.pushState(query, "", query?.photo ? `?photo=${encodeURIComponent(query.photo)}` : "./");
  scrollTo(0, 0);
  show(query);
}

function take([file], name = file?.name) {
  $("trouble").textContent = file ? "" : "That is no picture file.";
  if (file) go({ upload: uploads.push({ file, name }) - 1 });
}

for (const button of document.querySelectorAll("[data-input]")) {
  button.onclick = () => $(button.dataset.input).click();
}
for (const input of [$("file"), $("camera")]) {
  input.onchange = () => {
    take(input.files);
    input.value = ""; // so that the same file can be chosen again
  };
}

addEventListener("paste", (event) => {
  if (event.target.closest?.("input")) return;
  take(event.clipboardData.files, "Pasted picture");
});

addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  take(event.dataTransfer.files);
});

$("home").onclick = (event) => {
  event.preventDefault();
  go(null);
};
addEventListener("popstate", (event) => show(event.state));

// The start

async function start() {
  const photo = new URLSearchParams(location.search).get("photo");
  if (photo && !history.state) history.replaceState({ photo }, "");
  try {
    info = await (await ask("info")).json();
    about(info);
  } catch (error) {
    $("trouble").textContent = error.message;
  }
  show(history.state);
}

start();
