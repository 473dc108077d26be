// The text as the tokenizer cuts it.

import { visible } from "./bytes.js";
import { byId, clamp, counted, h, stepOf, whole } from "../shared/dom.js";

const MOST = 1000;
const HUES = 6;

export class Cuts {
  /** ``onSelect(index)`` when a token is looked at, ``onOpen(index)`` when it is opened. */
  constructor(panel, { onSelect, onOpen }) {
    Object.assign(this, { onSelect, onOpen });
    this.summary = h("p", { class: "hint" });
    this.note = h("p", { class: "hint" });
    const ids = h("input", { type: "checkbox", id: "show-ids", checked: true,
      onchange: () => this.list.classList.toggle("without-ids", !ids.checked) });
    this.list = h("div", { class: "cuts", role: "listbox", "aria-label": "Tokens of the text", "aria-orientation": "horizontal", tabindex: 0 });
    this.list.addEventListener("keydown", (event) => this.#key(event));
    this.list.addEventListener("click", (event) => this.#click(event));
    this.list.addEventListener("dblclick", () => this.selected >= 0 && onOpen(this.selected));
    panel.append(h("div", { class: "row" }, this.summary, h("label", { class: "check" }, ids, "Ids")), this.list, this.note);
  }

  /** Show the tokens of a draft, of a long one the last. */
  show(draft, selected) {
    this.first = Math.max(0, draft.tokens.length - MOST);
    if (this.draft !== draft) {
      this.draft = draft;
      this.list.replaceChildren(...draft.tokens.slice(this.first).map((t, i) => chip(t, this.first + i)));
      this.summary.textContent = summary(draft);
    }
    this.select(selected);
  }

  /** While the model writes, what was cut before is no longer the text. */
  wait() {
    this.draft = null;
    this.list.replaceChildren();
    this.summary.textContent = "The model is writing; its tokens come when it has stopped.";
    this.note.textContent = "";
  }

  select(index) {
    this.selected = this.draft?.tokens[index] ? index : -1;
    this.list.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    const option = byId(`cut-${this.selected}`);
    option?.setAttribute("aria-selected", "true");
    if (option) this.list.setAttribute("aria-activedescendant", option.id);
    else this.list.removeAttribute("aria-activedescendant");
    this.note.textContent = option ? describe(this.draft.tokens[index], index) : NOTHING;
    if (document.activeElement === this.list) option?.scrollIntoView({ block: "nearest" });
  }

  #key(event) {
    if (!this.draft?.tokens.length) return undefined;
    if (event.key === "Enter" && this.selected >= 0) return this.onOpen(this.selected);
    const last = this.draft.tokens.length - 1;
    const at = this.selected < 0 ? last : this.selected;
    const step = stepOf(event);
    return step && this.#go(clamp(at + step[0] + step[1], this.first, last));
  }

  #go(index) {
    this.select(index); // at once: the next key may come before anybody has answered
    this.onSelect(index);
  }

  #click(event) {
    const option = event.target.closest("[role=option]");
    if (option) this.#go(Number(option.dataset.index));
  }
}

const NOTHING = "Choose a token to see its bytes; Enter or a double click opens its candidates.";

function chip(token, index) {
  const shown = visible(token.bytes);
  const about = { "aria-selected": "false", "aria-label": `${shown}, id ${token.id}`, "data-index": index };
  return h("span", { role: "option", id: `cut-${index}`, class: `cut hue-${index % HUES}`, ...about },
    h("span", { class: "piece" }, shown), h("span", { class: "id" }, String(token.id)));
}

function describe(token, index) {
  const hex = [...token.bytes].map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
  const origin = { model: "written by the model", chosen: "chosen by you", typed: "cut from the text" }[token.origin];
  return `Token ${whole(index + 1)}, ${origin}: id ${token.id}, ${counted(token.bytes.length, "byte")}: ${hex}`;
}

function summary({ tokens, head }) {
  if (!tokens.length) return "Nothing to cut yet.";
  const bytes = tokens.reduce((sum, token) => sum + token.bytes.length, 0);
  const rest = tokens.length > MOST ? `, of which the last ${whole(MOST)} are shown` : "";
  return `${counted(tokens.length, "token")}${rest}: ${counted(bytes, "byte")}, ${(bytes / tokens.length).toFixed(1)} a token.${head ? " The text begins before them." : ""}`;
}
