// How a token comes about, with the figures of the text that is there: text → … → draw.

import { visible } from "./bytes.js";
import { counted, h, percent, whole } from "../shared/dom.js";

const PARTS = { text: "Text", cuts: "Tokens", layers: "Layers", candidates: "Candidates", draw: "Draw" };

export class Story {
  /** ``onFollow(part)`` when one of them is pressed. */
  constructor(list, onFollow) {
    this.figures = {};
    for (const [part, name] of Object.entries(PARTS)) {
      this.figures[part] = h("span", { class: "hint clip" }, "–");
      const button = h("button", { type: "button", class: "quiet", onclick: () => onFollow(part) }, h("span", { class: "title" }, name), this.figures[part]);
      list.append(h("li", {}, button));
    }
  }

  /** ``found`` are the candidates of the place that is looked at, once they are there. */
  show(draft, card, found = null) {
    const last = draft.tokens.at(-1);
    const figures = {
      text: counted(draft.text.length, "character"),
      cuts: draft.isCut ? whole(draft.tokens.length) : "…",
      layers: card ? `${counted(card.config.n_layer, "layer")}, ${counted(card.config.n_head, "head")}` : "–",
      candidates: found ? `${whole(found.kept)} of ${whole(found.vocabulary)}` : card ? `of ${whole(card.tokenizer.vocab_size)}` : "–",
      draw: last?.origin === "model" ? `${visible(last.bytes)} ${percent(Math.exp(last.logprob))}` : "one token",
    };
    for (const [part, figure] of Object.entries(figures)) this.figures[part].textContent = figure;
  }
}
