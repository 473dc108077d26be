// The playground: one text, a model that goes on from it, and a look inside.

import { Attention } from "./attention.js";
import { Candidates } from "./candidates.js";
import { modelCard } from "./card.js";
import { Cuts } from "./cuts.js";
import { byId, counted, debounced, newestOnly, whole } from "./dom.js";
import { Draft, received } from "./draft.js";
import { Editor } from "./editor.js";
import { History } from "./history.js";
import { events, post } from "./net.js";
import { Sampling } from "./sampling.js";
import { Tabs } from "./tabs.js";

class Playground {
  constructor() {
    this.draft = new Draft();
    this.selected = 0; // the token that is looked at; their number means the one to come
    this.history = new History();
    this.writing = null; // the AbortController of what is being written
    this.last = null; // what was written last: { before, after }
    this.frame = null; // a timer: what has come will be shown
    this.pause = 0; // milliseconds until then
    this.cutting = newestOnly();
    this.editor = new Editor(byId("text"), byId("mirror"), byId("scroller"), {
      onInput: (value) => this.#typed(value),
      onPlace: (index) => this.select(index),
    });
    this.sampling = new Sampling(byId("sampling"), debounced(150, () => this.#look()));
    const onError = (error) => this.#fail(error);
    this.candidates = new Candidates(byId("candidates"), {
      onError,
      onChoose: (draft, index, token) => draft === this.draft && this.branch(index, token),
      onMove: (step) => this.select(this.selected + step),
      sampling: () => this.sampling.values,
    });
    this.attention = new Attention(byId("attention"), { onError });
    this.cuts = new Cuts(byId("cuts"), {
      onSelect: (index) => this.select(index),
      onOpen: () => {
        this.tabs.open("candidates");
        this.candidates.focus();
      },
    });
    this.tabs = new Tabs(document.querySelector("[role=tablist]"), () => this.#look());
    this.cutSoon = debounced(250, () => this.#cut());
    this.lookSoon = debounced(80, () => this.#look());
    this.#listen();
    this.#show();
  }

  async start() {
    try {
      const model = await post("api/model", {});
      byId("run").textContent = model.name;
      document.title = `${model.name} · TinyGPT`;
      byId("card").replaceChildren(...modelCard(model));
      byId("pages").hidden = !model.dashboard;
      this.model = model;
      this.sampling.limit(model.limits.max_tokens);
      this.attention.describe(model);
      this.#meter();
      this.#look();
    } catch (error) {
      this.#fail(error);
    }
  }

  // ---- what one can do ----

  continue() {
    this.history.keep(this.#state());
    const before = this.draft.isEmpty ? new Draft([], "\n") : this.draft;
    return this.#write(before, this.sampling.nextSeed());
  }

  regenerate() {
    if (!this.last || this.draft !== this.last.after) return undefined;
    this.history.keep(this.#state());
    return this.#write(this.last.before, this.sampling.nextSeed());
  }

  stop() {
    this.writing?.abort();
  }

  undo() {
    const state = this.writing ? undefined : this.history.back();
    if (!state) return;
    this.last = state.last;
    this.#set(state.draft, state.selected);
    this.#say("Undone.");
  }

  /** Another token in the place of one, and nothing behind it. */
  branch(index, token) {
    if (this.writing) return;
    this.history.keep(this.#state());
    this.#set(this.draft.upTo(index).with(token));
    this.#say("Chosen. What came after it is gone.");
  }

  /** Look at a token; their number means the one that would come next. */
  select(index) {
    if (index < 0 || index > this.draft.tokens.length) return;
    this.selected = index;
    this.editor.select(index);
    this.lookSoon();
  }

  // ---- writing ----

  async #write(before, seed) {
    this.#forgive();
    this.#busy(new AbortController());
    this.draft = before;
    let count = 0;
    let began = 0;
    try {
      const settings = { ...this.sampling.values, max_tokens: this.sampling.maxTokens, seed };
      for await (const event of events("api/generate", { ...before.prompt, ...settings }, this.writing.signal)) {
        if (event.prompt) this.draft = before = cut(before, event.prompt);
        for (const token of event.tokens ?? []) {
          this.draft = this.draft.with(received(token, "model"));
          began ||= performance.now();
          count += 1;
        }
        this.#frame(count, began);
      }
      this.#say(`${counted(count, "token")} written.`);
    } catch (error) {
      if (this.writing.signal.aborted) this.#say(`Stopped after ${counted(count, "token")}.`);
      else this.#fail(error);
    }
    this.#busy(null);
    const same = this.last?.after.text === this.draft.text && this.sampling.seedIsHeld;
    if (same && count) this.#say("The same seed wrote the same text again.");
    this.last = { before, after: this.draft };
    this.#set(this.draft);
    this.#meter(rate(count, began));
  }

  /** Show what has come, in a fraction of the time: most of it is the model's. */
  #frame(count, began) {
    this.frame ??= setTimeout(() => {
      const start = performance.now();
      if (this.writing) {
        this.editor.show(this.draft, { follow: true });
        this.#meter(rate(count, began));
      }
      requestAnimationFrame(() => {
        this.pause = Math.min(4 * (performance.now() - start), 500); // long where nobody looks
        this.frame = null;
      });
    }, this.pause);
  }

  #busy(controller) {
    this.writing = controller;
    this.editor.busy = Boolean(controller);
    byId("continue").querySelector("[data-label]").textContent = controller ? "Stop" : "Continue";
    byId("continue").querySelector("[data-keys]").textContent = controller ? "Esc" : KEYS;
    document.body.classList.toggle("busy", Boolean(controller));
    this.#buttons();
  }

  // ---- the text ----

  #typed(value) {
    this.history.keepBeforeTyping(this.#state());
    this.#forgive();
    this.draft = this.draft.edited(value);
    this.last = null;
    this.#show();
    this.cutSoon();
  }

  /** Another draft, with the caret at its end. */
  #set(draft, selected = draft.tokens.length) {
    this.draft = draft;
    this.selected = selected;
    this.#show({ follow: true });
    this.editor.caretAt(selected);
    if (draft.isCut) this.lookSoon();
    else this.cutSoon();
  }

  /** Have the server cut what is not cut yet. */
  async #cut() {
    if (this.draft.isCut || this.writing) return this.#look();
    const draft = this.draft;
    try {
      const found = await this.cutting((signal) => post("api/tokens", { text: draft.tail }, signal));
      if (!found || this.draft !== draft) return undefined;
      this.draft = cut(draft, found.tokens);
      this.selected = this.draft.at(byId("text").selectionStart);
      this.#show();
      return this.#look();
    } catch (error) {
      return this.#fail(error);
    }
  }

  #show(how) {
    this.editor.show(this.draft, how);
    this.editor.select(this.selected);
    this.#buttons();
    this.#meter();
  }

  /** Bring the open panel up to date. */
  #look() {
    if (this.writing || !this.draft.isCut || !this.model) return;
    const { draft, selected } = this;
    if (this.tabs.current === "candidates") this.candidates.show(draft, selected);
    if (this.tabs.current === "attention") this.attention.show(draft, selected);
    if (this.tabs.current === "cuts") this.cuts.show(draft, selected);
  }

  #state() {
    return { draft: this.draft, selected: this.selected, last: this.last };
  }

