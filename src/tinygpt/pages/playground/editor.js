// The text: a plain textarea, so that typing, IMEs, screen readers and spell checkers work as
// everywhere. Behind it lies a mirror with the same text, invisible but for its highlights, which
// also gives the textarea its height.

const LEVELS = [0.5, 0.2, 0.05, 0.01]; // a token less likely than these is ever warmer

export class Editor {
  /** ``onInput(value)`` when somebody types, ``onPlace(index)`` when a token is pointed at. */
  constructor(area, mirror, scroller, { onInput, onPlace }) {
    this.area = area;
    this.scroller = scroller;
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
    this.draft = draft;
    if (this.area.value !== draft.text) this.area.value = draft.text;
    if (this.text.data !== draft.text) this.text.data = draft.text;
    this.#highlight();
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

  set busy(busy) {
    this.area.readOnly = busy;
    this.area.setAttribute("aria-busy", busy);
  }

  #highlight() {
    const levels = LEVELS.map(() => []).concat([[]]);
    const chosen = [];
    this.draft.tokens.forEach((token, i) => {
      if (token.origin === "chosen") chosen.push(this.#range(i));
      if (token.origin === "model") levels[levelOf(token)].push(this.#range(i));
    });
    levels.forEach((ranges, level) => mark(`model-${level}`, ranges));
    mark("chosen", chosen);
  }

  #range(index) {
    const range = new StaticRange({
      startContainer: this.text,
      startOffset: this.draft.start(index),
      endContainer: this.text,
      endOffset: this.draft.ends[index],
    });
    return range;
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

function levelOf({ logprob }) {
  if (logprob == null) return 0;
  const level = LEVELS.findIndex((least) => Math.exp(logprob) >= least);
  return level < 0 ? LEVELS.length : level;
}

/** Browsers without highlights show the text without colours. */
function mark(name, ranges) {
  if (typeof Highlight === "undefined") return;
  CSS.highlights.set(name, new Highlight(...ranges));
}
