// Undo for everything: what was typed, generated and chosen.

const PAUSE = 1000; // milliseconds without typing after which a new step begins
const MOST = 500;

/** Earlier states, of any kind; quick typing makes one step. */
export class History {
  #past = [];
  #typedAt = -Infinity;

  get isEmpty() {
    return this.#past.length === 0;
  }

  /** Keep the state before something happens to it. */
  keep(state) {
    this.#past.push(state);
    if (this.#past.length > MOST) this.#past.shift();
    this.#typedAt = -Infinity;
  }

  /** Keep the state before a key is typed, unless others were typed just before. */
  keepBeforeTyping(state, now = performance.now()) {
    if (now - this.#typedAt > PAUSE) this.keep(state);
    this.#typedAt = now;
  }

  /** The state before the last step, or undefined. */
  back() {
    this.#typedAt = -Infinity;
    return this.#past.pop();
  }
}
