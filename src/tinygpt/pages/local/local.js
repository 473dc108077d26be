// The model in this file: a worker runs it, and answers what a server would (see ../playground/remote.js).

import { byId } from "../shared/dom.js";

const about = JSON.parse(byId("about").textContent);
const listeners = new Map(); // by id of a question
let asked = 0;
let worker = null; // until the page starts

/** The answer to a question, part by part. */
async function* ask(path, body, signal) {
  const id = ++asked;
  const parts = [];
  let wake = () => {};
  const hear = (part) => {
    if (part) parts.push(part);
    wake();
  };
  listeners.set(id, hear);
  signal?.addEventListener("abort", () => hear());
  worker.postMessage({ id, path, body });
  try {
    for (;;) {
      signal?.throwIfAborted();
      if (!parts.length) await new Promise((resolve) => (wake = resolve));
      for (const part of parts.splice(0)) {
        if (part.error) throw new Error(part.error);
        if (part.done) return;
        yield part.event;
      }
    }
  } finally {
    if (signal?.aborted) worker.postMessage({ cancel: id });
    listeners.delete(id);
  }
}

async function first(answer) {
  for await (const part of answer) return part;
}

export const local = {
  start,
  tokens: async (text, signal) => (await first(ask("tokens", { text }, signal))).tokens,
  conversation: (messages, max_tokens, signal) => first(ask("conversation", { messages, max_tokens }, signal)),
  generate: (prompt, settings, signal) => ask("generate", { ...prompt, ...settings }, signal),
  candidates: (prompt, wanted, signal) => first(ask("candidates", { ...prompt, ...wanted }, signal)),
  beginnings: async () => about.card.beginnings ?? [],
};

// ---- starting ----

const bytesOf = (base64) =>
  Uint8Array.fromBase64?.(base64) ?? Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

/** The bytes of an element that holds them compressed. */
function inflated(id) {
  const stream = new Blob([bytesOf(byId(id).textContent)]).stream();
  return new Response(stream.pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
}

/** Starts the worker and hands it the weights as they are read; -> the card. */
async function start() {
  const { config, tokenizer, chat, shaders, card, title, ...more } = about;
  const [code, module] = await Promise.all([inflated("worker"), inflated("module")]);
  worker = new Worker(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  worker.postMessage({ start: { module, config, tokenizer, chat, shaders } });
  const ready = new Promise((resolve, reject) => {
    worker.onmessage = ({ data }) => {
      if (data.ready) resolve(data.ready);
      else if (data.id) listeners.get(data.id)?.(data);
      else reject(new Error(data.error));
    };
    worker.onerror = ({ message }) => reject(new Error(message || "the browser starts no worker for this page."));
    takeWeights(reject);
  });
  const where = await ready;
  return {
    ...card,
    ...more,
    config,
    name: title,
    where,
    tokenizer: { kind: tokenizer.kind, vocab_size: config.vocab_size, ends: Boolean(tokenizer.ends) },
    limits: { max_tokens: 100_000, prompt_tokens: 8192 },
    can: {},
  };
}

/** Weights arrive as elements while the file is read; each goes to the worker and is removed. */
function takeWeights(reject) {
  let loaded = 0;
  const take = (element) => {
    const { kind, at, columns } = element.dataset;
    const bytes = bytesOf(element.textContent);
    const chunk = { kind, at: Number(at), columns: Number(columns) };
    worker.postMessage({ chunk, bytes }, [bytes.buffer]);
    element.remove();
    byId("progress").value = ++loaded / about.chunks;
    if (loaded === about.chunks) worker.postMessage({ loaded: true });
  };
  // An element may be seen before all of its text is there; it is whole once another one follows it.
  const takeWhole = () => {
    for (const element of document.querySelectorAll("script.weights")) {
      if (element.nextElementSibling || document.readyState !== "loading") take(element);
    }
  };
  const watching = new MutationObserver(takeWhole);
  watching.observe(document.body, { childList: true });
  const finish = () => {
    watching.disconnect();
    takeWhole();
    if (loaded !== about.chunks) {
      reject(new Error("this file is not whole: weights are missing at its end. Fetch it again."));
    }
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", finish);
  else finish();
}
