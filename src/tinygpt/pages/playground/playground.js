// The playground: one text, a model that goes on from it, and a look inside.

import { Attention } from "./attention.js";
import { Candidates } from "./candidates.js";
import { Chat } from "./chat.js";
import { modelCard } from "./card.js";
import { Cuts } from "./cuts.js";
import { Draft, received } from "./draft.js";
import { Editor } from "./editor.js";
import { History, historyKey } from "./history.js";
import { keepText, keptText, linkTo, readLink } from "./kept.js";
import { Sampling } from "./sampling.js";
import { Samples } from "./samples.js";
import { Story } from "./story.js";
import { Tabs } from "./tabs.js";
import { listenToTools } from "./tools.js";
import { byId, counted, debounced, h, newestOnly, whole } from "../shared/dom.js";

export class Playground {
  /** ``model`` does what remote.js says. */
  constructor(model) {
    this.model = model;
    this.card = null; // until the model has started
    this.kept = keptText();
    this.draft = this.kept?.draft ?? new Draft();
    this.selected = this.draft.tokens.length; // the token that is looked at, or the one to come
    this.history = new History();
    this.writing = null; // the AbortController of what is being written
    this.last = null; // what was written last: { before, after, settings }
    this.frame = null; // a timer: what has come will be shown
    this.pause = 0; // milliseconds until then
    this.cutting = newestOnly();
    this.editor = new Editor(byId("text"), byId("mirror"), byId("scroller"), {
      onInput: (value) => this.#typed(value),
      onPlace: (index) => this.select(index),
    });
    this.sampling = new Sampling(byId("sampling"), debounced(150, () => this.#look()));
    const asking = { model, onError: (error) => this.fail(error), given: (draft) => draft.given(this.most) };
    this.candidates = new Candidates(byId("candidates"), {
      ...asking,
      onChoose: (draft, index, token) => {
        if (this.chat.isOpen) this.chat.branch(draft, index, token);
        else if (draft === this.draft) this.branch(index, token);
      },
      onMove: (step) => this.select(this.#seen.selected + step),
      onFound: (found) => this.story.show(this.#seen.draft, this.card, found),
      sampling: () => this.sampling.values,
    });
    this.attention = new Attention(byId("attention"), asking);
    this.cuts = new Cuts(byId("cuts"), {
      onSelect: (index) => this.select(index),
      onOpen: () => {
        this.tabs.open("candidates");
        this.candidates.focus();
      },
    });
    this.samples = new Samples(byId("samples"), (sample) => this.#take(sample));
    this.lookSoon = debounced(80, () => this.#look());
    this.tabs = new Tabs(byId("inside-tabs"), () => this.#look());
    this.keepSoon = debounced(300, () => this.keep());
    this.chat = new Chat(this, () => this.lookSoon());
    this.ways = new Tabs(byId("ways"), () => this.#look());
    if (this.chat.kept?.isOpen) this.ways.open("talk");
    this.story = new Story(byId("story"), (part) => this.#follow(part));
    this.cutSoon = debounced(250, () => this.#cut());
    this.#listen();
    this.#show();
  }

  /** Start the model; rejects if it cannot. */
  async start() {
    const card = (this.card = await this.model.start());
    byId("run").textContent = card.name;
    document.title = byId("title") ? card.name : `${card.name} · TinyGPT`;
    byId("card").replaceChildren(...modelCard(card));
    byId("pages")?.toggleAttribute("hidden", !card.dashboard);
    byId("tab-attention").hidden = !card.can.attention;
    byId("code").hidden = !card.can.api;
    this.sampling.describe(card);
    this.attention.describe(card);
    if (this.kept && this.kept.model !== this.identity) {
      this.draft = Draft.of(this.draft.text); // its ids are those of another model
    }
    this.#buttons();
    this.chat.start();
    this.#meter();
    this.#offerBeginnings();
    document.documentElement.dataset.ready = Math.round(performance.now());
    const link = readLink();
    if (link) this.sampling.take(link.settings);
    if (link && !this.kept) this.#writeFrom(link.prompt); // after a reload what became of it is there
    else this.#cut();
  }

  // ---- what one can do ----

  /** Go on from the text, by ``changes.max_tokens`` tokens where that is given. */
  continue(changes) {
    this.#remember();
    const before = this.draft.isEmpty ? new Draft([], "\n") : this.draft;
    const count = changes ? 1 : this.sampling.samples;
    return count > 1 ? this.#several(before, count) : this.#write(before, { ...this.sampling.next(), ...changes });
  }

  regenerate() {
    if (!this.last || this.draft !== this.last.after) return undefined;
    this.#remember();
    return this.#write(this.last.before, this.sampling.next());
  }

  stop() {
    this.writing?.abort();
  }

  undo() {
    this.#return(this.history.past, "Undone.");
  }

  redo() {
    this.#return(this.history.future, "Done again.");
  }

  #return(from, said) {
    const state = this.writing ? null : this.history.step(this.#state(), from);
    if (!state) return;
    this.#forgive();
    this.last = state.last;
    this.samples.close();
    this.#set(state.draft, state.selected);
    this.say(said);
  }

  /** Another token in the place of one, and nothing behind it. */
  branch(index, token) {
    if (this.writing) return;
    this.#remember();
    const more = index < this.draft.tokens.length - 1;
    this.#set(this.draft.upTo(index).with(token));
    this.say(more ? "Chosen. What came after it is gone; Undo brings it back." : "Chosen.");
  }

  /** Look at a token; their number means the one that would come next. */
  select(index) {
    if (this.chat.isOpen) return this.chat.select(index);
    if (index < 0 || index > this.draft.tokens.length) return;
    this.selected = index;
    this.editor.select(index);
    this.candidates.index = index; // from now on a choice among those of another place is none
    this.lookSoon();
  }

  /** A link that writes the text that is there again, or else goes on from it. */
  get link() {
    const { last } = this;
    const isWritten = last?.after === this.draft && last.after !== last.before;
    return isWritten ? linkTo(last.before.text, last.fields) : linkTo(this.draft.text, this.sampling.fields);
  }

  // ---- writing ----

  async #write(before, settings) {
    const fields = { ...this.sampling.fields, max_tokens: settings.max_tokens };
    const waiting = setTimeout(() => this.#look(), 300); // for the flash of a short text nothing changes
    const length = () => this.draft.tokens.length - before.tokens.length;
    let began = 0;
    this.draft = before;
    this.samples.close();
    await this.busily(async (signal) => {
      for await (const { draft, isPrompt } of this.#drafts(before, settings, signal)) {
        if (isPrompt) before = draft;
        else began ||= this.#first();
        this.draft = draft;
        this.#frame(length(), began);
      }
      const same = this.last?.after.text === this.draft.text && this.sampling.seedIsHeld && length();
      const end = length() < settings.max_tokens ? " The text ends here." : "";
      this.say(same ? "The same seed wrote the same text again." : `${counted(length(), "token")} written.${end}`);
    }, length);
    clearTimeout(waiting);
    this.last = { before, after: this.draft, fields };
    this.#set(this.draft);
    this.#meter(rate(length(), began));
    document.documentElement.dataset.pace = length() / ((performance.now() - began) / 1000);
  }

  /** Several continuations side by side, of which one can be taken. */
  async #several(before, count) {
    const settings = Array.from({ length: count }, (_, i) => this.sampling.next(i));
    this.samples.open(before, settings);
    await this.busily(async (signal) => {
      await Promise.all(settings.map(async (each, i) => {
        for await (const { draft, isPrompt } of this.#drafts(before, each, signal)) {
          this.samples.show(i, draft, isPrompt);
        }
      }));
      this.say(`${count} samples written. Take one, or go on.`);
    }, () => this.samples.length);
    this.samples.finish();
  }

  #take({ before, draft, settings }) {
    this.last = { before, after: draft, fields: { ...this.sampling.fields, seed: settings.seed } };
    this.#set(draft);
    this.say("Taken.");
  }

  /** What a text becomes: first with its prompt cut, then longer and longer. */
  async *#drafts(draft, settings, signal) {
    for await (const event of this.model.generate(draft.given(this.most), settings, signal)) {
      if (event.prompt) draft = draft.cut(event.prompt);
      else if (event.tokens?.length) draft = draft.with(...event.tokens.map((token) => received(token, "model")));
      else continue;
      yield { draft, isPrompt: Boolean(event.prompt) };
    }
  }

  /** Do something that can be stopped; ``length()`` is the number of tokens that have come of it. */
  async busily(work, length) {
    this.#forgive();
    this.say("");
    this.#busy(new AbortController());
    const { signal } = this.writing;
    try {
      await work(signal);
    } catch (error) {
      if (signal.aborted) this.say(`Stopped after ${counted(length(), "token")}.`);
      else this.fail(error);
    }
    this.#busy(null);
  }

  #first() {
    const now = performance.now();
    document.documentElement.dataset.first ??= Math.round(now);
    return now;
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
        this.pause = Math.min(4 * (performance.now() - start), 500); // long where the tab is hidden
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
    this.samples.close();
    this.#show();
    this.cutSoon();
    this.say(this.draft.head ? LONG : ""); // what was said of the text before is so no longer
  }

  #writeFrom(prompt) {
    if (!this.draft.isEmpty) this.#remember();
    this.#set(Draft.of(prompt));
    this.continue();
  }

  async #offerBeginnings() {
    const beginnings = await this.model.beginnings().catch(() => []);
    const begin = (text) => {
      this.#remember();
      this.#set(Draft.of(text));
      byId("text").focus();
    };
    const buttons = beginnings.map((text) => h("button", { type: "button", class: "quiet clip", onclick: () => begin(text) }, text.trim()));
    byId("beginnings").append(...buttons);
    this.#buttons();
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

  /** Have the model cut what is not cut yet. */
  async #cut() {
    const { draft } = this;
    if (draft.isCut || this.writing || !this.card) return this.#look();
    try {
      const tokens = await this.cutting((signal) => this.model.tokens(draft.tail, signal));
      if (!tokens || this.draft !== draft) return undefined;
      this.draft = draft.cut(tokens);
      if (this.draft.head) this.say(LONG);
      this.selected = this.draft.at(byId("text").selectionStart);
      this.#show();
      return this.#look();
    } catch (error) {
      return this.fail(error);
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
    else if (this.#seen.draft.isCut && this.card) panel?.show(this.#seen.draft, this.#seen.selected);
  }

  /** What the panels look into: the text, or an answer of the talk. */
  get #seen() {
    return this.chat.isOpen ? this.chat.seen : this;
  }

  /** A part of the story was pressed. */
  #follow(part) {
    if (part === "text") byId(this.chat.isOpen ? "question" : "text").focus();
    else if (part !== "draw") this.tabs.open(part === "layers" ? (this.card?.can.attention ? "attention" : "card") : part);
    else if (this.card && !this.writing && !this.chat.isOpen) this.continue({ max_tokens: 1 });
  }

  keep() {
    keepText(this.draft, this.identity ?? this.kept?.model);
    this.chat.keep();
  }

  /** What tells this model from others whose tokens may be others; undefined until it has started. */
  get identity() {
    if (!this.card) return undefined;
    const { name, parameters, tokenizer, step } = this.card;
    return JSON.stringify([name, parameters, tokenizer, step]);
  }

  /** The most ids that the model takes. */
  get most() {
    return this.card?.limits.prompt_tokens;
  }

  #state() {
    return { draft: this.draft, selected: this.selected, last: this.last };
  }

  #remember() {
    this.history.keep(this.#state());
  }

  // ---- what is said ----

  #meter(speed = "") {
    const { length } = this.draft.tokens;
    const context = this.card?.config.block_size;
    const sees = context && length > context ? `, of which the model sees the last ${whole(context)}` : "";
    const end = this.draft.head ? "the last " : "";
    const size = this.draft.isCut || this.writing ? `${end}${counted(length, "token")}${sees}` : "";
    byId("meter").textContent = [speed, size].filter(Boolean).join(" · ");
    this.story.show(this.draft, this.card);
  }

  #buttons() {
    const busy = Boolean(this.writing);
    byId("continue").disabled = !this.card;
    byId("undo").disabled = !this.history.past.length || busy;
    byId("redo").disabled = !this.history.future.length || busy;
    byId("regenerate").disabled = busy || !this.last || this.draft !== this.last.after;
    byId("beginnings").hidden = busy || !this.draft.isEmpty || byId("beginnings").childElementCount < 2;
    for (const button of byId("tools").children) button.disabled = busy || !this.card;
  }

  say(text) {
    byId("status").textContent = text;
  }

  fail(error) {
    byId("error").textContent = error.message;
    byId("error").hidden = false;
  }

  #forgive() {
    byId("error").hidden = true;
    byId("error").textContent = "";
  }

