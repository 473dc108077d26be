// The curves of one run in at most MOST points each. The server begins them, new rows go on.

export const MOST = 1024;
const RANGES = ["train_loss", "grad_norm", "tokens_per_second"];
const PLAIN = ["lr", "memory", "elapsed"];
const MOST_LAYERS = 256;

/** Numbers in buckets of ``stride`` rows: their mean, and where asked for the lowest and highest. */
class Buckets {
  constructor(stride, most, { mean, low, high }) {
    Object.assign(this, { stride, most, mean, low, high });
    this.inLast = 0; // values that the last bucket has
  }

  /** Take in row number ``row``. */
  add(row, value) {
    const bucket = Math.floor(row / this.stride);
    if (bucket >= this.mean.length) {
      this.mean.push(null);
      this.low?.push(null);
      this.high?.push(null);
      this.inLast = 0;
    }
    if (value === null) return;
    const before = this.mean[bucket];
    const n = before === null ? 0 : this.inLast || row % this.stride;
    this.mean[bucket] = n ? (before * n + value) / (n + 1) : value;
    this.inLast = n + 1;
    if (!this.low) return;
    this.low[bucket] = least(this.low[bucket], value);
    this.high[bucket] = greatest(this.high[bucket], value);
  }

  /** Twice the stride in half the buckets; ``rows`` there are in all. */
  halve(rows) {
    const last = rows % this.stride || this.stride;
    const size = (i) => (i === this.mean.length - 1 ? last : this.stride);
    this.mean = pairs(this.mean, (a, b, i) => weighted(a, size(i), b, size(i + 1)));
    if (this.low) this.low = pairs(this.low, least);
    if (this.high) this.high = pairs(this.high, greatest);
    this.stride *= 2;
    this.inLast = 0;
  }
}

/** All that is known of one run's curves. */
export class Series {
  constructor(answer) {
    this.rows = answer.rows;
    this.mark = answer.mark;
    this.first = answer.first;
    this.x = new Buckets(answer.stride, MOST, { mean: answer.x });
    this.curves = { x: this.x };
    for (const key of [...RANGES, ...PLAIN]) {
      this.curves[key] = new Buckets(answer.stride, MOST, answer[key]);
    }
    this.validation = answer.val_loss;
    this.skipped = answer.skipped;
    const { stride, x, names, norms } = answer.layers;
    this.layerX = new Buckets(stride, MOST_LAYERS, { mean: x });
    this.layers = new Map(
      names.map((name, i) => [name, new Buckets(stride, MOST_LAYERS, { mean: norms[i] })]),
    );
  }

  get stride() {
    return this.x.stride;
  }

  /** Rows from number ``from`` on, column by column; false if some between are missing. */
  append(from, added, mark, total) {
    const known = this.rows - from;
    if (known < 0 || Object.keys(added.layers).some((name) => !this.layers.has(name))) return false;
    const end = added.iter.length;
    for (let i = known; i < end; i++) this.#row(added, i);
    for (const mark of added.skipped) {
      if (!this.skipped.some(([step]) => step === mark[0])) this.skipped.push(mark);
    }
    this.mark = mark;
    return this.rows === total;
  }

  #row(added, i) {
    this.x.add(this.rows, added.iter[i]);
    for (const key of [...RANGES, ...PLAIN]) this.curves[key].add(this.rows, added[key][i]);
    if (added.val_loss[i] !== null) {
      this.validation.x.push(added.iter[i]);
      this.validation.y.push(added.val_loss[i]);
    }
    this.layerX.add(this.rows, added.iter[i]);
    for (const [name, norms] of this.layers) {
      norms.add(this.rows, added.layers[name]?.[i] ?? null);
    }
    this.rows += 1;
    for (const group of [Object.values(this.curves), [this.layerX, ...this.layers.values()]]) {
      if (group[0].mean.length > group[0].most) group.forEach((b) => b.halve(this.rows));
    }
  }
}

/** A moving average that looks both ways, and so does not lag behind; gaps stay gaps. */
export function smooth(values) {
  const weight = Math.min(1 - 1 / Math.max(values.length / 60, 1), 0.97);
  const there = sums(values, weight);
  const back = sums([...values].reverse(), weight).reverse();
  return values.map((value, i) =>
    value === null ? null : (there[i][0] + back[i][0]) / (there[i][1] + back[i][1]));
}

/** Weighted sums of each value and those before it, and what they would be of ones. */
function sums(values, weight) {
  let [sum, total] = [0, 0];
  return values.map((value) => {
    if (value !== null) {
      sum = weight * sum + (1 - weight) * value;
      total = weight * total + (1 - weight);
    }
    return [sum, total];
  });
}

/** Index of the number nearest to ``x`` in a rising list. */
export function nearest(xs, x) {
  let [low, high] = [0, xs.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}

function pairs(values, join) {
  const joined = [];
  for (let i = 0; i < values.length; i += 2) {
    joined.push(i + 1 < values.length ? join(values[i], values[i + 1], i) : values[i]);
  }
  return joined;
}

function weighted(a, n, b, m) {
  if (a === null || b === null) return a ?? b;
  return (a * n + b * m) / (n + m);
}

const least = (a, b) => (a === null || b === null ? (a ?? b) : Math.min(a, b));
const greatest = (a, b) => (a === null || b === null ? (a ?? b) : Math.max(a, b));
