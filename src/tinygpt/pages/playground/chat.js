// A talk with the model. Each answer's tokens open as those of the text do: below stands what else
// the model weighed there, and another choice is gone on from.

import { byId, counted, h } from "../shared/dom.js";
import { Draft, received } from "./draft.js";
import { levelOf } from "./editor.js";
import { keepTalk, keptTalk, textsOf } from "./kept.js";

export class Chat {
  /** ``playground`` lends its model, its sampling, and what it says; ``onLook()`` when another token is looked at. */
  constructor(playground, onLook) {
    Object.assign(this, { playground, onLook });
    this.kept = keptTalk();
    this.turns = this.kept?.turns ?? []; // { role, content }; an answer has its draft, and the number of the prompt's tokens, too
    byId("system").value = this.kept?.system ?? "";
    byId("system").closest("details").open = Boolean(byId("system").value);
    byId("question").value = this.kept?.question ?? "";
    this.seen = { draft: new Draft(), selected: 0 };
    this.list = byId("turns");
    this.frame = null; // a timer: what has come will be shown
    this.pause = 0; // milliseconds until then
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("question").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    byId("retry").addEventListener("click", () => this.retry());
    byId("take-back").addEventListener("click", () => this.takeBack());
    byId("new-talk").addEventListener("click", () => this.reset());
    this.list.addEventListener("click", (event) => this.#pointed(event));
    this.#finish();
  }

  get isOpen() {
    return !byId("talk").hidden;
  }

  /** The model is there: what was kept of another one is text alone. */
  start() {
    if (this.kept && this.kept.model !== this.playground.identity) this.turns = textsOf(this.turns);
    this.show();
  }

  /** Keep the talk for when the page is loaded anew, with as much of an answer as is there. */
  keep() {
    this.turns.filter((turn) => turn.draft).forEach(fill);
    const { turns, isOpen } = this;
    const talk = { turns, isOpen, system: byId("system").value, question: byId("question").value };
    keepTalk(talk, this.playground.identity ?? this.kept?.model);
  }

  // ---- what one can do ----

  /** Ask what stands in the field. While an answer is written the button stops it. */
  send() {
    if (this.playground.writing) return this.playground.stop();
    const content = byId("question").value;
    if (!content.trim() || !this.playground.card) return undefined;
    byId("question").value = "";
    this.turns.push({ role: "user", content });
    return this.#answer();
  }

  /** Another answer to the last question. */
  retry() {
    this.turns.pop();
    return this.#answer();
  }

  /** Take back the last question, which comes into the field again, with its answer. */
  takeBack() {
    const [question] = this.turns.splice(-2);
    byId("question").value ||= question.content;
    this.#see(new Draft(), 0);
    this.show();
    byId("question").focus();
  }

  reset() {
    this.turns = [];
    this.#see(new Draft(), 0);
    this.show();
    byId("question").focus();
  }

  /** Look at a token of the answer that is looked at. */
  select(index) {
    const { draft } = this.seen;
    if (index >= 0 && index <= draft.tokens.length) this.#see(draft, index);
  }

  /** Go on from another token in an answer; what came after it is gone. */
  branch(draft, index, token) {
    const at = this.turns.findIndex((turn) => turn.draft === draft);
    if (at < 0 || this.playground.writing || index < this.turns[at].first) return undefined;
    const { first } = this.turns[at];
    this.turns.length = at;
    return this.#answer({ draft: draft.upTo(index).with(token), first });
  }

  // ---- answers ----

  /** Write an answer to what was said, or go on with one of which a part is there. */
  async #answer(begun) {
    const { playground } = this;
    const { model, sampling } = playground;
    const settings = sampling.next();
    const messages = this.#messages();
    const turn = { role: "assistant", content: "", draft: new Draft(), first: 0, ...begun };
    const length = () => turn.draft.tokens.length - turn.first;
    this.turns.push(turn);
    let remark = "";
    await playground.busily(async (signal) => {
      this.show();
      const asked = await model.conversation(messages, settings.max_tokens, signal);
      remark = asked.remark;
      if (!begun) turn.draft = new Draft(asked.tokens.map((token) => received(token, "typed")));
      turn.first = begun?.first ?? turn.draft.tokens.length;
      const ends = { stop: [...settings.stop, ...asked.stop], stop_ids: asked.stop_ids };
      for await (const { tokens } of model.generate(turn.draft.given(), { ...settings, ...ends }, signal)) {
        if (!tokens?.length) continue;
        turn.draft = turn.draft.with(...tokens.map((token) => received(token, "model")));
        this.#showSoon();
      }
      playground.say(remark || `${counted(length(), "token")} written.`);
    }, length);
    fill(turn);
    this.#see(turn.draft, turn.draft.tokens.length);
    this.#finish();
    byId("question").focus();
  }

