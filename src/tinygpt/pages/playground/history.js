// Undo and redo for everything: what was typed, generated and chosen.

const PAUSE = 1000; // milliseconds without typing after which a new step begins
const MOST = 500;

/** States before and after the present one, of any kind; quick typing makes one step. */
export class History {
  past = [];
  future = [];
  #typedAt = -Infinity;

  /** Keep the state before something happens to it: what was undone before cannot come back. */
  keep(state) {
    this.past.push(state);
    if (this.past.length > MOST) this.past.shift();
    this.future = [];
    this.#typedAt = -Infinity;
  }

  /** Keep the state before a key is typed, unless others were typed just before. */
  keepBeforeTyping(state) {
    const now = performance.now();
    if (now - this.#typedAt > PAUSE) this.keep(state);
    this.#typedAt = now;
  }

  /** The state before the last step, or with ``from`` the future the one undone last; ``state`` is the present one. */
  step(state, from = this.past) {
    this.#typedAt = -Infinity;
    const found = from.pop();
    if (found) (from === this.past ? this.future : this.past).push(state);
    return found;
  }
}

/** "undo" or "redo" for the keys that mean it everywhere, else undefined. */
export function historyKey(event) {
  if (!(event.ctrlKey || event.metaKey) || event.altKey) return undefined;
  const key = event.key.toLowerCase();
  if (key === "z") return event.shiftKey ? "redo" : "undo";
  return key === "y" && !event.shiftKey ? "redo" : undefined;
}
