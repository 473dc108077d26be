// Talking to the server the page came from, and to nobody else.

import { h, modal } from "./dom.js";
import { store, stored } from "./storage.js";

const KEY = "tinygpt-key";
let memory = ""; // the key, where nothing can be stored

/** What the server, or the way to it, had to say against a request. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** POST some JSON; -> the answer's JSON. Asks for the key where the server wants one. */
export const post = async (path, body, signal) => (await send(path, body, signal)).json();

/** POST some JSON; yields the objects of a stream of server-sent events. */
export async function* events(path, body, signal) {
  for await (const data of eventData(await send(path, body, signal), signal)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message);
    yield event;
  }
  throw new ApiError("The answer broke off before its end.");
}

/** The data of the server-sent events of a response; ``onHeard()`` for all that comes, comments too. */
export async function* eventData(response, signal, onHeard = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw signal?.aborted ? error : new ApiError("The connection to the server was lost.");
    });
    if (done) return;
    onHeard();
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (data !== undefined) yield data;
    }
  }
}

/** The JSON at a path. */
export const get = async (path) => (await request(path)).json();

const send = (path, body, signal) => request(path, {
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
});

/** A request with the key, if there is one; only what went well is returned. */
export async function request(path, options = {}) {
  for (;;) {
    const key = storedKey();
    const headers = { ...options.headers };
    if (key) headers.Authorization = `Bearer ${key}`;
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      throw options.signal?.aborted ? error : new ApiError("The server cannot be reached. Is it running?");
    });
    if (response.ok) return response;
    const problem = await explain(response);
    if (response.status !== 401 || !(await askForKey(key))) throw problem;
  }
}

async function explain(response) {
  const told = await response.json().catch(() => null);
  const message = told?.error?.message ?? `The server answered ${response.status}.`;
  return new ApiError(message, response.status);
}

const storedKey = () => stored(KEY) ?? memory;

/** Send this key with every request from now on, in this tab. */
function keepKey(key) {
  memory = key;
  store(KEY, key);
}

/** A key behind the # of the address, which browsers send to nobody, goes into the tab's storage. */
function takeKey() {
  const key = new URLSearchParams(location.hash.slice(1)).get("key");
  if (key) keepKey(key);
  if (key) history.replaceState(null, "", location.pathname + location.search);
  return Boolean(key);
}

takeKey();
window.addEventListener("hashchange", () => takeKey() && location.reload()); // a new link, the same tab

let asking = null;

/** Ask for the server's key, once for all requests that wait for it; -> whether one was given. */
function askForKey(refused) {
  if (storedKey() !== refused) return true; // another request has asked meanwhile
  asking ??= dialog(refused !== "").then((key) => {
    asking = null;
    if (key) keepKey(key);
    return Boolean(key);
  });
  return asking;
}

async function dialog(again) {
  const input = h("input", { type: "password", id: "key", autocomplete: "off", required: true });
  const given = await modal({ "aria-labelledby": "key-title" },
    h("h2", { id: "key-title" }, "This server wants a key"),
    h("p", {}, again ? "That key was not the right one." : "It stands in the terminal of the server, behind #key= or as it was set there."),
    h("label", { for: "key" }, "Key"),
    input,
    h("p", { class: "hint" }, "It is kept in this tab, until you close it."),
    h("div", { class: "row" },
      h("button", { value: "key", class: "primary" }, "Continue"),
      h("button", { formnovalidate: true }, "Cancel")));
  return given && input.value.trim();
}
