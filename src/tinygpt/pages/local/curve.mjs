// The training's loss curves, drawn as SVG.

const SVG = 'http://www.w3.org/2000/svg';
const [WIDTH, HEIGHT, LEFT, BOTTOM] = [640, 220, 44, 28];

// curves: {train: [[step, loss], ...], val: [...]}, where a loss of null is a gap;
// -> an <svg>, which says in words what it shows.
export function drawCurves(curves) {
  const series = Object.entries(curves).filter(([, points]) => isCurve(points));
  const all = series.flatMap(([, points]) => points.filter(isKnown));
  const lastStep = Math.max(...all.map(([step]) => step));
  const top = Math.max(...all.map(([, loss]) => loss));
  const low = Math.min(...all.map(([, loss]) => loss));
  const room = (top - low || 1) * 0.06;
  const x = (step) => LEFT + (step / lastStep) * (WIDTH - LEFT - 12);
  const y = (loss) => 8 + ((top + room - loss) / (top - low + 2 * room)) * (HEIGHT - BOTTOM - 8);

  const svg = make('svg', { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: 'img', class: 'curves' });
  const ends = series.map(([name, points]) => `${LABELS[name]} ${points.filter(isKnown).at(-1)[1].toFixed(2)}`);
  svg.setAttribute('aria-label', `Loss after ${lastStep} steps: ${ends.join(', ')}`);
  for (const loss of ticks(low, top, 4)) {
    svg.append(make('line', { x1: LEFT, x2: WIDTH - 12, y1: y(loss), y2: y(loss), class: 'grid' }));
    svg.append(label(String(loss), { x: LEFT - 8, y: y(loss) + 4, 'text-anchor': 'end' }));
  }
  for (const step of ticks(0, lastStep, 5)) {
    svg.append(label(step.toLocaleString('en'), { x: x(step), y: HEIGHT - 8, 'text-anchor': 'middle' }));
  }
  for (const [name, points] of series) {
    svg.append(make('path', { d: pathOf(points, x, y), class: name }));
  }
  return svg;
}

// Two losses make a line.
export const isCurve = (points) => points.filter(isKnown).length > 1;
const isKnown = ([, loss]) => Number.isFinite(loss);

// A line that is interrupted where a loss is missing.
export function pathOf(points, x, y) {
  let pen = 'M';
  let path = '';
  for (const point of points) {
    if (isKnown(point)) path += `${pen}${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`;
    pen = isKnown(point) ? 'L' : 'M';
  }
  return path;
}

export const LABELS = { train: 'training loss', val: 'validation loss' };

// Round numbers from low to high, about so many.
export function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = size * [1, 2, 5, 10].find((n) => n * size >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(+(n * step).toPrecision(6));
  return found;
}

function make(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function label(text, attributes) {
  const element = make('text', attributes);
  element.textContent = text;
  return element;
}
