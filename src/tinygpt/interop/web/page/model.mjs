// The model: a WebAssembly module made of TinyGPT's own kernels, and what decides which of its two
// functions is called. step(position) adds one token to the cache of keys and values, window(last)
// fills all of it at once.

export class Model {
  // bytes: the module; config: {block_size, vocab_size}, more is not read.
  static async load(bytes, config) {
    const { instance } = await WebAssembly.instantiate(bytes, {});
    return new Model(instance.exports, config);
  }

  constructor(module, config) {
    this.module = module;
    this.T = config.block_size;
    this.V = config.vocab_size;
    this.cached = []; // the ids whose keys and values are in the cache
    this.ids = new Int32Array(module.memory.buffer, module.ids(), this.T);
    this.out = new Float32Array(module.memory.buffer, module.logits(), this.V);
  }

  // Put a chunk of weights in its place.
  put({ kind, at, columns }, bytes) {
    const start = this.module.weights() + 4 * at;
    const count = kind === 'float32' ? bytes.length / 4
      : kind === 'float16' ? bytes.length / 2
      : columns * (bytes.length / (columns + 4));
    unpack[kind](new Float32Array(this.module.memory.buffer, start, count), bytes, columns);
    this.cached = [];
  }

  // The logits of what follows the last of the ids. They stand until the next call.
  //
  // Beyond T only the last T ids count. They then stand at other positions than before, so nothing
  // that is cached holds any longer: each further token costs a whole window.
  logits(ids) {
    const window = ids.slice(-this.T);
    const last = window.length - 1;
    let known = 0;
    while (known < last && this.cached[known] === window[known]) known++;
    if (window.length - known > Math.max(4, this.T / 4)) {
      this.ids.fill(0).set(window);
      this.module.window(last); // which leaves nothing behind the last one
      this.cached = window;
      return this.out;
    }
    const same = this.cached[last] === window[last]; // then what is cached behind it still holds
    for (let position = known; position <= last; position++) {
      this.ids[0] = window[position];
      this.module.step(position);
    }
    if (!same || known < last) this.cached = window;
    return this.out;
  }
}

const unpack = {
  float32(out, bytes) {
    out.set(new Float32Array(bytes.buffer, bytes.byteOffset, out.length));
  },
  float16(out, bytes) {
    const halves = new Uint16Array(bytes.buffer, bytes.byteOffset, out.length);
    for (let i = 0; i < out.length; i++) out[i] = HALVES[halves[i]];
  },
  int8(out, bytes, columns) {
    const rows = out.length / columns;
    const scales = new Float32Array(bytes.buffer, bytes.byteOffset, rows);
    const numbers = new Int8Array(bytes.buffer, bytes.byteOffset + 4 * rows, out.length);
    for (let i = 0; i < out.length; i++) out[i] = numbers[i] * scales[(i / columns) | 0];
  },
};

const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * (1 + fraction / 1024) * 2 ** (exponent - 15) : sign * fraction * 2 ** -24;
});