  // ---- what is said ----

  #meter(speed = "") {
    const { length } = this.draft.tokens;
    const context = this.model?.config.block_size;
    const sees = context && length > context ? `, of which the model sees the last ${whole(context)}` : "";
    const size = this.draft.isCut || this.writing ? `${counted(length, "token")}${sees}` : "";
    byId("meter").textContent = [speed, size].filter(Boolean).join(" · ");
  }

  #buttons() {
    byId("undo").disabled = this.history.isEmpty || Boolean(this.writing);
    byId("regenerate").disabled = Boolean(this.writing) || !this.last || this.draft !== this.last.after;
  }

  #say(text) {
    byId("status").textContent = text;
  }

  #fail(error) {
    byId("error").textContent = error.message;
    byId("error").hidden = false;
  }

  #forgive() {
    byId("error").hidden = true;
    byId("error").textContent = "";
  }

  #listen() {
    byId("continue").addEventListener("click", () => (this.writing ? this.stop() : this.continue()));
    byId("regenerate").addEventListener("click", () => this.regenerate());
    byId("undo").addEventListener("click", () => this.undo());
    document.addEventListener("keydown", (event) => this.#key(event));
    byId("text").addEventListener("beforeinput", (event) => {
      if (event.inputType !== "historyUndo") return;
      event.preventDefault();
      this.undo();
    });
  }

  #key(event) {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    const command = event.ctrlKey || event.metaKey;
    if (event.key === "Escape" && this.writing) this.stop();
    else if (command && event.key === "Enter" && !this.writing) this.continue();
    else if (command && event.key === "z" && !event.shiftKey && event.target === byId("text")) this.undo();
    else return;
    event.preventDefault();
  }
}

/** The draft with its tail cut into tokens. */
const cut = (draft, tokens) =>
  new Draft(draft.tokens).with(...tokens.map((token) => received(token, "typed")));

function rate(count, began) {
  const seconds = (performance.now() - began) / 1000;
  return count > 1 && seconds > 0.05 ? `${whole(Math.round((count - 1) / seconds))} tokens/s` : "";
}

const KEYS = /Mac|iP(hone|ad)/.test(navigator.platform) ? "⌘ ↵" : "Ctrl ↵";

// On a narrow screen the settings come folded: the text is what one came for.
if (matchMedia("(max-width: 56rem)").matches) byId("settings").open = false;
byId("continue").querySelector("[data-keys]").textContent = KEYS;
new Playground().start();
