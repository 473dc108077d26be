// The page's second thread: it owns the model, so that the page never freezes, and answers what a
// server would, in the same JSON.
//
// In:  {start: {module, config, tokenizer, chat, shaders}}, {chunk, bytes} of the weights, {loaded: true},
//      then {id, path, body} for what is asked, and {cancel: id}
// Out: {ready: where it runs}, then {id, event} for each part of an answer, {id, done: true};
//      {id, error} where something failed

import { Conversation } from "./conversation.mjs";
import { Model, Wasm } from "./forward.mjs";
import { distribution, draw, largest, randomStream, softmax } from "./sampling.mjs";
import { TextStream, makeTokenizer } from "./tokenizer.mjs";
import { choose } from "./webgpu.mjs";

const PAUSE = 16; // milliseconds of writing before messages are looked at
const MOST = 8192; // tokens of a prompt: the end of a longer text is taken

let wasm, given, model, tokenizer, conversation;
const cancelled = new Set(); // ids

// ---- what can be asked ----

const answers = {
  async *tokens({ text }) {
    yield { tokens: encode(text).map(piece) };
  },

  async *conversation({ messages, max_tokens }) {
    const { ids, left_out, too_long } = conversation.ask(messages, max_tokens);
    const { stop, stop_ids } = conversation;
    yield { tokens: ids.slice(-MOST).map(piece), remark: remark(left_out, too_long), stop, stop_ids };
  },

  async *generate({ ids = [], text = "", max_tokens, seed, stop = [], stop_ids = [], ignore_eos, ...settings }, isCancelled) {
    const ends = new Set([...tokenizer.ends, ...stop_ids]);
    const cut = encode(text);
    const all = prompt(ids, cut);
    yield { prompt: cut.map(piece) };
    const [random, decoder, waiting] = [randomStream(seed), new TextStream(tokenizer), []];
    const ready = (end) => {
      const behind = waiting.findIndex(({ begins }) => begins >= end);
      return waiting.splice(0, behind < 0 ? waiting.length : behind).map(({ token }) => token);
    };
    let [written, reason, last] = ["", "length", 0];
    for (let count = 0; count < max_tokens && !isCancelled(); count++) {
      const scores = await logits(all);
      const id = draw(distribution(scores, settings, all), random());
      if (ends.has(id) && !ignore_eos) {
        reason = "stop";
        break;
      }
      all.push(id);
      const logprob = Math.max(Math.log(softmax(scores)[id]), -9999);
      waiting.push({ begins: written.length, token: { ...piece(id), logprob } });
      written += decoder.push(id);
      const [end, isStop] = beforeStop(written, stop);
      if (isStop) {
        yield { tokens: ready(end) };
        return yield { finish_reason: "stop" };
      }
      if (count && performance.now() - last < PAUSE) continue;
      const tokens = ready(end);
      if (tokens.length) yield { tokens };
      await pause();
      last = performance.now();
    }
    yield { tokens: ready(Infinity) };
    yield { finish_reason: reason };
  },

  async *candidates({ ids = [], text = "", token = null, count = 10, ...settings }) {
    const all = prompt(ids, encode(text));
    const scores = await logits(all);
    const [own, sampled] = [softmax(scores), distribution(scores, settings, all)];
    const shown = (id) => ({ ...piece(id), probability: own[id], sampled: sampled[id] });
    const rank = () => 1 + own.filter((p) => p > own[token]).length;
    yield {
      candidates: largest(own, count).map(shown),
      chosen: token === null ? null : { ...shown(token), rank: rank() },
      kept: sampled.filter((p) => p > 0).length,
      vocabulary: own.length,
    };
  },
};

function remark(left, tooLong) {
  if (tooLong) return "This question is longer than the model's window: it sees only the end.";
  return left ? `The window is full: messages that have left it, the oldest first: ${left}.` : "";
}

// Where a text ends that a stop string may yet claim, or has claimed: [length, whether it has].
function beforeStop(text, stops) {
  const found = stops.map((stop) => text.indexOf(stop, text.length - stop.length - 999)).filter((at) => at >= 0);
  if (found.length) return [Math.min(...found), true];
  const longest = Math.max(0, ...stops.map((stop) => stop.length));
  for (let at = Math.max(0, text.length - longest); at < text.length; at++) {
    if (stops.some((stop) => stop.startsWith(text.slice(at)))) return [at, false];
  }
  return [text.length + 1, false];
}

// The last ids of a text, from a whole character on.
function encode(text) {
  const ids = tokenizer.encode(text);
  if (ids.length <= MOST) return ids;
  const end = ids.slice(-MOST);
  return end.slice(end.findIndex((id) => (tokenizer.bytes(id)[0] & 0xc0) !== 0x80));
}

function prompt(ids, cut) {
  const all = [...ids, ...cut].slice(-MOST);
  if (!all.length) throw new Error("Write something for the model to go on from.");
  return all;
}

// A vocabulary may be padded to a round number of rows; these are no tokens.
const logits = async (ids) => (await model.logits(ids)).subarray(0, tokenizer.size);

function piece(id) {
  const bytes = tokenizer.bytes(id);
  return { id, bytes: Array.from(bytes), text: new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes) };
}

// ---- starting, and messages ----

// Lets messages in. A timer would wait four milliseconds.
const pause = () =>
  new Promise((resolve) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => {
      channel.port1.close();
      resolve();
    };
    channel.port2.postMessage(0);
  });

async function start(message) {
  given = message;
  wasm = await Wasm.load(given.module, given.config);
  warmUp();
}

async function finishLoading() {
  const [runner, where] = await choose(wasm, given.shaders);
  model = new Model(runner, given.config);
  tokenizer = makeTokenizer(given.tokenizer);
  conversation = new Conversation(given.chat, tokenizer, given.config.block_size);
  postMessage({ ready: where });
}

async function answer({ id, path, body }) {
  const isCancelled = () => cancelled.has(id);
  if (isCancelled()) return;
  for await (const event of answers[path](body, isCancelled)) postMessage({ id, event });
  cancelled.delete(id);
  postMessage({ id, done: true });
}

// A browser compiles a module quickly at first, and well only what has run for a while: the first
// tokens would be the slow ones. So the model runs while nothing else is asked for, even before its
// weights are there, and its results are not used: nothing of it is in the model's list of what is cached.
const WARM = 400; // milliseconds of it
const SLICE = 5; // at a time, then messages are let in
const HEAVY = 25; // a model that takes so long for one token is better off when nothing is in its way

async function warmUp() {
  const positions = given.config.block_size;
  for (let spent = 0, position = 0; spent < WARM; ) {
    const known = arrived;
    await pause();
    await turn;
    if (asked) return;
    if (arrived !== known) continue; // there may be more of them
    const began = performance.now();
    let taken = 0;
    for (; taken < SLICE; taken = performance.now() - began) wasm.step(position++ % positions);
    if (taken > HEAVY) return;
    spent += taken;
  }
}

// One message after another, in the order in which they came; only a cancellation does not wait.
let turn = Promise.resolve();
let arrived = 0; // messages
let asked = false; // whether anything but the start has been
self.onmessage = ({ data }) => {
  arrived++;
  if (data.cancel) return cancelled.add(data.cancel);
  asked ||= Boolean(data.path);
  turn = turn
    .then(() => {
      if (data.start) return start(data.start);
      if (data.chunk) return wasm.put(data.chunk, data.bytes);
      return data.loaded ? finishLoading() : answer(data);
    })
    .catch((error) => postMessage({ id: data.id, error: error.message }));
};
