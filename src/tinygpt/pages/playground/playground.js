// The playground: one text, a model that goes on from it, and a look inside.

import { Attention } from "./attention.js";
import { Candidates } from "./candidates.js";
import { modelCard } from "./card.js";
import { Cuts } from "./cuts.js";
import { byId, counted, debounced, newestOnly, whole } from "../shared/dom.js";
import { Draft, received } from "./draft.js";
import { Editor } from "./editor.js";
import { History, historyKey } from "./history.js";
import { keepText, keptText } from "./kept.js";
import { events, post } from "../shared/net.js";
import { Sampling } from "./sampling.js";
import { Tabs } from "./tabs.js";

class Playground {
  constructor() {
    this.kept = keptText();
    this.draft = this.kept?.draft ?? new Draft();
    this.selected = this.draft.tokens.length; // the token that is looked at, or the one to come
    this.history = new History();
    this.writing = null; // the AbortController of what is being written
    this.last = null; // what was written last: { before, after }
    this.frame = null; // a timer: what has come will be shown
    this.pause = 0; // milliseconds until then
    this.waiting = null; // a timer: what is shown of the model belongs to another text by now
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
      given: (draft) => draft.given(this.most),
    });
    this.attention = new Attention(byId("attention"), { onError, given: (draft) => draft.given(this.most) });
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
    this.keepSoon = debounced(300, () => this.#keep());
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
      if (this.kept && this.kept.model !== this.#identity()) {
        this.draft = Draft.of(this.draft.text); // its ids are those of another model
      }
      this.#meter();
      this.#cut();
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
    if (!this.writing) this.#return(this.history.back(this.#state()), "Undone.");
  }

  redo() {
    if (!this.writing) this.#return(this.history.forward(this.#state()), "Done again.");
  }

  #return(state, told) {
    if (!state) return;
    this.#forgive();
    this.last = state.last;
    this.#set(state.draft, state.selected);
    this.#say(told);
  }

  /** Another token in the place of one, and nothing behind it. */
  branch(index, token) {
    if (this.writing) return;
    this.history.keep(this.#state());
    const more = index < this.draft.tokens.length - 1;
    this.#set(this.draft.upTo(index).with(token));
    this.#say(more ? "Chosen. What came after it is gone; Undo brings it back." : "Chosen.");
  }

  /** Look at a token; their number means the one that would come next. */
  select(index) {
    if (index < 0 || index > this.draft.tokens.length) return;
    this.selected = index;
    this.editor.select(index);
    this.candidates.index = index; // from now on a choice among those of another place is none
    this.lookSoon();
  }

  // ---- writing ----

  async #write(before, seed) {
    this.#forgive();
    this.#say("");
    this.#busy(new AbortController());
    this.draft = before;
    this.waiting = setTimeout(() => this.#look(), 300); // for the flash of a short text nothing changes
    let count = 0;
    let began = 0;
    try {
      const settings = { ...this.sampling.values, max_tokens: this.sampling.maxTokens, seed };
      for await (const event of events("api/generate", { ...before.given(this.most), ...settings }, this.writing.signal)) {
        if (event.prompt) this.draft = before = before.cut(event.prompt);
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
    clearTimeout(this.waiting);
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
    this.#say(this.draft.head ? LONG : ""); // what was said of the text before is so no longer
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
    if (this.draft.isCut || this.writing || !this.model) return this.#look();
    const draft = this.draft;
    try {
      const found = await this.cutting((signal) => post("api/tokens", { text: draft.tail }, signal));
      if (!found || this.draft !== draft) return undefined;
      this.draft = draft.cut(found.tokens);
      if (this.draft.head) this.#say(LONG);
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
    this.keepSoon();
  }

  /** Bring the open panel up to date; while the model writes it cannot be asked for more. */
  #look() {
    const panel = { candidates: this.candidates, attention: this.attention, cuts: this.cuts }[this.tabs.current];
    if (this.writing) panel?.wait();
    else if (this.draft.isCut && this.model) panel?.show(this.draft, this.selected);
  }

  #keep() {
    keepText(this.draft, this.model ? this.#identity() : this.kept?.model);
  }

  /** What tells this model from others whose tokens may be others. */
  #identity() {
    const { name, parameters, tokenizer, step } = this.model;
    return JSON.stringify([name, parameters, tokenizer, step]);
  }

  /** The most ids that the server takes. */
  get most() {
    return this.model?.limits.prompt_tokens;
  }

  #state() {
    return { draft: this.draft, selected: this.selected, last: this.last };
  }

  // ---- what is said ----

  #meter(speed = "") {
    const { length } = this.draft.tokens;
    const context = this.model?.config.block_size;
    const sees = context && length > context ? `, of which the model sees the last ${whole(context)}` : "";
    const end = this.draft.head ? "the last " : "";
    const size = this.draft.isCut || this.writing ? `${end}${counted(length, "token")}${sees}` : "";
    byId("meter").textContent = [speed, size].filter(Boolean).join(" · ");
  }

  #buttons() {
    byId("undo").disabled = !this.history.canUndo || Boolean(this.writing);
    byId("redo").disabled = !this.history.canRedo || Boolean(this.writing);
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
    byId("redo").addEventListener("click", () => this.redo());
    document.addEventListener("keydown", (event) => this.#key(event));
    byId("text").addEventListener("beforeinput", (event) => {
      const what = { historyUndo: "undo", historyRedo: "redo" }[event.inputType];
      if (!what) return;
      event.preventDefault();
      this[what]();
    });
    window.addEventListener("pagehide", () => this.#keep());
    document.addEventListener("visibilitychange", () => document.hidden && this.#keep());
  }

  #key(event) {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    const command = event.ctrlKey || event.metaKey;
    const what = event.target.matches("input") ? undefined : historyKey(event); // fields have their own
    if (event.key === "Escape" && this.writing) this.stop();
    else if (command && event.key === "Enter" && !this.writing) this.continue();
    else if (what) this[what]();
    else return;
    event.preventDefault();
  }
}

const LONG = "All of this text stays here; the model is given its end, which is all that it sees.";

function rate(count, began) {
  const seconds = (performance.now() - began) / 1000;
  return count > 1 && seconds > 0.05 ? `${whole(Math.round((count - 1) / seconds))} tokens/s` : "";
}

const KEYS = /Mac|iP(hone|ad)/.test(navigator.platform) ? "⌘ ↵" : "Ctrl ↵";

// On a narrow screen the settings come folded: the text is what one came for.
if (matchMedia("(max-width: 56rem)").matches) byId("settings").open = false;
byId("continue").querySelector("[data-keys]").textContent = KEYS;
new Playground().start();
