// What every picture on a canvas needs: its size in real pixels, a tip, and words for screen readers.

import { clamp, h } from "./dom.js";

const TYPE = 11; // pixels

// Only registered colours are computed ones, in rgb(), when a script reads them.
const COLORS = ["ink", "muted", "surface", "grid", "accent", "bad", ...[0, 1, 2, 3].map((i) => `heat-${i}`), ...[0, 1, 2, 3, 4, 5].map((i) => `run-${i}`)];
for (const name of COLORS) {
  globalThis.CSS?.registerProperty?.({ name: `--${name}`, syntax: "<color>", inherits: true, initialValue: "gray" });
}

const HEARD = ["pointerdown", "pointermove", "pointerup", "pointercancel", "dblclick", "keydown"];

/**
 * The base of `Chart` and `Strip`. They draw with `paint(context, ink, width, height)`, answer those
 * of the `HEARD` events for which they have a method, and `leave()` when nothing is pointed at any more.
 */
export class Plot {
  constructor(holder, title) {
    this.holder = holder;
    this.canvas = h("canvas", { tabindex: 0, role: "slider", "aria-label": title });
    this.say(0, 0, 0, "nothing yet");
    this.tip = h("div", { class: "over tip", "aria-hidden": "true", hidden: true });
    holder.append(this.canvas, this.tip);
    for (const name of HEARD) this.canvas.addEventListener(name, (event) => this[name]?.(event));
    for (const name of ["pointerleave", "blur"]) this.canvas.addEventListener(name, () => this.leave());
    document.addEventListener("themechange", () => this.redraw());
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
    const [ariaValueMin, ariaValueMax, ariaValueNow] = [low, high, now].map(Math.round);
    Object.assign(this.canvas, { ariaValueMin, ariaValueMax, ariaValueNow, ariaValueText: text });
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
  context.fillText(text, clamp(at, low + half, high - half), y);
}

/** A share from 0 to 1 -> its colour, between four that ``ink`` gives. */
export function shades(ink) {
  const stops = [0, 1, 2, 3].map((i) => ink(`--heat-${i}`).match(/[\d.]+/g).map(Number)); // "rgb(11, 107, 95)"
  return (share) => {
    const at = clamp(share, 0, 1) * (stops.length - 1);
    const i = Math.min(Math.floor(at), stops.length - 2);
    const mixed = stops[i].map((from, c) => Math.round(from + (stops[i + 1][c] - from) * (at - i)));
    return `rgb(${mixed.join(" ")})`;
  };
}
