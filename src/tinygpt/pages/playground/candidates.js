// What else the model weighed at one place of the text, and going on from another choice.

import { visible } from "./bytes.js";
import { counted, h, moveWithArrows, newestOnly, percent, whole } from "../shared/dom.js";
import { received } from "./draft.js";

const COUNT = 10;
const EMPTY = "Write something, and see here what might come next. Continue begins after a line break.";
const FIRST = "Nothing comes before the first token, so the model has no candidates for it.";
const FAR = "What comes before this token is further back than the model is given.";
const WRITING = "The model is writing; its candidates come when it has stopped.";

export class Candidates {
  /** ``onChoose(draft, index, token)``, ``onMove(step)``, ``onFound(answer)``; ``given(draft)`` is the prompt. */
  constructor(panel, { model, onChoose, onMove, onFound, onError, sampling, given }) {
    Object.assign(this, { model, onChoose, onFound, onError, sampling, given });
    this.newest = newestOnly();
    this.title = h("h3", { class: "title", tabindex: -1 });
    this.summary = h("p", { class: "hint" });
    const arrow = (label, sign, step) =>
      h("button", { type: "button", class: "quiet", "aria-label": label, onclick: () => onMove(step) }, sign);
    this.before = arrow("Token before", "←", -1);
    this.after = arrow("Token after", "→", 1);
    this.list = h("ol", { class: "candidates" });
    this.list.addEventListener("keydown", (event) => {
      const buttons = this.#buttons();
      moveWithArrows(event, buttons, (to) => buttons[to].focus());
    });
    this.keys = h("p", { class: "keys", hidden: true, "aria-hidden": "true" },
      h("span", {}, h("i", { class: "share own" }), "model"),
      h("span", {}, h("i", { class: "share sampled" }), "after sampling"));
    const head = h("div", { class: "row" }, this.title, h("span", { class: "row pair" }, this.before, this.after));
    panel.append(head, this.summary, this.keys, this.list);
  }

  /** Show the candidates for a token of a draft, or for the one that would come next. */
  async show(draft, index) {
    this.index = index;
    this.list.setAttribute("aria-busy", "true"); // what it shows belongs to another place
    const token = draft.tokens[index];
    this.before.disabled = index <= 0;
    this.after.disabled = index >= draft.tokens.length;
    this.#head(draft, index, token);
    if (index === 0) return this.#none(draft.head ? FAR : token ? FIRST : EMPTY);
    if (this.keys.hidden) this.summary.textContent = "The model is asked …";
    const settings = { token: token?.id ?? null, count: COUNT, ...this.sampling() };
    try {
      const found = await this.newest((signal) => this.model.candidates(this.given(draft.upTo(index)), settings, signal));
      if (found) this.#fill(found, draft, index);
    } catch (error) {
      this.onError(error);
    }
  }

  /** What is shown belongs to another text by now, and the model is busy. */
  wait() {
    const had = this.list.contains(document.activeElement);
    this.title.textContent = "The next token";
    this.before.disabled = this.after.disabled = true;
    this.#none(WRITING);
    if (had) this.title.focus();
  }

  focus() {
    (this.#buttons()[0] ?? this.title).focus();
  }

  #head(draft, index, token) {
    if (!token) this.title.textContent = "The next token";
    else this.title.replaceChildren(`Token ${whole(index + 1)} of ${whole(draft.tokens.length)}: `, h("code", {}, visible(token.bytes)));
  }

  #none(why) {
    this.newest(() => Promise.resolve());
    this.keys.hidden = true;
    this.list.replaceChildren();
    this.list.setAttribute("aria-busy", "false");
    this.summary.textContent = why;
  }

  #fill(found, draft, index) {
    const token = draft.tokens[index];
    const choose = (row) => index === this.index && this.onChoose(draft, index, received(row, "chosen"));
    const { chosen, candidates, kept, vocabulary } = found;
    this.onFound(found);
    const rank = chosen ? `It was number ${whole(chosen.rank)} of ${whole(vocabulary)} for the model. ` : "";
    this.summary.textContent = `${rank}Sampling leaves ${counted(kept, "token")} to choose from.`;
    this.keys.hidden = false;
    const rows = candidates.map((each) => ({ ...each, rank: null }));
    if (chosen && !rows.some((row) => row.id === chosen.id)) rows.push(chosen);
    const most = Math.max(...rows.flatMap((row) => [row.probability, row.sampled]));
    const had = this.#buttons().indexOf(document.activeElement);
    this.list.replaceChildren(...rows.map((row) => this.#row(row, row.id === token?.id, most, choose)));
    this.list.setAttribute("aria-busy", "false");
    if (had >= 0) this.#buttons()[Math.min(had, rows.length - 1)].focus();
  }

  #row(row, taken, most, choose) {
    const shown = visible(Uint8Array.from(row.bytes));
    const own = percent(row.probability);
    const sampled = row.sampled ? percent(row.sampled) : "–";
    const name = `${shown}: ${own} by the model, ${row.sampled ? sampled : "left out"} after sampling`;
    const label = taken ? `${name}; it stands in the text` : name;
    return h("li", { class: row.rank ? "apart" : "" },
      h("button", { type: "button", class: "quiet", "aria-label": label, "aria-current": taken && "true", onclick: () => choose(row) },
        h("code", { class: "clip" }, shown),
        h("span", { class: "bars" }, bar("own", row.probability / most), bar("sampled", row.sampled / most)),
        h("span", { class: "figure own" }, own),
        h("span", { class: "figure" }, sampled)));
  }

  #buttons() {
    return [...this.list.querySelectorAll("button")];
  }
}

function bar(kind, share) {
  const element = h("i", { class: `share ${kind}` });
  element.style.inlineSize = `${Math.max(share * 100, share > 0 ? 0.5 : 0)}%`;
  return element;
}
