// A line chart on a canvas: values under the pointer, zoom by dragging, and all of it by keyboard.

import { extent, linear, logarithmic, usual } from "./axes.js";
import { clamp, h, stepOf } from "./dom.js";
import * as format from "./format.js";
import { Plot, tickText } from "./plot.js";
import { nearest } from "./series.js";

const LEAST_DRAG = 6; // pixels that make a drag of a click
const DOTS = 14; // pixels between two dots of a line

/** What the x axis may count: how a place on it is named and its ticks are written. */
export const UNITS = {
  step: { at: (x) => `step ${format.steps(x)}`, tick: (x) => (Number.isInteger(x) ? format.steps(x) : "") },
  tokens: { at: (x) => `${format.many(x)} tokens`, tick: format.many },
  time: { at: format.duration, tick: format.duration, parts: [3600, 60, 1] },
};

/** The place that a value belongs to, or the middle of those that it is the mean of. */
export const placeOf = (x, stride = 1, unit = "step") => `${stride > 1 ? "around " : ""}${UNITS[unit].at(x)}`;

/**
 * ``title`` names the chart, ``write`` writes its values. Lines are
 * { name, color, dash, x, y, width, low, high, dots, faint, stride, best }, lists of the same length;
 * a value is the mean of ``stride`` steps, of one unless that is said, and ``best`` a point [x, y].
 * ``onZoom([from, to] or null)`` and ``onPoint(x or null)`` report what a person does.
 */
export class Chart extends Plot {
  constructor(holder, { title, write, onZoom, onPoint, ticks = 5, zero = false }) {
    super(holder, title);
    Object.assign(this, { write, onZoom, onPoint, wanted: ticks, zero, lines: [], step: null, drag: null });
  }

  /**
   * Show lines. ``range`` is the part of the x axis that is seen, null for all; ``marks`` are
   * [x, why] of skipped steps; with ``cut`` the y axis leaves out what is far from the rest.
   */
  show({ lines, marks = [], range = null, log = false, cut = false, unit = "step" }) {
    Object.assign(this, { lines, marks, range, log, cut, unit });
    this.redraw();
  }

  /** Point at a place from elsewhere, without a word. */
  point(x) {
    if (x === this.step) return;
    this.step = x;
    this.redraw();
  }

  // ---- drawing ----

  paint(context, ink, width, height) {
    this.#measure(context, width, height);
    this.#grid(context, ink);
    context.save();
    context.beginPath();
    context.rect(this.left, 0, this.right - this.left + 1, this.bottom + 1);
    context.clip();
    for (const line of this.lines) this.#band(context, line, ink);
    for (const line of this.lines) this.#line(context, line, ink);
    context.restore();
    for (const line of this.lines) if (line.best) this.#best(context, line, ink);
    for (const [x] of this.marks) this.#wedge(context, this.x.place(x), ink);
    if (this.drag) this.#selection(context, ink);
    else if (this.step !== null) this.#cross(context, ink);
    this.#tell();
  }

  /** The axes for what is to be seen now. */
  #measure(context, width, height) {
    const steps = this.range ?? this.#all();
    const seen = this.lines.flatMap((line) => [...visible(line, steps)]);
    const log = this.log && seen.some((value) => value > 0);
    let [low, high] = extent(this.cut ? usual(seen) : seen, log);
    if (this.zero && !log) low = Math.min(low, 0);
    [this.top, this.bottom] = [8, height - 22];
    this.y = (log ? logarithmic : linear)(low, high, this.bottom, this.top, this.wanted);
    const labels = this.y.ticks.map((tick) => context.measureText(this.#tick(tick)).width);
    this.left = Math.ceil(Math.max(24, ...labels)) + 10;
    this.right = width - 10;
    this.x = linear(...steps, this.left, this.right, Math.floor((this.right - this.left) / 80), UNITS[this.unit].parts);
  }

  #all() {
    const ends = this.lines.filter(({ x }) => x.length).flatMap(({ x }) => [x[0], x.at(-1)]);
    const [low, high] = [Math.min(...ends), Math.max(...ends)];
    return low < high ? [low, high] : [0, Math.max(high, 1)];
  }

  #tick = (value) => (this.write === format.loss ? format.short : this.write)(value);

  #grid(context, ink) {
    context.lineWidth = 1;
    context.textBaseline = "middle";
    context.textAlign = "right";
    context.strokeStyle = ink("--grid");
    context.fillStyle = ink("--muted");
    for (const tick of this.y.ticks) {
      const at = Math.round(this.y.place(tick)) + 0.5;
      path(context, [[this.left, at], [this.right, at]]).stroke();
      context.fillText(this.#tick(tick), this.left - 7, at);
    }
    for (const tick of this.x.ticks) {
      tickText(context, UNITS[this.unit].tick(tick), this.x.place(tick), this.bottom + 13, this.left - 8, this.right + 8);
    }
  }

