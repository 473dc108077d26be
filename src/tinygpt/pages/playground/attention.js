// Where the heads of a layer look, as a picture one can walk about in.

import { visible } from "./bytes.js";
import { clamp, h, newestOnly, percent, stepOf } from "../shared/dom.js";
import { Heatmap } from "./heatmap.js";

const LENGTHS = [24, 48, 96, 128];
const STRONGEST = 5;
const EMPTY = "Write something, and see here where the model looks.";

export class Attention {
  constructor(panel, { model, onError, given }) {
    Object.assign(this, { model, panel, onError, given, newest: newestOnly(), head: 0, found: null, at: null });
    this.layer = h("select", { id: "layer" });
    this.length = h("select", { id: "window" }, ...LENGTHS.map((n) => new Option(`last ${n}`, n, n === 48, n === 48)));
    this.heads = h("div", { class: "heads row wrap", role: "group", "aria-label": "Heads" });
    this.canvas = h("canvas", { "aria-hidden": "true" });
    this.picture = new Heatmap(this.canvas);
    this.map = h("div", {
      class: "map", tabindex: 0, role: "application", "aria-roledescription": "attention map",
      "aria-label": "Attention map: arrow keys move from pair to pair of tokens", "aria-describedby": "pair",
    }, this.canvas);
    this.pair = h("p", { class: "pair-named", id: "pair", "aria-live": "polite" });
    this.strongest = h("ol", { class: "strongest" });
    this.note = h("p", { class: "hint" });
    this.empty = h("p", { class: "hint" }, EMPTY);
    this.shown = h(
      "div",
      { class: "attention", hidden: true },
      h("div", { class: "row wrap" },
        h("label", { class: "check" }, "Layer", this.layer), h("label", { class: "check" }, "Tokens", this.length)),
      this.heads,
      h("div", { class: "side-by-side" }, this.map, h("div", {}, this.pair, this.strongest, this.note)),
    );
    panel.append(this.empty, this.shown);
    this.#listen();
  }

  /** The model is known: so many layers. */
  describe({ config }) {
    this.layer.replaceChildren(...Array.from({ length: config.n_layer }, (_, i) => new Option(i)));
    this.layer.selectedIndex = config.n_layer - 1;
  }

  /** Show the attention over a draft; a token of it may be looked at. */
  async show(draft, selected = -1) {
    this.draft = draft;
    this.empty.hidden = !draft.isEmpty;
    this.shown.hidden = draft.isEmpty;
    this.empty.textContent = EMPTY;
    if (draft.isEmpty || !this.layer.value) return;
    const prompt = this.given(draft);
    const which = { layer: Number(this.layer.value), last: Number(this.length.value) };
    try {
      const found = await this.newest((signal) => this.model.attention(prompt, which, signal));
      if (found) this.#take(found, selected - (draft.tokens.length - prompt.ids.length));
    } catch (error) {
      this.onError(error);
    }
  }

  /** What is shown belongs to another text by now, and the model is busy. */
  wait() {
    this.newest(() => Promise.resolve());
    [this.empty.hidden, this.shown.hidden] = [false, true];
    this.empty.textContent = "The model is writing; where it looks comes when it has stopped.";
  }

  /** Draw again, in another width or other colours. */
  redraw() {
    if (this.found && !this.panel.hidden) this.#draw();
  }

  #listen() {
    for (const select of [this.layer, this.length]) {
      select.addEventListener("change", () => this.show(this.draft));
    }
    this.map.addEventListener("keydown", (event) => this.#key(event));
    for (const name of ["pointermove", "pointerdown"]) {
      this.canvas.addEventListener(name, (event) => {
        const pair = this.picture.pairAt(event.offsetX, event.offsetY);
        if (pair) this.#point(pair);
      });
    }
    document.addEventListener("themechange", () => this.redraw());
    new ResizeObserver(() => this.redraw()).observe(this.map);
  }

  #take(found, selected) {
    this.found = { ...found, labels: found.tokens.map((token) => visible(Uint8Array.from(token.bytes))) };
    this.head = Math.min(this.head, found.weights.length - 1);
    const row = selected - found.start;
    this.#lookFrom(found.tokens[row] ? row : found.tokens.length - 1);
    this.heads.replaceChildren(...found.weights.map((_, head) => this.#headButton(head)));
    this.#draw();
  }

  #headButton(head) {
    const pressed = String(head === this.head);
    return h("button", { type: "button", class: "head", "aria-pressed": pressed, onclick: () => this.#choose(head) },
      h("canvas", { "aria-hidden": "true" }), `Head ${head}`);
  }

  #choose(head) {
    this.head = head;
    [...this.heads.children].forEach((button, i) => button.setAttribute("aria-pressed", i === head));
    if (!this.pointed) this.#lookFrom(this.at[0]);
    this.#draw();
  }

  /** Until somebody points at another pair, it is that of a token and the one it looks at most. */
  #lookFrom(row) {
    this.pointed = false;
    this.at = [row, strongestOf(this.found.weights[this.head][row])[0]];
  }

  #draw() {
    if (!this.map.clientWidth) return;
    [...this.heads.children].forEach((button, head) =>
      new Heatmap(button.firstChild).draw(this.found.weights[head], [], 52));
    this.#drawMap();
  }

  #drawMap() {
    this.picture.draw(this.found.weights[this.head], this.found.labels, this.map.clientWidth, this.at);
    this.#name();
  }

  #point(pair) {
    if (String(pair) === String(this.at)) return;
    [this.at, this.pointed] = [pair, true];
    this.#drawMap();
  }

  /** The pair in words, and where else its first token looks. */
  #name() {
    const { weights, before, labels, start, position } = this.found;
    const [row, column] = this.at;
    const line = weights[this.head][row];
    this.pair.replaceChildren(
      named(labels, row), " looks at ", named(labels, column), ": ", h("strong", {}, percent(line[column])),
    );
    this.strongest.replaceChildren(
      ...strongestOf(line).slice(0, STRONGEST).map((j) =>
        h("li", { class: "row" }, named(labels, j), h("span", { class: "figure" }, percent(line[j])))),
    );
    const further = before[this.head][row];
    const hidden = start > position ? ` ${percent(further)} goes to tokens before these.` : "";
    this.note.textContent = `Layer ${this.found.layer}, head ${this.head}.${hidden}`;
  }

  #key(event) {
    const step = this.at && stepOf(event);
    if (!step) return;
    const row = clamp(this.at[0] + step[1], 0, this.found.tokens.length - 1);
    this.#point([row, clamp(this.at[1] + step[0], 0, row)]);
  }
}

const named = (labels, i) => h("code", {}, labels[i]);

/** Columns of a row, those with the largest weights first. */
function strongestOf(row) {
  return row.map((_, j) => j).sort((a, b) => row[b] - row[a]);
}
