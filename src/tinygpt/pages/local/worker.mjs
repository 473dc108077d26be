// The page's second thread: it owns the model, so that the page never freezes.
//
// In:  start {module, config, tokenizer, shaders}, weights {chunk, bytes}, loaded,
//      generate {text, options}, branch {index, id, options}, stop, tokens {text},
//      candidates {index}
// Out: ready {where}, branched {text}, written {drop, text}, done {count, ended, seconds, error},
//      tokens {tokens}, candidates {index, chosen, list}

import { Model, Wasm } from './model.mjs';
import { likeliest, randomStream, sample } from './sampling.mjs';
import { TextStream, makeTokenizer } from './tokenizer.mjs';
import { choose } from './webgpu.mjs';

const PAUSE = 16; // milliseconds of writing before messages are looked at
const CANDIDATES = 12;

class Writer {
  constructor(model, tokenizer, post) {
    this.model = model;
    this.tokenizer = tokenizer;
    this.post = post;
    this.text = '';
    this.ids = []; // what `text` consists of: text that was written keeps the ids it was written in
    this.stopped = false;
  }

  async generate({ text, options }) {
    this.take(text);
    if (!this.ids.length) throw new Error('Write something for the model to go on from.');
    this.stopped = false;
    const random = randomStream(options.seed);
    const stream = new TextStream(this.tokenizer);
    const whole = this.ids.map((id) => stream.push(id)).join('');
    let drop = this.text.length - whole.length; // U+FFFD for the beginning of a character
    let added = '';
    const tell = () => {
      if (added || drop) this.post({ type: 'written', drop, text: added });
      this.text = this.text.slice(0, this.text.length - drop) + added;
      [drop, added] = [0, ''];
    };
    const began = performance.now();
    let count = 0;
    let ended = false;
    for (let last = began; count < options.count && !this.stopped; count++) {
      const id = sample(await this.logits(this.ids), options, random);
      ended = this.tokenizer.ends.has(id) && !options.ignoreEos;
      if (ended) break;
      this.ids.push(id);
      added += stream.push(id);
      if (count && performance.now() - last < PAUSE) continue;
      tell();
      await pause();
      last = performance.now();
    }
    added += stream.flush();
    tell();
    this.post({ type: 'done', count, ended, seconds: (performance.now() - began) / 1000 });
  }

  // Go on from another token at a place that `candidates` was asked for.
  async branch({ index, id, options }) {
    this.ids = [...this.ids.slice(0, index), id];
    const stream = new TextStream(this.tokenizer);
    this.text = this.ids.map((each) => stream.push(each)).join('') + stream.flush();
    this.post({ type: 'branched', text: this.text });
    await this.generate({ text: this.text, options });
  }

  tokens({ text }) {
    this.take(text);
    this.post({ type: 'tokens', tokens: this.ids.map((id) => this.token(id)) });
  }

  // What might have stood in the place of a token.
  async candidates({ index }) {
    const logits = await this.logits(this.ids.slice(0, index));
    const list = likeliest(logits, CANDIDATES).map(([id, p]) => ({ id, p, text: this.token(id) }));
    this.post({ type: 'candidates', index, chosen: this.ids[index], list });
  }

  take(text) {
    if (text === this.text) return;
    this.ids = this.tokenizer.encode(text);
    this.text = text;
  }

  // A vocabulary may be padded to a round number of rows; these are no tokens.
  async logits(ids) {
    return (await this.model.logits(ids)).subarray(0, this.tokenizer.size);
  }

  // The text of one token, or its bytes where they are no whole characters.
  token(id) {
    const bytes = this.tokenizer.bytes(id);
    try {
      return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
    } catch {
      return Array.from(bytes, (b) => `\\x${b.toString(16).padStart(2, '0')}`).join('');
    }
  }
}

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

let wasm, given, writer;

const heard = {
  async start(message) {
    given = message;
    wasm = await Wasm.load(given.module, given.config);
    warmUp();
  },
  weights: ({ chunk, bytes }) => wasm.put(chunk, bytes),
  async loaded() {
    const [runner, where] = await choose(wasm, given.shaders);
    const post = postMessage.bind(self);
    writer = new Writer(new Model(runner, given.config), makeTokenizer(given.tokenizer), post);
    post({ type: 'ready', where });
  },
  stop: () => (writer.stopped = true),
  generate: (message) => writer.generate(message),
  branch: (message) => writer.branch(message),
  tokens: (message) => writer.tokens(message),
  candidates: (message) => writer.candidates(message),
};

// A browser compiles a module quickly at first, and well only what has run for a while: the first
// tokens would be the slow ones. So the model runs for nobody while there is nothing else to do, even
// before its weights are there, until somebody wants something. That leaves no trace: no one takes
// what is in its cache for known.
const WARM = 400; // milliseconds of it
const SLICE = 5; // at a time, then messages are let in
const HEAVY = 25; // a model that takes so long for one token is better off when nothing is in its way

async function warmUp() {
  const positions = given.config.block_size;
  for (let spent = 0, position = 0; spent < WARM; ) {
    const known = arrived;
    await pause();
    await turn;
    if (wanted) return;
    if (arrived !== known) continue; // there may be more of them
    const began = performance.now();
    let taken = 0;
    for (; taken < SLICE; taken = performance.now() - began) wasm.step(position++ % positions);
    if (taken > HEAVY) return;
    spent += taken;
  }
}

// One thing after another, in the order in which they came; only a stop does not wait.
let turn = Promise.resolve();
let arrived = 0; // messages
let wanted = false; // has anybody asked for anything?
self.onmessage = ({ data }) => {
  arrived++;
  wanted ||= !['start', 'weights', 'loaded'].includes(data.type);
  if (data.type === 'stop') return heard.stop();
  turn = turn
    .then(() => heard[data.type](data))
    .catch((error) => postMessage({ type: 'done', count: 0, seconds: 0, error: error.message }));
};
