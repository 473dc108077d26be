// One forward pass at a time: decides which of the two functions of a module is called. step(position)
// adds one token to the cache of keys and values, window(last) fills the whole cache at once.

export class Model {
  // runner: {ids, out, step, window}, such as a WASM module or a graphics card; its functions may
  // return promises. config: {block_size}, more is not read.
  constructor(runner, config) {
    this.runner = runner;
    this.T = config.block_size;
    this.cached = []; // the ids whose keys and values are in the cache
  }

  // The logits of what follows the last of the ids. They stand until the next call.
  //
  // Beyond T only the last T ids count. They then stand at other positions than before, so nothing
  // that is cached holds any longer: each further token costs a whole window.
  async logits(ids) {
    const { runner } = this;
    const window = ids.slice(-this.T);
    const last = window.length - 1;
    let known = 0;
    while (known < last && this.cached[known] === window[known]) known++;
    if (window.length - known > Math.max(4, this.T / 4)) {
      this.cached = [];
      runner.ids.fill(0).set(window);
      await runner.window(last); // which leaves nothing behind the last one
      this.cached = window;
      return runner.out;
    }
    const same = known === last && this.cached[last] === window[last];
    if (!same) this.cached = this.cached.slice(0, known); // what was behind holds no longer
    for (let position = known; position <= last; position++) {
      runner.ids[0] = window[position];
      await runner.step(position);
    }
    if (!same) this.cached = window;
    return runner.out;
  }
}

// A WebAssembly module made of TinyGPT's own kernels.
export class Wasm {
  static async load(bytes, config) {
    const { instance } = await WebAssembly.instantiate(bytes, {});
    return new Wasm(instance.exports, config);
  }

  constructor(module, { block_size, vocab_size }) {
    this.module = module;
    this.memory = module.memory.buffer;
    this.ids = new Int32Array(this.memory, module.ids(), block_size);
    this.out = new Float32Array(this.memory, module.logits(), vocab_size);
    this.step = module.step;
    this.window = module.window;
  }

  // Put a chunk of weights in its place.
  put({ kind, at, columns }, bytes) {
    const counts = {
      float32: () => bytes.length / 4,
      float16: () => bytes.length / 2,
      int8: () => columns * (bytes.length / (columns + 4)),
    };
    const start = this.module.weights() + 4 * at;
    unpack[kind](new Float32Array(this.memory, start, counts[kind]()), bytes, columns);
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
  // The scales of all rows come first.
  int8(out, bytes, columns) {
    const rows = out.length / columns;
    const scales = new Float32Array(bytes.buffer, bytes.byteOffset, rows);
    const numbers = new Int8Array(bytes.buffer, bytes.byteOffset + 4 * rows, out.length);
    for (let row = 0, i = 0; row < rows; row++) {
      for (const end = i + columns; i < end; i++) out[i] = numbers[i] * scales[row];
    }
  },
};

const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * (1 + fraction / 1024) * 2 ** (exponent - 15) : sign * fraction * 2 ** -24;
});
