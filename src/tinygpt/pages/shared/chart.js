// A line chart on a canvas: values under the pointer, zoom by dragging, and all of it by keyboard.

import { extent, linear, logarithmic } from "./axes.js";
import { h } from "./dom.js";
import * as format from "./format.js";
import { nearest } from "./series.js";

const TYPE = 11; // pixels
const LEAST_DRAG = 6; // pixels that make a drag of a click

/**
 * ``title`` names the chart, ``write`` writes its values. Lines are
 * { name, color, dash, x, y, width, low, high, dots, faint, quiet, stride }, lists of the same length;
 * a value is the mean of ``stride`` steps, of one unless that is said.
 * ``onZoom([from, to] or null)`` and ``onPoint(step or null)`` tell what a person does.
 */
export class Chart {
  constructor(holder, { title, write, onZoom, onPoint, ticks = 5, zero = false }) {
    Object.assign(this, { holder, title, write, onZoom, onPoint, wanted: ticks, zero });
    this.lines = [];
    this.marks = [];
    this.log = false;
    this.range = null;
    this.step = null;
    this.drag = null;
    this.canvas = h("canvas", {
      tabindex: 0, role: "slider", "aria-label": title, "aria-valuemin": 0, "aria-valuemax": 0,
      "aria-valuenow": 0, "aria-valuetext": "nothing yet",
    });
    this.tip = h("div", { class: "tip", "aria-hidden": "true", hidden: true });
    holder.append(this.canvas, this.tip);
    new ResizeObserver(() => this.redraw()).observe(holder);
    this.#listen();
  }

  /** Show lines; ``range`` is the part of the steps that is seen, null for all. */
  show({ lines, marks = [], range = null, log = false }) {
    Object.assign(this, { lines, marks, range, log });
    this.redraw();
  }

  /** Point at a step from elsewhere, without a word. */
  point(step) {
    if (step === this.step) return;
    this.step = step;
    this.redraw();
  }

