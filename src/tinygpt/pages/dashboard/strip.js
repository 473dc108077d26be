// A row for each layer, a column for each stretch of steps: how large the gradients were there.

import { linear } from "../shared/axes.js";
import { placeOf, UNITS } from "../shared/chart.js";
import { byId, clamp, h, stepOf } from "../shared/dom.js";
import * as format from "../shared/format.js";
import { Plot, shades, tickText } from "../shared/plot.js";
import { nearest } from "../shared/series.js";

const ROW = 18;

export class Strip extends Plot {
  constructor(holder) {
    super(holder, "Gradient norm by layer");
    this.place = null; // [column, row]
  }

  /** ``layers`` are pairs of a name and means of ``stride`` steps, one for each of ``x``. */
  show(x, layers, range, stride, unit) {
    Object.assign(this, { x, layers, range, stride, unit });
    this.holder.style.blockSize = `${layers.length * ROW + 26}px`;
    this.redraw();
  }

  paint(context, ink, width) {
    if (!this.layers?.length) return;
    const names = this.layers.map(([name]) => clip(name));
    this.left = Math.ceil(Math.max(...names.map((name) => context.measureText(name).width))) + 12;
    const [from, to] = this.range ?? [this.x[0] ?? 0, Math.max(this.x.at(-1) ?? 1, (this.x[0] ?? 0) + 1)];
    this.axis = linear(from, to, this.left, width - 10, Math.floor((width - this.left) / 80), UNITS[this.unit].parts);
    const [low, high] = this.#extent();
    const shade = shades(ink);
    const color = (norm) => shade(Math.log(Math.max(norm, low) / low) / Math.log(high / low));
    context.textBaseline = "middle";
    this.layers.forEach(([, norms], row) => {
      context.textAlign = "right";
      context.fillStyle = ink(this.place?.[1] === row ? "--ink" : "--muted");
      context.fillText(names[row], this.left - 8, row * ROW + ROW / 2);
      this.#row(context, norms, row, color);
    });
    context.fillStyle = ink("--muted");
    for (const tick of this.axis.ticks) {
      tickText(context, UNITS[this.unit].tick(tick), this.axis.place(tick), this.layers.length * ROW + 14, this.left, width - 2);
    }
    byId("scale").replaceChildren(h("span", {}, format.short(low)), h("i"), h("span", {}, format.short(high)));
    this.#tell(context, ink);
  }

  #row(context, norms, row, color) {
    const right = this.axis.place(this.axis.high);
    for (let i = 0; i < norms.length; i++) {
      if (norms[i] === null) continue;
      const [a, b] = this.#columns(i).map((at) => clamp(at, this.left, right));
      if (b <= a) continue;
      context.fillStyle = color(norms[i]);
      context.fillRect(a, row * ROW, b - a + 0.6, ROW - 2);
    }
  }

  /** Left and right of a column: half-way to its neighbours. */
  #columns(i) {
    const { x } = this;
    const before = i > 0 ? (x[i - 1] + x[i]) / 2 : x[i] - ((x[i + 1] ?? x[i] + 1) - x[i]) / 2;
    const after = i + 1 < x.length ? (x[i] + x[i + 1]) / 2 : x[i] + (x[i] - (x[i - 1] ?? x[i] - 1)) / 2;
    return [this.axis.place(before), this.axis.place(after)];
  }

  #extent() {
    const values = this.layers.flatMap(([, norms]) => norms.filter((norm) => norm > 0)).sort((a, b) => a - b);
    if (!values.length) return [0.1, 1];
    const at = (share) => values[Math.min(Math.floor(values.length * share), values.length - 1)];
    const [low, high] = [at(0.01), at(0.99)]; // a single spike does not bleach all others
    return low < high ? [low, high] : [low / 2, high * 2];
  }

  #tell(context, ink) {
    const last = this.x.length - 1;
    const [column, row] = this.place ?? [last, 0];
    const norms = this.layers.map(([name, values]) => `${name} ${format.short(values[column])}`);
    const step = placeOf(this.x[column], this.stride, this.unit);
    this.say(this.x[0] ?? 0, this.x[last] ?? 0, this.x[column] ?? 0,
      this.place ? `${step}, ${norms[row]}` : [step, ...norms].join(", "));
    this.tip.hidden = !this.place;
    if (!this.place) return;
    const [a, b] = this.#columns(column);
    context.strokeStyle = ink("--ink");
    context.strokeRect(a, row * ROW - 0.5, Math.max(b - a, 3), ROW - 1);
    this.showTip(a, row * ROW + ROW + 4, h("b", {}, step), h("dl", {}, h("dt", {}, this.layers[row][0]),
      h("dd", {}, format.short(this.layers[row][1][column]))));
  }

  pointermove({ offsetX, offsetY }) {
    if (!this.axis) return;
    const row = Math.floor(offsetY / ROW);
    const inside = row < this.layers.length && offsetX >= this.left;
    this.#move(inside ? [nearest(this.x, this.axis.back(offsetX)), row] : null);
  }

  leave() {
    this.#move(null);
  }

  keydown(event) {
    const step = stepOf(event);
    if (!step) return;
    const last = this.x.length - 1;
    const [column, row] = this.place ?? [last, 0];
    const columns = step[0] * (event.shiftKey ? 10 : 1);
    this.#move([clamp(column + columns, 0, last), clamp(row + step[1], 0, this.layers.length - 1)]);
  }

  #move(place) {
    this.place = place;
    this.redraw();
  }
}

const clip = (name) => (name.length > 14 ? `${name.slice(0, 13)}…` : name);