  #places = (x, y, from, to) => x.slice(from, to).map((each, i) => [this.x.place(each), this.y.place(y[from + i])]);

  #band(context, { x, low, high, color }, ink) {
    if (!low) return;
    context.fillStyle = ink(color);
    context.globalAlpha = 0.16;
    for (const [from, to] of stretches(high)) {
      path(context, [...this.#places(x, high, from, to), ...this.#places(x, low, from, to).reverse()]).fill();
    }
    context.globalAlpha = 1;
  }

  #line(context, { x, y, color, dash = [], width = 1.6, dots, faint }, ink) {
    context.strokeStyle = ink(color);
    context.lineWidth = width;
    context.lineJoin = "round";
    context.globalAlpha = faint ? 0.35 : 1;
    context.setLineDash(dash);
    for (const [from, to] of stretches(y)) path(context, this.#places(x, y, from, to)).stroke();
    context.setLineDash([]);
    if (dots || y.length === 1) this.#dots(context, x, y, ink);
    context.globalAlpha = 1;
  }

  /** Hollow dots on a line, as close as there is room. */
  #dots(context, x, y, ink) {
    context.fillStyle = ink("--surface");
    let last = -Infinity;
    x.forEach((each, i) => {
      const at = this.x.place(each);
      if (y[i] === null || at - last < DOTS) return;
      last = at;
      circle(context, at, this.y.place(y[i]), 2.6).fill();
      context.stroke();
    });
  }

  /** The lowest validation loss: a ring, with its value where there is one line of them. */
  #best(context, { best: [x, y], color }, ink) {
    const at = this.x.place(x);
    if (at < this.left - 1 || at > this.right + 1) return;
    context.strokeStyle = context.fillStyle = ink(color);
    context.lineWidth = 2;
    circle(context, at, this.y.place(y), 5.5).stroke();
    if (this.lines.filter((line) => line.best).length === 1) {
      const above = this.y.place(y) - 15;
      tickText(context, `best ${this.write(y)}`, at, above > this.top ? above : above + 30, this.left, this.right);
    }
  }

  /** A step that was skipped: a small wedge on the axis. */
  #wedge(context, at, ink) {
    if (at < this.left - 1 || at > this.right + 1) return;
    context.fillStyle = ink("--bad");
    path(context, [[at, this.bottom - 7], [at - 4, this.bottom], [at + 4, this.bottom]]).fill();
  }

  #selection(context, ink) {
    const [from, to] = this.#dragged();
    context.fillStyle = ink("--accent");
    context.globalAlpha = 0.15;
    context.fillRect(from, this.top, to - from, this.bottom - this.top);
    context.globalAlpha = 1;
  }

  #cross(context, ink) {
    const at = Math.round(this.x.place(this.step)) + 0.5;
    if (at < this.left - 1 || at > this.right + 1) return;
    context.strokeStyle = ink("--muted");
    context.lineWidth = 1;
    path(context, [[at, this.top], [at, this.bottom]]).stroke();
    for (const { line, i } of this.#pointed()) {
      context.fillStyle = ink(line.color);
      circle(context, this.x.place(line.x[i]), this.y.place(line.y[i]), 3.5).fill();
    }
  }

  // ---- what is pointed at ----

  /** The lines that have a name, and the place of each next to the one pointed at. */
  #pointed() {
    return this.lines.flatMap((line) => {
      if (!line.name || !line.x.length || this.step === null) return [];
      const i = nearest(line.x, this.step);
      const near = Math.abs(this.x.place(line.x[i]) - this.x.place(this.step)) < 30;
      return line.y[i] !== null && near ? [{ line, i, place: placeOf(line.x[i], line.stride, this.unit) }] : [];
    });
  }

  /** What is pointed at in words: the place of the first, and of another where it differs. */
  #tell() {
    const pointed = this.#pointed();
    const shown = this.step ?? this.x.high;
    const place = pointed[0]?.place ?? UNITS[this.unit].at(shown);
    const told = pointed.map(({ line, i, place: own }) => [
      line, `${line.name}${own === place ? "" : ` (${own})`}`, this.write(line.y[i])]);
    this.say(this.x.low, this.x.high, clamp(shown, this.x.low, this.x.high), [place, ...told.map(([, name, value]) => `${name} ${value}`)].join(", "));
    this.tip.hidden = !this.active || Boolean(this.drag) || !told.length;
    if (this.tip.hidden) return;
    const at = this.x.place(this.step);
    const skipped = this.marks.filter(([x]) => Math.abs(this.x.place(x) - at) < 5).slice(0, 3);
    this.showTip(at, this.top,
      h("b", {}, place),
      h("dl", {}, ...told.slice(0, 12).flatMap(([line, name, value]) => [
        h("dt", {}, swatch(line), h("span", { class: "clip" }, name)), h("dd", {}, value)])),
      ...skipped.map(([x, why]) => h("p", { class: "bad" }, `${UNITS[this.unit].at(x)} skipped: ${why}`)));
  }

  // ---- hands ----

  pointerdown(event) {
    if (event.button !== 0 || !this.x) return;
    const at = this.#inside(event);
    this.drag = { from: at, to: at };
    this.canvas.setPointerCapture(event.pointerId);
    this.active = true;
  }

  pointermove(event) {
    if (!this.x) return;
    this.active = true;
    const at = this.#inside(event);
    if (this.drag) this.drag.to = at;
    this.#move(this.x.back(at));
  }

  pointerup() {
    const [from, to] = this.#dragged();
    this.pointercancel();
    if (to - from >= LEAST_DRAG) this.#zoom(this.x.back(from), this.x.back(to));
  }

  pointercancel() {
    this.drag = null;
    this.redraw();
  }

  leave() {
    this.active = false;
    this.drag = null;
    this.#move(null);
  }

  dblclick() {
    this.onZoom(null);
  }

  keydown(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || !this.x) return;
    const { low, high } = this.x;
    const now = clamp(this.step ?? high, low, high);
    const quarter = (high - low) / 4;
    const step = stepOf(event);
    if (step) this.#move(clamp(now + (step[0] - step[1]) * (high - low) * (event.shiftKey ? 0.1 : 0.01), low, high));
    else if (event.key === "+" || event.key === "=") this.#zoom(Math.max(now - quarter, low), Math.min(now + quarter, high));
    else if (event.key === "-" || event.key === "Escape") this.onZoom(null);
    else return;
    event.preventDefault();
    this.active = true;
  }

  /** Where the pointer is on the x axis. */
  #inside = (event) => clamp(event.offsetX, this.left, this.right);

  #dragged() {
    const { from, to } = this.drag ?? { from: 0, to: 0 };
    return [Math.min(from, to), Math.max(from, to)];
  }

  #move(x) {
    this.step = x;
    this.onPoint(x);
    this.redraw();
  }

  #zoom(from, to) {
    if (to - from >= 2) this.onZoom([from, to]);
  }
}

