// The text: a plain textarea, so that typing, IMEs, screen readers and spell checkers work as
// everywhere. Behind it lies a mirror with the same text, invisible but for its highlights, which
// also gives the textarea its height.

const LEVELS = [1, 2.3, 4.3, 6.6]; // bits of surprise, -log2 of the probability; above each the colour is warmer
const FADING = 500; // milliseconds

export class Editor {
  /** ``onInput(value)`` when somebody types, ``onPlace(index)`` when a token is pointed at. */
  constructor(area, mirror, scroller, { onInput, onPlace }) {
    this.area = area;
    Object.assign(this, { mirror, scroller, colours: true });
    this.text = document.createTextNode("");
    mirror.append(this.text, "\u200b"); // a line break at the end has a line only before something
    this.draft = null;
    this.onPlace = onPlace;
    area.addEventListener("input", () => onInput(area.value));
    area.addEventListener("click", (event) => this.#pointed(event));
    area.addEventListener("keyup", (event) => {
      if (/^(Arrow|Home|End|Page)/.test(event.key)) onPlace(this.draft.at(area.selectionStart));
    });
  }

  /** Show a draft; ``follow`` keeps its end in view if it was. */
  show(draft, { follow = false } = {}) {
    const { scroller } = this;
    const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
    const known = this.draft?.tokens.length ?? 0;
    this.draft = draft;
    if (this.area.value !== draft.text) this.area.value = draft.text;
    if (this.text.data !== draft.text) this.text.data = draft.text;
    this.#highlight();
    if (this.isBusy) this.#fadeIn(known);
    if (follow && atEnd) scroller.scrollTop = scroller.scrollHeight;
  }

  /** Put the caret before a token, or at the end. */
  caretAt(index) {
    const place = index < this.draft.tokens.length ? this.draft.start(index) : this.draft.text.length;
    this.area.setSelectionRange(place, place);
  }

  /** Mark a token as the one that is looked at; -1 marks none. */
  select(index) {
    const token = this.draft.tokens[index];
    mark("selected", token ? [this.#range(index)] : []);
  }

  /** Colour what the model wrote by how much it surprised the model, or not at all. */
  setColours(colours) {
    this.colours = colours;
    this.#highlight();
  }

  set busy(busy) {
    this.isBusy = busy;
    this.area.readOnly = busy;
    this.area.setAttribute("aria-busy", busy);
  }

  #highlight() {
    const levels = LEVELS.map(() => []).concat([[]]);
    const chosen = [];
    this.draft.tokens.forEach((token, i) => {
      if (token.origin === "chosen") chosen.push(this.#range(i));
      if (token.origin === "model" && this.colours) levels[levelOf(token)].push(this.#range(i));
    });
    levels.forEach((ranges, level) => mark(`model-${level}`, ranges));
    mark("chosen", chosen);
  }

  /** The colours of tokens from a number on come slowly, where motion is wanted. */
  #fadeIn(first) {
    if (!matchMedia("(prefers-reduced-motion: no-preference)").matches) return;
    const count = this.draft.tokens.length - first;
    if (count > 0) mark("fresh", Array.from({ length: count }, (_, i) => this.#range(first + i)));
    this.mirror.animate({ "--fresh": ["1", "0"] }, { duration: FADING, easing: "ease-out" });
  }

  #range(index) {
    return new StaticRange({
      startContainer: this.text,
      startOffset: this.draft.start(index),
      endContainer: this.text,
      endOffset: this.draft.ends[index],
    });
  }

  /** A click means the token under it, though the caret may have gone behind its last letter. */
  #pointed(event) {
    const place = this.area.selectionStart;
    if (place !== this.area.selectionEnd) return;
    const index = this.draft.at(place);
    const before = place > 0 ? this.draft.at(place - 1) : index;
    this.onPlace(before !== index && this.#covers(place - 1, event) ? before : index);
  }

  #covers(place, { clientX, clientY }) {
    const range = document.createRange();
    range.setStart(this.text, place);
    range.setEnd(this.text, place + 1);
    return [...range.getClientRects()].some(
      (box) => clientX >= box.left && clientX <= box.right && clientY >= box.top && clientY <= box.bottom,
    );
  }
}

export function levelOf({ logprob }) {
  if (logprob == null) return 0;
  const level = LEVELS.findIndex((bits) => -logprob / Math.LN2 <= bits);
  return level < 0 ? LEVELS.length : level;
}

/** Browsers without highlights show the text without colours. */
function mark(name, ranges) {
  if (typeof Highlight === "undefined") return;
  CSS.highlights.set(name, new Highlight(...ranges));
}
