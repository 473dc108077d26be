// From logits to the next token: the same filters in the same order as in TinyGPT's sample.py.

// options: {temperature, topK, topP}; random: () => a number from [0, 1).
export function sample(logits, { temperature = 1, topK = 0, topP = 1 }, random) {
  if (!(temperature > 0)) return argmax(logits);
  const weights = exponentials(logits, temperature);
  const ids = keep(weights, topK, topP);
  let left = random() * ids.reduce((sum, id) => sum + weights[id], 0);
  for (const id of ids) if ((left -= weights[id]) < 0) return id;
  return ids[ids.length - 1];
}

// The likeliest tokens and their probabilities, [[id, probability], ...].
export function likeliest(logits, count) {
  const weights = exponentials(logits, 1);
  const total = weights.reduce((sum, w) => sum + w, 0);
  const ids = keep(weights, count, 1).sort((a, b) => weights[b] - weights[a] || a - b);
  return ids.map((id) => [id, weights[id] / total]);
}

function exponentials(logits, temperature) {
  const largest = logits[argmax(logits)];
  const weights = new Float64Array(logits.length); // `from` takes five to eight times as long
  for (let i = 0; i < weights.length; i++) weights[i] = Math.exp((logits[i] - largest) / temperature);
  return weights;
}

// The ids that top-k and then top-p leave, ascending; of equals the lower ones.
function keep(weights, topK, topP) {
  const n = weights.length;
  let count = Math.min(topK || n, n);
  if (count === n && topP >= 1) return Array.from(weights.keys());
  const ascending = weights.slice().sort();
  if (topP < 1) {
    const largest = ascending.subarray(n - count).reverse();
    const enough = topP * largest.reduce((sum, w) => sum + w, 0);
    let sum = 0;
    count = largest.findIndex((w) => (sum += w) >= enough) + 1 || count;
    largest.reverse();
  }
  const least = ascending[n - count];
  const ids = [];
  let spare = count;
  for (const w of weights) if (w > least) spare--;
  weights.forEach((w, id) => {
    if (w > least || (w === least && spare-- > 0)) ids.push(id);
  });
  return ids;
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
  const draw = () => {
    const t = (a + b + d) | 0;
    d = (d + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = ((c << 21) | (c >>> 11)) + t | 0;
    return (t >>> 0) / 4294967296;
  };
  for (let i = 0; i < 12; i++) draw();
  return draw;
}
