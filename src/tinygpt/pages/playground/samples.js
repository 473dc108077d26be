// Several continuations of one text side by side, of which one can be taken.

import { h } from "../shared/dom.js";

export class Samples {
  /** ``onTake({ before, draft, settings })`` when one of them is chosen. */
  constructor(panel, onTake) {
    Object.assign(this, { panel, onTake, all: [] });
  }

  /** Begin one column for each of the settings. */
  open(before, settings) {
    this.panel.hidden = false;
    this.all = settings.map((each, i) => {
      const sample = { before, draft: before, settings: each };
      sample.text = h("p", { class: "sample-text", dir: "auto", "aria-label": `Sample ${i + 1}` });
      sample.button = h("button", { type: "button", disabled: true, onclick: () => this.#take(sample) }, `Take sample ${i + 1}`);
      return sample;
    });
    const columns = this.all.map(({ text, button }) => h("article", { class: "card sample" }, text, button));
    this.panel.replaceChildren(...columns);
  }

  /** Another state of one of them; ``isPrompt`` for the first, in which only the prompt is there. */
  show(i, draft, isPrompt) {
    const sample = this.all[i];
    sample.draft = draft;
    if (isPrompt) sample.before = draft;
    sample.text.textContent = draft.text.slice(sample.before.text.length);
  }

  /** Tokens of all of them. */
  get length() {
    return this.all.reduce((sum, { before, draft }) => sum + draft.tokens.length - before.tokens.length, 0);
  }

  /** No more will come. */
  finish() {
    for (const { button } of this.all) button.disabled = false;
  }

  /** They belong to a text that is no longer there. */
  close() {
    this.panel.hidden = true;
    this.panel.replaceChildren();
  }

  #take(sample) {
    this.close();
    this.onTake(sample);
  }
}
