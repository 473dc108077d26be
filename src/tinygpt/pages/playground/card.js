// What model this is.

import { h, whole } from "../shared/dom.js";

/** The model's card as groups of terms and values. */
export function modelCard(model) {
  const groups = [
    ["Model", {
      Name: model.name,
      Parameters: whole(model.parameters),
      Layers: model.config.n_layer,
      Heads: model.config.n_head,
      Width: model.config.n_embd,
      Context: `${whole(model.config.block_size)} tokens`,
      Tokenizer: model.tokenizer && `${model.tokenizer.kind}, ${whole(model.tokenizer.vocab_size)} tokens`,
    }],
    ["Training", {
      Data: model.data,
      Step: model.step != null && whole(model.step),
      "Best validation loss": best(model),
    }],
    ["Every setting of the model", model.config],
    ["Every setting of the training", model.train ?? {}],
  ];
  return groups.map(([title, values], i) => group(title, values, i > 1)).filter(Boolean);
}

const best = ({ best_val_loss: loss, best_iter: step }) =>
  loss != null && `${loss.toFixed(4)}${step == null ? "" : ` at step ${whole(step)}`}`;

function group(title, values, folded) {
  const rows = Object.entries(values)
    .filter(([, value]) => value != null && value !== false)
    .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value))));
  if (!rows.length) return null;
  const list = h("dl", { class: "facts" }, ...rows);
  return folded
    ? h("details", {}, h("summary", {}, title), list)
    : h("section", {}, h("h3", { class: "title" }, title), list);
}
