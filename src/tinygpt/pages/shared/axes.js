// From values to places on an axis, and the round numbers that are written beside it.

/** A linear axis: ticks that are round in the largest of ``parts`` that fits, about ``count`` of them. */
export function linear(low, high, from, to, count, parts = [1]) {
  const place = (value) => from + ((value - low) / (high - low)) * (to - from);
  const back = (at) => low + ((at - from) / (to - from)) * (high - low);
  const size = (high - low) / Math.max(count, 1);
  const part = parts.find((each) => each <= 2 * size) ?? parts.at(-1);
  const step = part * roundStep(size / part);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    ticks.push(Number((i * step).toPrecision(12)));
  }
  return { low, high, place, back, ticks };
}

/** A logarithmic axis: powers of ten, and 2 and 5 of each where there is room. */
export function logarithmic(low, high, from, to, count) {
  const [a, b] = [Math.log10(low), Math.log10(high)];
  const place = (value) => from + ((Math.log10(Math.max(value, low / 1e3)) - a) / (b - a)) * (to - from);
  const back = (at) => 10 ** (a + ((at - from) / (to - from)) * (b - a));
  let ticks = [];
  for (const digits of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 7]]) {
    const found = [];
    for (let power = Math.floor(a); power <= b; power++) {
      for (const digit of digits) {
        const tick = Number((digit * 10 ** power).toPrecision(3));
        if (tick >= low * 0.999 && tick <= high * 1.001) found.push(tick);
      }
    }
    if (!ticks.length || found.length <= count) ticks = found;
  }
  const every = Math.ceil(ticks.length / Math.max(count, 1));
  return { low, high, place, back, ticks: ticks.filter((_, i) => i % every === 0) };
}

function roundStep(size) {
  if (!(size > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(size));
  return power * ([1, 2, 2.5, 5, 10].find((factor) => factor * power >= size * 0.999) ?? 10);
}

/** Lowest and highest of many numbers, with a little air; never empty. */
export function extent(values, log) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value === null || (log && value <= 0)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return log ? [0.1, 10] : [0, 1];
  if (log) return low === high ? [low / 2, high * 2] : [low / 1.06, high * 1.06];
  const air = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
  return [low >= 0 && low - air < 0 ? 0 : low - air, high + air];
}

/** The values, with null for those further outside the middle 96 % than 1.5 times its width. */
export function usual(values) {
  const sorted = values.filter((value) => value !== null).sort((a, b) => a - b);
  if (sorted.length < 20) return values;
  const [low, high] = [0.02, 0.98].map((share) => sorted[Math.round((sorted.length - 1) * share)]);
  const air = 1.5 * (high - low) || Infinity;
  return values.map((value) => (value === null || value < low - air || value > high + air ? null : value));
}
