// The list of runs: a card for each, with its state, its figures and a switch for its curves.

import { swatch } from "../shared/chart.js";
import { byId, counted, h } from "../shared/dom.js";
import * as format from "../shared/format.js";

const COLORS = 6;
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
const STATES = { training: "training", finished: "finished", stopped: "stopped", empty: "no steps yet" };

const NO_STEPS = { training: "waiting for the first step", empty: "nobody trains it now" };

/** How the curves of run number ``i`` look: no two are alike among 24. */
export const look = (i) => ({
  color: `--run-${i % COLORS}`,
  dash: DASHES[Math.floor(i / COLORS) % DASHES.length],
});

export class RunList {
  constructor({ onShow, onFocus }) {
    Object.assign(this, { onShow, onFocus });
    this.cards = new Map();
  }

  /** Bring the list up to date; elements stay, and with them what has the focus. */
  show(runs, focused) {
    for (const [id, card] of this.cards) {
      if (runs.some((run) => run.id === id)) continue;
      card.item.remove();
      this.cards.delete(id);
    }
    runs.forEach((run, i) => {
      const card = this.cards.get(run.id) ?? this.#make(run);
      fill(card, run, run.id === focused);
      const list = byId("runs");
      if (list.children[i] !== card.item) list.insertBefore(card.item, list.children[i] ?? null);
    });
    const training = runs.filter((run) => run.state === "training").length;
    byId("count").textContent = training ? `${training} of ${runs.length} training` : `${runs.length}`;
  }

  #make(run) {
    const check = h("input", { type: "checkbox", "aria-label": `Curves of ${run.name}`,
      onchange: (event) => this.onShow(run.id, event.target.checked) });
    const name = h("button", { type: "button", class: "name clip", onclick: () => this.onFocus(run.id) });
    const [state, line, bar] = [h("span", { class: "state check" }), h("p", { class: "hint figure" }), h("i")];
    const odd = h("span", { class: "odd" });
    const item = h("li", { class: "card run" },
      h("div", { class: "head" }, h("label", { class: "check" }, check, swatch(run.look)), name, odd, state),
      h("div", { class: "progress", "aria-hidden": "true" }, bar), line);
    const card = { item, check, name, state, line, bar, odd };
    this.cards.set(run.id, card);
    return card;
  }
}

function fill({ item, check, name, state, line, bar, odd }, run, focused) {
  item.classList.toggle("focused", focused);
  name.setAttribute("aria-current", focused);
  check.checked = run.shown;
  set(name, run.name);
  name.title = run.name;
  set(state, STATES[run.state]);
  state.dataset.state = run.state;
  bar.style.inlineSize = `${100 * Math.min((run.iter ?? 0) / (run.max_iters ?? Infinity), 1)}%`;
  const steps = run.max_iters ? `${format.steps(run.iter ?? 0)} / ${format.steps(run.max_iters)}` : format.steps(run.iter);
  const best = run.best_val_loss === null ? `loss ${format.loss(run.train_loss)}` : `best ${format.loss(run.best_val_loss)}`;
  set(line, run.iter === null ? NO_STEPS[run.state] ?? "–" : `${steps} · ${best}`);
  set(odd, run.odd.length ? "odd" : "");
  odd.title = run.odd.join("\n");
}

const set = (element, text) => element.textContent !== text && (element.textContent = text);

/** The seven figures of the run that is looked at; losses are multiplied by ``scale``. */
export function showFigures(run, scale) {
  const training = run.state === "training";
  const left = training && run.max_iters && run.steps_per_second
    ? (run.max_iters - run.iter) / run.steps_per_second : null;
  byId("name").textContent = run.name;
  byId("state").textContent = STATES[run.state];
  byId("state").dataset.state = run.state;
  byId("state").title = run.holder ?? "";
  const { best_val_loss: best } = run;
  const scaled = (value) => format.loss(value === null ? null : value * scale);
  const figures = [
    ["Step", format.steps(run.iter), run.max_iters && `of ${format.steps(run.max_iters)}`],
    ["Training loss", scaled(run.train_loss), run.skips ? `${counted(run.skips, "step")} skipped` : ""],
    ["Best validation", scaled(best), run.best_iter === null ? "" : `at step ${format.steps(run.best_iter)}`],
    ["Perplexity", best === null ? "–" : format.short(Math.exp(best)), "of the best"],
    ["Speed", format.many(run.tokens_per_second), "tokens/s"],
    ["Memory", format.megabytes(run.memory === null ? null : run.memory / 2 ** 20)],
    training ? ["Left", format.duration(left), `${format.duration(run.elapsed)} so far`] : ["Time", format.duration(run.elapsed)],
  ];
  byId("figures").replaceChildren(...figures.map(([name, value, more]) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, h("b", {}, value), more && h("span", {}, more)))));
}