/** A short piece of a line, for legends: with its dashes, its dots, its shade, or a ``sign``. */
export function swatch({ color, dash = [], width = 2.5, faint, dots, band, sign }) {
  const [ink, ring] = [`var(${color})`, dots ? [2.4, 1.4] : [3.2, 1.6]];
  const line = { d: "M0 4 H22", stroke: ink, "stroke-width": width, "stroke-dasharray": dash.join(" "), opacity: faint ? 0.4 : 1 };
  const parts = [];
  if (band) parts.push(drawn("rect", { width: 22, height: 8, fill: ink, opacity: 0.25 }));
  else if (sign === "skipped") parts.push(drawn("path", { d: "M11 0 L15 8 L7 8 Z", fill: ink }));
  else if (sign !== "best") parts.push(drawn("path", line));
  if (dots || sign === "best") {
    parts.push(drawn("circle", { cx: 11, cy: 4, r: ring[0], fill: "var(--surface)", stroke: ink, "stroke-width": ring[1] }));
  }
  return drawn("svg", { class: "swatch", viewBox: "0 0 22 8", "aria-hidden": "true" }, ...parts);
}

function drawn(name, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function path(context, points) {
  context.beginPath();
  for (const [x, y] of points) context.lineTo(x, y);
  return context;
}

function circle(context, x, y, radius) {
  context.beginPath();
  context.arc(x, y, radius, 0, 7);
  return context;
}

/** The values of a line between two places, and one beyond on both sides. */
function* visible({ x, y, low, high }, [from, to]) {
  for (let i = 0; i < x.length; i++) {
    if ((x[i + 1] ?? Infinity) < from || (x[i - 1] ?? -Infinity) > to) continue;
    yield y[i];
    if (low) yield* [low[i], high[i]];
  }
}

/** Stretches without a gap: [first, end). */
export function stretches(values) {
  const found = [];
  let from = 0;
  for (let i = 0; i <= values.length; i++) {
    if (i < values.length && values[i] !== null) continue;
    if (i > from) found.push([from, i]);
    from = i + 1;
  }
  return found;
}
