// A picture of an attention map: a row for each token that looks, a column for each it looks at.

import { shades } from "../shared/plot.js";

const LABEL = 11; // pixels of type
const MOST_LABEL = 9; // characters
const SPACE = 6; // pixels between labels and cells

/** Draws rows of weights (row i has the columns up to its own token) on a canvas. */
export class Heatmap {
  constructor(canvas) {
    Object.assign(this, { canvas, rows: [] });
  }

  /** ``labels`` may be empty, for a small picture; ``at`` is the pair to point out, or null. */
  draw(rows, labels, width, at = null) {
    Object.assign(this, { rows, labels });
    const ratio = window.devicePixelRatio || 1;
    const context = this.canvas.getContext("2d");
    context.font = `${LABEL}px ${getComputedStyle(this.canvas).fontFamily}`;
    const widths = labels.map((label) => context.measureText(short(label)).width);
    this.margin = labels.length ? Math.ceil(Math.max(...widths)) + SPACE + 2 : 0;
    const cell = (width - this.margin) / Math.max(rows.length, 1);
    this.cell = labels.length ? Math.min(Math.floor(cell * ratio) / ratio || 1 / ratio, 26) : cell;
    const size = this.margin + this.cell * rows.length;
    this.canvas.width = Math.max(Math.round(size * ratio), 1);
    this.canvas.height = this.canvas.width;
    this.canvas.style.inlineSize = this.canvas.style.blockSize = `${size}px`;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.#cells(context);
    if (labels.length) this.#labels(context, at);
    if (at) this.#point(context, at);
  }

  /** The pair (row, column) at a place in the picture, or null outside. */
  pairAt(x, y) {
    const row = Math.floor((y - this.margin) / this.cell);
    const column = Math.floor((x - this.margin) / this.cell);
    return this.rows[row]?.[column] === undefined ? null : [row, column];
  }

  #cells(context) {
    const style = getComputedStyle(this.canvas);
    const shade = shades((name) => style.getPropertyValue(name));
    const { margin, cell, rows } = this;
    const gap = cell > 8 ? 1 : 0;
    rows.forEach((row, i) =>
      row.forEach((weight, j) => {
        context.fillStyle = shade(Math.sqrt(weight)); // or most of a map would be empty
        context.fillRect(margin + j * cell, margin + i * cell, cell - gap, cell - gap);
      }),
    );
  }

  /** As many labels as fit; those of the pair at hand always. */
  #labels(context, at) {
    const { margin, cell, labels } = this;
    const [ink, muted] = inks(this.canvas);
    const every = Math.max(1, Math.ceil((LABEL + 1) / cell));
    context.font = `${LABEL}px ${getComputedStyle(this.canvas).fontFamily}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    labels.forEach((label, i) => {
      const center = margin + (i + 0.5) * cell;
      const near = (pointed) => pointed !== undefined && Math.abs(i - pointed) < every;
      if (at?.[0] === i || (i % every === 0 && !near(at?.[0]))) {
        context.fillStyle = at?.[0] === i ? ink : muted;
        context.fillText(short(label), margin - SPACE, center);
      }
      if (at?.[1] === i || (i % every === 0 && !near(at?.[1]))) {
        context.fillStyle = at?.[1] === i ? ink : muted;
        context.save();
        context.translate(center, margin - SPACE);
        context.rotate(-Math.PI / 2);
        context.textAlign = "left";
        context.fillText(short(label), 0, 0);
        context.restore();
      }
    });
  }

  #point(context, [row, column]) {
    const { margin, cell } = this;
    context.strokeStyle = inks(this.canvas)[0];
    context.lineWidth = 1.5;
    const size = Math.max(cell, 5);
    context.strokeRect(margin + column * cell - 0.5, margin + row * cell - 0.5, size, size);
  }
}

const short = (label) => (label.length > MOST_LABEL ? `${label.slice(0, MOST_LABEL - 1)}…` : label);

/** The colours of labels: of those pointed at, and of the others. */
const inks = (canvas) => [canvas.parentElement, canvas].map((element) => getComputedStyle(element).color);
