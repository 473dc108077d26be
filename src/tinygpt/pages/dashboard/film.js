// The samples of a run one after the other: it learns to spell, then words, then lines.

import { byId, clamp } from "../shared/dom.js";
import * as format from "../shared/format.js";

const WHOLE = 12_000; // ms that a film takes, unless it has few frames or very many
const [QUICK, SLOW] = [120, 900];

export class Film {
  constructor({ onStep }) {
    this.onStep = onStep;
    this.samples = [];
    this.at = -1;
    this.none = "";
    byId("slider").addEventListener("input", (event) => {
      this.pause();
      this.#show(Number(event.target.value));
    });
    byId("play").addEventListener("click", () => (this.timer ? this.pause() : this.play()));
  }

  /** Other samples, or more; who was at the end stays at the end. */
  load(samples, run, fresh) {
    const follow = fresh || this.at === this.samples.length - 1;
    const step = this.samples[this.at]?.iter;
    this.samples = samples;
    this.none = none(run);
    if (fresh) this.pause();
    const found = samples.findIndex((sample) => sample.iter >= step);
    const slider = byId("slider");
    slider.max = Math.max(samples.length - 1, 0);
    slider.disabled = byId("play").disabled = samples.length < 2;
    this.#show(follow || found < 0 ? samples.length - 1 : found, true);
  }

  play() {
    if (this.at >= this.samples.length - 1) this.#show(0);
    this.timer = setInterval(() => {
      if (this.at >= this.samples.length - 1) this.pause();
      else this.#show(this.at + 1);
    }, clamp(WHOLE / this.samples.length, QUICK, SLOW));
    this.#label();
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.#label();
  }

  #label() {
    byId("play").textContent = this.timer ? "Pause" : "Play";
    byId("play").setAttribute("aria-pressed", Boolean(this.timer));
  }

  #show(i, quietly = false) {
    this.at = i;
    const sample = this.samples[i];
    byId("slider").value = i;
    byId("sample").textContent = sample ? sample.text : this.none;
    byId("sample").classList.toggle("none", !sample);
    const text = sample ? `step ${format.steps(sample.iter)}` : "";
    byId("slider").setAttribute("aria-valuetext", text || "none");
    byId("frame").textContent = sample ? `${text} · sample ${i + 1} of ${this.samples.length}` : "";
    if (!quietly) this.onStep(sample?.iter ?? null);
  }
}

/** Why there is nothing to see. */
function none(run) {
  if (run.samples) return "No sample here: the server has not sent them.";
  return run.state === "training" ? "No sample yet: the first comes with the first evaluation." : "No sample was written.";
}
