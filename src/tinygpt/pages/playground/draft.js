// The text as the page knows it: tokens, whose ids are certain, and behind them a tail that no
// tokenizer has cut yet. Before them may stand a head, which is shown but too far back for the model
// to be given. A draft never changes; what happens to it makes another one.

const LONGEST = 100_000; // characters that are cut at once; a model sees less

/**
 * A token: { id, bytes, origin, logprob }. Its origin is "model" or "chosen" for those whose ids
 * stand by themselves, "typed" for those cut from what somebody wrote: they are cut anew when more
 * is written.
 */
export class Draft {
  constructor(tokens = [], tail = "", head = "") {
    this.tokens = tokens;
    this.tail = tail;
    this.head = head;
  }

  /** Text that nobody has cut yet; of a very long one the beginning is left in the head. */
  static of(text) {
    let at = Math.max(0, text.length - LONGEST);
    if (/[\uDC00-\uDFFF]/.test(text[at] ?? "")) at += 1; // not within a character
    return new Draft([], text.slice(at), text.slice(0, at));
  }

  /** What the server is told: the last ids that are certain, and the text behind them. */
  given(most = Infinity) {
    const first = Math.max(0, this.tokens.length - most);
    return { ids: this.tokens.slice(first).map((token) => token.id), text: this.tail };
  }

  get isEmpty() {
    return this.tokens.length === 0 && this.tail === "" && this.head === "";
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
    return index === 0 ? this.head.length : this.ends[index - 1];
  }

  /** The token at a place in the text; at its end, the one that would come next. */
  at(place) {
    const found = this.ends.findIndex((end) => end > place);
    return found < 0 ? this.tokens.length : found;
  }

  upTo(count) {
    return new Draft(this.tokens.slice(0, count), "", this.head);
  }

  with(...tokens) {
    return new Draft([...this.tokens, ...tokens], "", this.head);
  }

  /** The draft with its tail cut; if it was too long for that, these are the tokens of its end. */
  cut(tokens) {
    const typed = tokens.map((token) => received(token, "typed"));
    const end = new Draft(typed);
    if (end.text.length >= this.tail.length) return this.with(...typed);
    return new Draft(typed, "", this.text.slice(0, this.text.length - end.text.length));
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
    while (keep && !value.startsWith(this.upTo(keep).text)) keep -= 1; // not within a character
    if (!keep) return Draft.of(value);
    const kept = this.upTo(keep);
    return new Draft(kept.tokens, value.slice(kept.text.length), kept.head).#bounded();
  }

  #bounded() {
    return this.tail.length > LONGEST ? Draft.of(this.text) : this;
  }

  /** As JSON; ``revived`` makes a draft of it again. */
  toJSON() {
    const tokens = this.tokens.map(({ id, bytes, origin, logprob }) => [id, [...bytes], origin, logprob]);
    return { tokens, tail: this.tail, head: this.head };
  }

  static revived({ tokens, tail, head }) {
    const known = tokens.map(([id, bytes, origin, logprob]) => received({ id, bytes, logprob }, origin));
    return new Draft(known, tail, head);
  }

  #cache = null;

  get #decoded() {
    return (this.#cache ??= decode(this.tokens, this.head));
  }
}

/** A token as the server tells it, with where it comes from. */
export function received(token, origin) {
  return { ...token, bytes: Uint8Array.from(token.bytes), origin };
}

function decode(tokens, head) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  let text = head;
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