  #listen() {
    byId("continue").addEventListener("click", () => (this.writing ? this.stop() : this.continue()));
    for (const name of ["regenerate", "undo", "redo"]) byId(name).addEventListener("click", () => this[name]());
    listenToTools(this);
    byId("colours").addEventListener("change", ({ target }) => this.editor.setColours(target.checked));
    document.addEventListener("keydown", (event) => this.#key(event));
    byId("text").addEventListener("beforeinput", (event) => {
      if (!/^history(Undo|Redo)$/.test(event.inputType)) return;
      event.preventDefault();
      this[event.inputType.slice(7).toLowerCase()]();
    });
    window.addEventListener("pagehide", () => this.keep());
    document.addEventListener("visibilitychange", () => document.hidden && this.keep());
    window.addEventListener("hashchange", () => { // another link in the same tab loads nothing anew
      const link = this.card && !this.writing && readLink();
      if (!link) return;
      this.sampling.take(link.settings);
      this.#writeFrom(link.prompt);
    });
  }

  #key(event) {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    const command = event.ctrlKey || event.metaKey;
    const what = this.chat.isOpen || event.target.matches("input, #stop") ? undefined : historyKey(event); // fields have their own
    if (event.key === "Escape" && this.writing) this.stop();
    else if (command && event.key === "Enter" && !this.writing && this.card && !this.chat.isOpen) this.continue();
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

// On a narrow screen the settings come folded: the text comes first.
if (matchMedia("(max-width: 56rem)").matches) byId("settings").open = false;
byId("continue").querySelector("[data-keys]").textContent = KEYS;
