// Not part of a page: runs a page's model in node, for the comparison that each export begins with.
// stdin: {module, weights, out, config, chunks: [{kind, at, columns, from, to}], prompt, count}, the
// first three of them files. The logits of every prompt position, then of the last one by the other
// function, go to the file `out` as float32, the greedy ids to stdout.

import fs from 'node:fs';
import { Model, Wasm } from "./forward.mjs";
import { argmax } from './sampling.mjs';

const given = JSON.parse(fs.readFileSync(0, 'utf8'));
const wasm = await Wasm.load(fs.readFileSync(given.module), given.config);
const model = new Model(wasm, given.config);
const weights = fs.openSync(given.weights, 'r');
for (const chunk of given.chunks) {
  const bytes = new Uint8Array(chunk.to - chunk.from);
  fs.readSync(weights, bytes, 0, bytes.length, chunk.from);
  wasm.put(chunk, bytes);
}
const out = fs.openSync(given.out, 'w');
const write = (logits) => fs.writeSync(out, new Uint8Array(logits.slice().buffer));
for (let n = 1; n <= given.prompt.length; n++) {
  write(await model.logits(given.prompt.slice(0, n)));
}
model.cached = [];
wasm.ids.fill(0).set(given.prompt);
wasm.window(given.prompt.length - 1);
write(wasm.out);
fs.closeSync(out);

const ids = given.prompt.slice();
for (let i = 0; i < given.count; i++) ids.push(argmax(await model.logits(ids)));
console.log(JSON.stringify(ids));
