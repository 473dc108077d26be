// What every picture on a canvas needs: its size in real pixels, a tip, and words for screen readers.

import { h } from "./dom.js";

const TYPE = 11; // pixels

/** The base of `Chart` and `Strip`, which draw with `paint(context, ink, width, height)`. */
export class Plot {
  constructor(holder, title) {
    this.holder = holder;
    this.canvas = h("canvas", {
      tabindex: 0, role: "slider", "aria-label": title, "aria-valuemin": 0, "aria-valuemax": 0,
      "aria-valuenow": 0, "aria-valuetext": "nothing yet",
    });
    this.tip = h("div", { class: "tip", "aria-hidden": "true", hidden: true });
    holder.append(this.canvas, this.tip);
    new ResizeObserver(() => this.redraw()).observe(holder);
  }

  redraw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      const { clientWidth: width, clientHeight: height } = this.holder;
      if (!width || !height) return;
      const ratio = window.devicePixelRatio || 1;
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
      const context = this.canvas.getContext("2d");
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      const style = getComputedStyle(this.canvas);
      context.font = `${TYPE}px ${style.fontFamily}`;
      this.paint(context, (name) => style.getPropertyValue(name), width, height);
    });
  }

  /** Tell assistive technology where on the x axis somebody is, and what is there. */
  say(low, high, now, text) {
    const values = { valuemin: Math.round(low), valuemax: Math.round(high), valuenow: Math.round(now), valuetext: text };
    for (const [name, value] of Object.entries(values)) this.canvas.setAttribute(`aria-${name}`, value);
  }

  /** Put the tip beside a place, on the side where there is room. */
  showTip(at, top, ...content) {
    this.tip.replaceChildren(...content);
    const width = this.tip.offsetWidth;
    const left = at + 14 + width < this.holder.clientWidth ? at + 14 : Math.max(at - width - 14, 0);
    this.tip.style.transform = `translate(${Math.round(left)}px, ${top}px)`;
  }
}

/** A tick's text in the middle below its place, within the canvas. */
export function tickText(context, text, at, y, low, high) {
  const half = context.measureText(text).width / 2;
  context.textAlign = "center";
  context.fillText(text, Math.min(Math.max(at, low + half), high - half), y);
}

/** A share from 0 to 1 -> its colour, between four that ``ink`` gives. */
export function shades(ink) {
  const stops = [0, 1, 2, 3].map((i) => ink(`--heat-${i}`).match(/[\d.]+/g).map(Number)); // "rgb(11, 107, 95)"
  return (share) => {
    const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    const i = Math.min(Math.floor(at), stops.length - 2);
    const mixed = stops[i].map((from, c) => Math.round(from + (stops[i + 1][c] - from) * (at - i)));
    return `rgb(${mixed.join(" ")})`;
  };
}
