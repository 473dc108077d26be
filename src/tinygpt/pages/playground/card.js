// What model this is: its shape, its training, and the loss of that training.

import { Chart, swatch } from "../shared/chart.js";
import * as format from "../shared/format.js";
import { h, whole } from "../shared/dom.js";

const LINES = {
  train: { name: "training", color: "--run-0" },
  val: { name: "validation", color: "--run-1", dash: [6, 3], width: 2.2, dots: true },
};

/** The model's card as a chart and groups of terms and values. */
export function modelCard(card) {
  const groups = [
    ["Model", {
      Name: card.name,
      Parameters: card.parameters && whole(card.parameters),
      Layers: card.config.n_layer,
      Heads: card.config.n_head,
      Width: card.config.n_embd,
      Context: `${whole(card.config.block_size)} tokens`,
      Tokenizer: `${card.tokenizer.kind}, ${whole(card.tokenizer.vocab_size)} tokens`,
      Weights: card.weights && `${card.weights}; with these the logits are within ${card.parity.toExponential(0)} of TinyGPT's`,
      "Runs on": card.where && `your ${card.where}`,
    }],
    ["Training", {
      Data: card.data,
      Step: card.step != null && whole(card.step),
      "Best validation loss": best(card),
      Time: card.seconds != null && format.duration(card.seconds),
    }],
    ["Every setting of the model", card.config],
    ["Every setting of the training", card.train ?? {}],
  ];
  const facts = groups.map(([title, values], i) => group(title, values, i > 1));
  return [...facts.slice(0, 2), lossChart(card.curves ?? {}), ...facts.slice(2)].filter(Boolean);
}

const best = ({ best_val_loss: loss, best_iter: step }) =>
  loss != null && `${loss.toFixed(4)}${step == null ? "" : ` at step ${whole(step)}`}`;

/** The loss curves {train: [[step, loss]], val}, in which null is a gap; null if there are none. */
function lossChart(curves) {
  const lines = Object.entries(curves).filter(([, points]) => isCurve(points)).map(([name, points]) => ({
    ...LINES[name], x: points.map(([step]) => step), y: points.map(([, loss]) => loss),
  }));
  if (!lines.length) return null;
  const holder = h("div", { class: "chart" });
  const show = (range = null) => chart.show({ lines, range });
  const chart = new Chart(holder, { title: "Loss", write: format.loss, onZoom: show, onPoint: () => {} });
  show();
  const legend = h("p", { class: "hint row wrap" }, ...lines.map((line) => h("span", { class: "check" }, swatch(line), line.name)));
  return h("section", {}, h("h3", { class: "title" }, "Loss"), holder, legend);
}

/** Two losses make a line. */
export const isCurve = (points) => points.filter(([, loss]) => Number.isFinite(loss)).length > 1;

function group(title, values, folded) {
  const rows = Object.entries(values)
    .filter(([, value]) => value != null && value !== false)
    .map(([name, value]) => h("div", { class: "row" }, h("dt", {}, name), h("dd", {}, String(value))));
  if (!rows.length) return null;
  const list = h("dl", { class: "facts" }, ...rows);
  return folded
    ? h("details", {}, h("summary", {}, title), list)
    : h("section", {}, h("h3", { class: "title" }, title), list);
}
