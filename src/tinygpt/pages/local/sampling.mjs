// From logits to the next token: the same filters in the same order as in TinyGPT's sample.py.

// The probabilities (V,) that a token is drawn from; 0 for those that a filter leaves out.
// settings: {temperature, top_k, top_p, min_p, repetition_penalty}, null for none; ids: those so far.
export function distribution(logits, settings, ids = []) {
  const { temperature = 1, top_k, top_p, min_p, repetition_penalty: penalty } = settings;
  const scores = penalty ? new Float64Array(logits) : logits;
  if (penalty) {
    for (const id of new Set(ids)) scores[id] *= scores[id] > 0 ? 1 / penalty : penalty;
  }
  const best = argmax(scores);
  if (!(temperature > 0)) return new Float64Array(scores.length).fill(1, best, best + 1);
  const weights = softmax(scores, temperature);
  if (!top_k && !min_p && (top_p ?? 1) >= 1) return weights;
  keepLargest(weights, top_k ?? weights.length, top_p ?? 1);
  const least = (min_p ?? 0) * weights[best];
  let total = 0;
  for (let i = 0; i < weights.length; i++) total += weights[i] = weights[i] < least ? 0 : weights[i];
  for (let i = 0; i < weights.length; i++) weights[i] /= total;
  return weights;
}

// The token that a number from [0, 1) picks.
export function draw(probabilities, uniform) {
  let [left, last] = [uniform, 0];
  for (let id = 0; id < probabilities.length; id++) {
    if (probabilities[id] > 0) last = id;
    if ((left -= probabilities[id]) < 0) return id;
  }
  return last; // the sum fell short of 1 by rounding
}

// Probabilities (V,) of logits (V,).
export function softmax(logits, temperature = 1) {
  const largest = logits[argmax(logits)];
  const weights = new Float64Array(logits.length); // Float64Array.from takes five to eight times as long
  let total = 0;
  for (let i = 0; i < weights.length; i++) {
    total += weights[i] = Math.exp((logits[i] - largest) / temperature);
  }
  for (let i = 0; i < weights.length; i++) weights[i] /= total;
  return weights;
}

// Ids of the `count` largest values, the largest first; of equals the lower id first.
export function largest(values, count) {
  const least = values.slice().sort()[Math.max(values.length - count, 0)];
  const ids = Array.from(values.keys()).filter((id) => values[id] >= least);
  return ids.sort((a, b) => values[b] - values[a] || a - b).slice(0, count);
}

// Top-k, then top-p: sets the weights that they leave out to 0; of equals the lower ids stay.
function keepLargest(weights, top_k, top_p) {
  const n = weights.length;
  let count = Math.min(top_k, n);
  if (count === n && top_p >= 1) return;
  const ascending = weights.slice().sort();
  if (top_p < 1) {
    let [sum, enough, taken] = [0, 0, 0];
    for (let i = n - count; i < n; i++) enough += top_p * ascending[i];
    while (taken < count && sum < enough) sum += ascending[n - ++taken];
    count = taken;
  }
  const least = ascending[n - count];
  let spare = count;
  for (let id = 0; id < n; id++) if (weights[id] > least) spare--;
  for (let id = 0; id < n; id++) {
    if (weights[id] < least || (weights[id] === least && spare-- <= 0)) weights[id] = 0;
  }
}

export function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

// A stream of numbers from [0, 1) that a seed decides: sfc32, seeded by splitmix32.
export function randomStream(seed) {
  let state = seed >>> 0;
  const next = () => {
    state = (state + 0x9e3779b9) | 0;
    let z = Math.imul(state ^ (state >>> 16), 0x21f0aaad);
    z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
    return (z ^ (z >>> 15)) | 0;
  };
  let [a, b, c, d] = [next(), next(), next(), 1];
  const drawn = () => {
    const t = (a + b + d) | 0;
    d = (d + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = ((c << 21) | (c >>> 11)) + t | 0;
    return (t >>> 0) / 4294967296;
  };
  for (let i = 0; i < 12; i++) drawn();
  return drawn;
}
