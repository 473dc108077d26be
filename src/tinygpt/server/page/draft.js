// The text as the page knows it: tokens, whose ids are certain, and behind them a tail that no
// tokenizer has cut yet. A draft never changes; what happens to it makes another one.

/**
 * A token: { id, bytes, origin, logprob }. Its origin is "model" or "chosen" for those whose ids
 * stand by themselves, "typed" for those cut from what somebody wrote: they are cut anew when more
 * is written.
 */
export class Draft {
  constructor(tokens = [], tail = "") {
    this.tokens = tokens;
    this.tail = tail;
  }

  /** What the server is told: the ids that are certain, and the text behind them. */
  get prompt() {
    return { ids: this.tokens.map((token) => token.id), text: this.tail };
  }

  get isEmpty() {
    return this.tokens.length === 0 && this.tail === "";
  }

  get isCut() {
    return this.tail === "";
  }

  get text() {
    return this.#decoded.text + this.tail;
  }

  /** Where each token ends in the text. */
  get ends() {
    return this.#decoded.ends;
  }

  start(index) {
    return index === 0 ? 0 : this.ends[index - 1];
  }

  /** The token at a place in the text; at its end, the one that would come next. */
  at(place) {
    const found = this.ends.findIndex((end) => end > place);
    return found < 0 ? this.tokens.length : found;
  }

  upTo(count) {
    return new Draft(this.tokens.slice(0, count));
  }

  with(...tokens) {
    return new Draft([...this.tokens, ...tokens]);
  }

  /**
   * The draft after somebody changed the text to ``value``. What stands before the change and was
   * written by the model keeps its ids; all behind that is text like any other.
   */
  edited(value) {
    const common = commonLength(this.text, value);
    let keep = 0;
    this.tokens.forEach((token, i) => {
      if (token.origin !== "typed" && this.ends[i] <= common) keep = i + 1;
    });
    let kept = this.upTo(keep);
    while (!value.startsWith(kept.text)) kept = this.upTo(--keep); // not within a character
    return new Draft(kept.tokens, value.slice(kept.text.length));
  }

  #cache = null;

  get #decoded() {
    return (this.#cache ??= decode(this.tokens));
  }
}

/** A token as the server tells it, with where it comes from. */
export function received(token, origin) {
  return { ...token, bytes: Uint8Array.from(token.bytes), origin };
}

function decode(tokens) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  let text = "";
  const ends = tokens.map((token) => {
    text += shown(decoder.decode(token.bytes, { stream: true }));
    return text.length;
  });
  text += decoder.decode(); // U+FFFD for a character that is not complete yet
  if (ends.length) ends[ends.length - 1] = text.length;
  return { text, ends };
}

/** A textarea takes \r for a line break of its own, and would move every place behind it. */
const shown = (text) => text.replaceAll("\r", "␍");

function commonLength(a, b) {
  const most = Math.min(a.length, b.length);
  let n = 0;
  while (n < most && a[n] === b[n]) n++;
  return n;
}