  redraw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.#draw();
    });
  }

  // ---- drawing ----

  #draw() {
    const { clientWidth: width, clientHeight: height } = this.holder;
    if (!width || !height) return;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const style = getComputedStyle(this.canvas);
    const ink = (name) => style.getPropertyValue(name);
    context.font = `${TYPE}px ${style.fontFamily}`;
    this.#measure(context, width, height);
    this.#grid(context, ink);
    context.save();
    context.beginPath();
    context.rect(this.left, 0, this.right - this.left + 1, this.bottom + 1);
    context.clip();
    for (const line of this.lines) this.#band(context, line, ink);
    for (const line of this.lines) this.#line(context, line, ink);
    context.restore();
    this.#marks(context, ink);
    if (this.drag) this.#selection(context, ink);
    else if (this.step !== null) this.#cross(context, ink);
    this.#tell();
  }

  /** The axes for what is to be seen now. */
  #measure(context, width, height) {
    const steps = this.range ?? this.#all();
    const seen = this.lines.flatMap((line) => (line.quiet ? [] : [...visible(line, steps)]));
    const log = this.log && seen.some((value) => value > 0);
    let [low, high] = extent(seen, log);
    if (this.zero && !log) low = Math.min(low, 0);
    [this.top, this.bottom] = [8, height - 22];
    this.y = (log ? logarithmic : linear)(low, high, this.bottom, this.top, this.wanted);
    const labels = this.y.ticks.map((tick) => context.measureText(this.#tick(tick)).width);
    this.left = Math.ceil(Math.max(24, ...labels)) + 10;
    this.right = width - 10;
    this.x = linear(...steps, this.left, this.right, Math.floor((this.right - this.left) / 80));
  }

  #all() {
    let [low, high] = [Infinity, -Infinity];
    for (const { x } of this.lines) {
      if (x.length) [low, high] = [Math.min(low, x[0]), Math.max(high, x.at(-1))];
    }
    return low < high ? [low, high] : [0, Math.max(high, 1)];
  }

  #tick(value) {
    return this.write === format.loss ? format.short(value) : this.write(value);
  }

  #grid(context, ink) {
    context.lineWidth = 1;
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (const tick of this.y.ticks) {
      const at = Math.round(this.y.place(tick)) + 0.5;
      context.strokeStyle = ink("--chart-line");
      context.beginPath();
      context.moveTo(this.left, at);
      context.lineTo(this.right, at);
      context.stroke();
      context.fillStyle = ink("--chart-text");
      context.fillText(this.#tick(tick), this.left - 7, at);
    }
    context.textAlign = "center";
    for (const tick of this.x.ticks) {
      if (!Number.isInteger(tick)) continue;
      const at = this.x.place(tick);
      const text = format.steps(tick);
      const half = context.measureText(text).width / 2;
      const inside = Math.min(Math.max(at, this.left + half - 8), this.right - half + 8);
      context.fillText(text, inside, this.bottom + 13);
    }
  }

  #band(context, { x, low, high, color, quiet }, ink) {
    if (!low || quiet) return;
    context.fillStyle = ink(color);
    context.globalAlpha = 0.16;
    for (const [from, to] of stretches(high)) {
      context.beginPath();
      for (let i = from; i < to; i++) context.lineTo(this.x.place(x[i]), this.y.place(high[i]));
      for (let i = to - 1; i >= from; i--) context.lineTo(this.x.place(x[i]), this.y.place(low[i]));
      context.fill();
    }
    context.globalAlpha = 1;
  }

  #line(context, { x, y, color, dash = [], width = 1.6, dots, faint }, ink) {
    context.strokeStyle = context.fillStyle = ink(color);
    context.lineWidth = width;
    context.lineJoin = "round";
    context.globalAlpha = faint ? 0.35 : 1;
    context.setLineDash(dash);
    for (const [from, to] of stretches(y)) {
      context.beginPath();
      for (let i = from; i < to; i++) context.lineTo(this.x.place(x[i]), this.y.place(y[i]));
      context.stroke();
    }
    context.setLineDash([]);
    const wide = (this.right - this.left) / Math.max(y.length, 1) > 14;
    for (let i = 0; (dots && wide) || (y.length === 1 && i < 1) ? i < y.length : false; i++) {
      if (y[i] === null) continue;
      context.beginPath();
      context.arc(this.x.place(x[i]), this.y.place(y[i]), 2.6, 0, 7);
      context.fill();
    }
    context.globalAlpha = 1;
  }

  /** Steps that were skipped: small wedges on the axis. */
  #marks(context, ink) {
    context.fillStyle = ink("--chart-bad");
    for (const [step] of this.marks) {
      const at = this.x.place(step);
      if (at < this.left - 1 || at > this.right + 1) continue;
      context.beginPath();
      context.moveTo(at, this.bottom - 7);
      context.lineTo(at - 4, this.bottom);
      context.lineTo(at + 4, this.bottom);
      context.fill();
    }
  }

  #selection(context, ink) {
    const [from, to] = [this.drag.from, this.drag.to].sort((a, b) => a - b);
    context.fillStyle = ink("--chart-accent");
    context.globalAlpha = 0.15;
    context.fillRect(from, this.top, to - from, this.bottom - this.top);
    context.globalAlpha = 1;
  }

  #cross(context, ink) {
    const at = this.x.place(this.step);
    if (at < this.left - 1 || at > this.right + 1) return;
    context.strokeStyle = ink("--chart-text");
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(Math.round(at) + 0.5, this.top);
    context.lineTo(Math.round(at) + 0.5, this.bottom);
    context.stroke();
    for (const { line, i } of this.#pointed()) {
      context.fillStyle = ink(line.color);
      context.beginPath();
      context.arc(this.x.place(line.x[i]), this.y.place(line.y[i]), 3.5, 0, 7);
      context.fill();
    }
  }

  // ---- what is pointed at ----

  /** The lines that have a name, and the place of each next to the step pointed at. */
  #pointed() {
    return this.lines.flatMap((line) => {
      if (!line.name || !line.x.length || this.step === null) return [];
      const i = nearest(line.x, this.step);
      const near = Math.abs(this.x.place(line.x[i]) - this.x.place(this.step)) < 30;
      return line.y[i] !== null && near ? [{ line, i }] : [];
    });
  }

  #skippedHere() {
    const pixels = (step) => Math.abs(this.x.place(step) - this.x.place(this.step));
    return this.step === null ? [] : this.marks.filter(([step]) => pixels(step) < 5).slice(0, 3);
  }

  /** What is pointed at in words: the place of the first, and ``apart`` where another's differs. */
  #told() {
    const pointed = this.#pointed().map((each) => ({ ...each, place: placeOf(each) }));
    return pointed.map((each) => ({ ...each, apart: each.place === pointed[0].place ? "" : ` (${each.place})` }));
  }

  #tell() {
    const shown = this.step ?? this.x.high;
    const values = this.#told().map(({ line, i, apart }) => `${line.name}${apart} ${this.write(line.y[i])}`);
    const set = (name, value) => this.canvas.setAttribute(`aria-${name}`, value);
    set("valuemin", Math.round(this.x.low));
    set("valuemax", Math.round(this.x.high));
    set("valuenow", Math.round(Math.min(Math.max(shown, this.x.low), this.x.high)));
    set("valuetext", [this.#told()[0]?.place ?? `step ${format.steps(shown)}`, ...values].join(", "));
    this.#showTip();
  }

  #showTip() {
    const pointed = this.#told();
    this.tip.hidden = !this.active || Boolean(this.drag) || !pointed.length;
    if (this.tip.hidden) return;
    this.tip.replaceChildren(
      h("b", {}, pointed[0].place),
      h("dl", {}, ...pointed.slice(0, 12).flatMap(({ line, i, apart }) => [
        h("dt", {}, swatch(line), `${line.name}${apart}`),
        h("dd", {}, this.write(line.y[i])),
      ])),
      ...this.#skippedHere().map(([step, why]) =>
        h("p", { class: "bad" }, `step ${format.steps(step)} skipped: ${why}`)),
    );
    const at = this.x.place(this.step);
    const width = this.tip.offsetWidth;
    const right = at + 14 + width < this.holder.clientWidth;
    const left = right ? at + 14 : Math.max(at - width - 14, 0);
    this.tip.style.transform = `translate(${Math.round(left)}px, ${this.top}px)`;
  }

  // ---- hands ----

  #listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      const at = this.#inside(event);
      this.drag = { from: at, to: at };
      canvas.setPointerCapture(event.pointerId);
      this.active = true;
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.x) return;
      this.active = true;
      const at = this.#inside(event);
      if (this.drag) this.drag.to = at;
      this.#move(this.x.back(at));
    });
    canvas.addEventListener("pointerup", () => this.#drop());
    canvas.addEventListener("pointercancel", () => {
      this.drag = null;
      this.redraw();
    });
    canvas.addEventListener("pointerleave", () => this.#leave());
    canvas.addEventListener("blur", () => this.#leave());
    canvas.addEventListener("dblclick", () => this.onZoom(null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  #inside(event) {
    const at = event.clientX - this.canvas.getBoundingClientRect().left;
    return Math.min(Math.max(at, this.left), this.right);
  }

  #move(step) {
    this.step = step;
    this.onPoint(step);
    this.redraw();
  }

  #leave() {
    this.active = false;
    this.drag = null;
    this.step = null;
    this.onPoint(null);
    this.redraw();
  }

  #drop() {
    const { drag } = this;
    this.drag = null;
    if (drag && Math.abs(drag.to - drag.from) >= LEAST_DRAG) {
      this.#zoom(...[drag.from, drag.to].sort((a, b) => a - b).map((at) => this.x.back(at)));
    }
    this.redraw();
  }

  #zoom(from, to) {
    if (to - from >= 2) this.onZoom([from, to]);
  }

  #key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || !this.x) return;
    const { low, high } = this.x;
    const now = Math.min(Math.max(this.step ?? high, low), high);
    const stride = ((high - low) / 100) * (event.shiftKey ? 10 : 1);
    const half = (high - low) / 4;
    const actions = {
      ArrowLeft: () => this.#move(Math.max(now - stride, low)),
      ArrowRight: () => this.#move(Math.min(now + stride, high)),
      ArrowDown: () => this.#move(Math.max(now - stride, low)),
      ArrowUp: () => this.#move(Math.min(now + stride, high)),
      PageDown: () => this.#move(Math.max(now - stride * 10, low)),
      PageUp: () => this.#move(Math.min(now + stride * 10, high)),
      Home: () => this.#move(low),
      End: () => this.#move(high),
      "+": () => this.#zoom(Math.max(now - half, low), Math.min(now + half, high)),
      "=": () => this.#zoom(Math.max(now - half, low), Math.min(now + half, high)),
      "-": () => this.onZoom(null),
      Escape: () => this.onZoom(null),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    this.active = true;
    actions[event.key]();
  }
}

/** The step that a value belongs to, or the middle of those that it is the mean of. */
export function stepOf(x, stride = 1) {
  return `${stride > 1 ? "around step" : "step"} ${format.steps(x)}`;
}

const placeOf = ({ line, i }) => stepOf(line.x[i], line.stride);

/** A short piece of a run's line, for legends. */
export function swatch({ color, dash = [] }) {
  const canvas = h("canvas", { class: "swatch", width: 44, height: 16, "aria-hidden": "true" });
  const paint = () => {
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, 44, 16);
    context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue(color);
    context.lineWidth = 5;
    context.setLineDash(dash.map((n) => 2 * n));
    context.beginPath();
    context.moveTo(0, 8);
    context.lineTo(44, 8);
    context.stroke();
  };
  paint();
  return canvas;
}

/** The values of a line between two steps, and one beyond on both sides. */
function* visible({ x, y, low, high }, [from, to]) {
  for (let i = 0; i < x.length; i++) {
    if ((x[i + 1] ?? Infinity) < from || (x[i - 1] ?? -Infinity) > to) continue;
    yield y[i];
    if (low) {
      yield low[i];
      yield high[i];
    }
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
