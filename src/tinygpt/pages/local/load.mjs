// Not part of a page: opens a finished page in node as a browser would, the weights included, starts
// its worker and lets it write a token. node load.mjs PAGE; prints what it wrote, as JSON.

import fs from 'node:fs';
import vm from 'node:vm';
import { Worker } from 'node:worker_threads';
import zlib from 'node:zlib';

const page = fs.readFileSync(process.argv[2]);
const DEADLINE = 120_000; // milliseconds until a worker that says nothing is given up

// The text of the first element that opens with `head`, from a place on.
function element(head, from = 0) {
  const start = page.indexOf(head, from);
  if (start < 0) throw new Error(`${head} is missing`);
  const content = page.indexOf('>', start) + 1;
  const end = page.indexOf('</script>', content);
  return { tag: page.toString('utf8', start, content), text: page.toString('utf8', content, end), end };
}

const about = JSON.parse(element('<script type="application/json" id="about"').text);
const inflated = (id) => zlib.inflateSync(Buffer.from(element(`<script type="text/plain" id="${id}"`).text, 'base64'));
const code = inflated('worker').toString();
const module = Uint8Array.from(inflated('module'));
for (let at = 0; page.indexOf('<script>', at) >= 0; ) {
  const script = element('<script>', at);
  new vm.Script(script.text); // what is seen needs a document, but must be JavaScript
  at = script.end;
}

const SHIM = `
const { parentPort } = require('node:worker_threads');
globalThis.self = globalThis;
globalThis.postMessage = (message) => parentPort.postMessage(message);
parentPort.on('message', (data) => self.onmessage({ data }));
`;
const worker = new Worker(SHIM + code, { eval: true });
const answered = new Promise((resolve, reject) => {
  worker.on('error', reject);
  setTimeout(() => reject(new Error('its worker does not answer')), DEADLINE).unref();
  let written = '';
  worker.on('message', (message) => {
    if (message.error) reject(new Error(message.error));
    else if (message.ready) {
      const text = about.tokenizer.kind === 'char' ? about.tokenizer.chars.slice(0, 1) : 'a';
      const body = { text, max_tokens: 1, temperature: 0, seed: 1, ignore_eos: true };
      worker.postMessage({ id: 1, path: 'generate', body });
    } else if (message.event) written += (message.event.tokens ?? []).map(({ text }) => text).join('');
    else if (message.done) resolve(written);
  });
});
const { config, tokenizer, chat } = about;
worker.postMessage({ start: { module, config, tokenizer, chat } });
let at = 0;
for (let i = 0; i < about.chunks; i++) {
  const { tag, text, end } = element('<script type="text/plain" class="weights"', at);
  const field = (name) => tag.match(new RegExp(`data-${name}="([^"]*)"`))[1];
  const chunk = { kind: field('kind'), at: Number(field('at')), columns: Number(field('columns')) };
  worker.postMessage({ chunk, bytes: Uint8Array.from(Buffer.from(text, 'base64')) });
  at = end;
}
worker.postMessage({ loaded: true });
console.log(JSON.stringify(await answered));
await worker.terminate();