  /** The question of an answer in which there is nothing is no part of the talk. */
  #finish() {
    if (this.turns.at(-1)?.content === "") {
      const [question] = this.turns.splice(-2);
      byId("question").value ||= question.content;
    }
    this.show();
  }

  #messages() {
    const system = byId("system").value;
    const said = this.turns.map(({ role, content }) => ({ role, content }));
    return system.trim() ? [{ role: "system", content: system }, ...said] : said;
  }

  // ---- what is seen ----

  show() {
    const busy = Boolean(this.playground.writing);
    this.list.replaceChildren(...this.turns.map((turn, i) => this.#row(turn, i)));
    byId("send").textContent = busy ? "Stop" : "Send";
    byId("send").disabled = !this.playground.card;
    byId("question").readOnly = busy;
    this.list.setAttribute("aria-busy", busy);
    for (const id of ["retry", "take-back", "new-talk"]) byId(id).disabled = busy || !this.turns.length;
    this.#mark();
    this.#follow();
    this.playground.keepSoon();
  }

  /** Show what has come of the last answer, in a fraction of the time: most of it is the model's. */
  #showSoon() {
    this.frame ??= setTimeout(() => {
      this.frame = null;
      if (!this.playground.writing) return;
      const start = performance.now();
      const last = this.turns.length - 1;
      this.list.lastElementChild?.replaceWith(this.#row(this.turns[last], last));
      this.#follow();
      this.pause = Math.min(4 * (performance.now() - start), 500);
    }, this.pause);
  }

  #follow() {
    const { parentElement } = this.list;
    parentElement.scrollTop = parentElement.scrollHeight;
  }

  #row(turn, i) {
    if (turn.role === "user") return h("li", { class: "turn user", dir: "auto" }, h("span", { class: "unseen" }, "You: "), turn.content);
    const { draft, first } = turn;
    const tokens = draft.tokens.slice(first).map((token, n) => {
      const index = first + n;
      const text = draft.text.slice(draft.start(index), draft.ends[index]);
      return h("span", { class: `said level-${token.origin === "model" ? levelOf(token) : "chosen"}`, "data-index": index }, text);
    });
    const look = () => this.#see(draft, first);
    return h("li", { class: "turn assistant", dir: "auto", "data-turn": i }, h("span", { class: "unseen" }, "Model: "), ...tokens, draft.tail,
      tokens.length > 0 && h("button", { type: "button", class: "quiet look", onclick: look }, "Look inside"));
  }

  #pointed({ target }) {
    const span = target.closest("[data-index]");
    if (!span || this.playground.writing) return;
    this.#see(this.turns[Number(span.closest("[data-turn]").dataset.turn)].draft, Number(span.dataset.index));
  }

  #see(draft, selected) {
    this.seen = { draft, selected };
    this.#mark();
    this.onLook();
  }

  #mark() {
    const { draft, selected } = this.seen;
    this.list.querySelector(".seen")?.classList.remove("seen");
    const turn = this.turns.findIndex((each) => each.draft === draft);
    this.list.querySelector(`[data-turn="${turn}"] [data-index="${selected}"]`)?.classList.add("seen");
  }
}

/** Take over into a turn what its draft says behind the prompt. */
function fill(turn) {
  turn.content = turn.draft.text.slice(turn.draft.start(turn.first));
}
