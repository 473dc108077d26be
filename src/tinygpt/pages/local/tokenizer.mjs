// Text to token ids and back, as TinyGPT's tokenizers do it: characters, bytes, or byte pairs.

// description: {kind: 'byte'} | {kind: 'char', chars} | {kind: 'bpe', tokens}, and, if there are any,
// {special}, an object of ids by the names of special tokens, and {ends}, the ids that end a text.
export function makeTokenizer(description) {
  const kinds = { byte: ByteTokenizer, char: CharTokenizer, bpe: BPETokenizer };
  const special = description.special ?? {};
  const tokenizer = new kinds[description.kind](description, Object.keys(special).length);
  const names = new Map(Object.entries(special).map(([name, id]) => [id, utf8.encode(name)]));
  const ordinary = tokenizer.bytes.bind(tokenizer);
  tokenizer.bytes = (id) => names.get(id) ?? ordinary(id);
  tokenizer.special = new Map(Object.entries(special)); // text never becomes one of these
  tokenizer.ends = new Set(description.ends ?? []);
  return tokenizer;
}

// Every tokenizer has `size`, the number of ids; encode(text), an array of ids; and bytes(id), the
// UTF-8 of one token, which may begin or end within a character.

const utf8 = new TextEncoder();

class ByteTokenizer {
  constructor(_, more) {
    this.size = 256 + more;
  }

  encode(text) {
    return Array.from(utf8.encode(text));
  }

  bytes(id) {
    return Uint8Array.of(id);
  }
}

class CharTokenizer {
  constructor({ chars }, more) {
    this.chars = Array.from(chars);
    this.size = this.chars.length + more;
    this.ids = new Map(this.chars.map((char, id) => [char, id]));
  }

  encode(text) {
    return Array.from(text, (char) => {
      const id = this.ids.get(char);
      if (id === undefined) throw new Error(`This model has never seen the character “${char}”.`);
      return id;
    });
  }

  bytes(id) {
    return utf8.encode(this.chars[id]);
  }
}

// GPT-2's way to cut text into words.
const WORDS = new RegExp(
  [
    "'(?:[sdmt]|ll|ve|re)",
    ' ?\\p{L}+',
    ' ?\\p{N}+',
    ' ?[^\\p{White_Space}\\p{L}\\p{N}]+',
    '\\p{White_Space}+$',
    '\\p{White_Space}+(?!\\P{White_Space})',
    '\\p{White_Space}',
  ].join('|'),
  'gu',
);
const REMEMBERED = 50_000; // words

class BPETokenizer {
  // tokens: the bytes of each, as characters of these numbers, in the order of their ranks; nothing
  // in the place of a special one, which text never becomes.
  constructor({ tokens }) {
    this.tokens = tokens;
    this.size = tokens.length;
    this.ranks = new Map(tokens.map((token, rank) => [token, rank]));
    this.words = new Map();
  }

  encode(text) {
    const ids = [];
    for (const [word] of text.matchAll(WORDS)) for (const id of this.word(word)) ids.push(id);
    return ids;
  }

  bytes(id) {
    return Uint8Array.from(this.tokens[id], (char) => char.charCodeAt(0));
  }

  word(word) {
    const known = this.words.get(word);
    if (known) return known;
    const ids = this.merge(Array.from(utf8.encode(word), (b) => String.fromCharCode(b)).join(''));
    if (this.words.size < REMEMBERED && word.length < 64) this.words.set(word, ids);
    return ids;
  }

  // Of all neighbours that make a token, the pair of the lowest rank is joined first, of equals the
  // one to the left. A part is known by where it begins; `end` says where it ends.
  merge(bytes) {
    const n = bytes.length;
    const end = Array.from({ length: n }, (_, i) => i + 1);
    const before = Array.from({ length: n }, (_, i) => i - 1);
    const queue = new Queue();
    const consider = (start) => {
      const stop = end[end[start]];
      const rank = stop === undefined ? undefined : this.ranks.get(bytes.slice(start, stop));
      if (rank !== undefined) queue.push([rank, start, stop]);
    };
    for (let i = 0; i + 1 < n; i++) consider(i);
    for (let first = queue.pop(); first; first = queue.pop()) {
      const [, start, stop] = first;
      const middle = end[start];
      if (middle === undefined || end[middle] !== stop) continue; // one of the two is gone
      end[start] = stop;
      end[middle] = undefined;
      if (stop < n) before[stop] = start;
      if (start > 0) consider(before[start]);
      consider(start);
    }
    const ids = [];
    for (let i = 0; i < n; i = end[i]) ids.push(this.ranks.get(bytes.slice(i, end[i])));
    return ids;
  }
}

// A heap of arrays, the one with the smallest first numbers on top.
class Queue {
  items = [];

  push(item) {
    const { items } = this;
    let at = items.push(item) - 1;
    for (let up; at > 0 && isBefore(item, items[(up = (at - 1) >> 1)]); at = up) {
      items[at] = items[up];
    }
    items[at] = item;
  }

  pop() {
    const { items } = this;
    const top = items[0];
    const last = items.pop();
    if (!items.length) return top;
    let at = 0;
    for (let down = 1; down < items.length; at = down, down = 2 * at + 1) {
      if (down + 1 < items.length && isBefore(items[down + 1], items[down])) down++;
      if (!isBefore(items[down], last)) break;
      items[at] = items[down];
    }
    items[at] = last;
    return top;
  }
}

const isBefore = (a, b) => a[0] < b[0] || (a[0] === b[0] && a[1] < b[1]);

// Ids one at a time to text as it becomes complete: a character's bytes may take many tokens.
export class TextStream {
  constructor(tokenizer) {
    this.tokenizer = tokenizer;
    this.decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  }

  push(id) {
    return this.decoder.decode(this.tokenizer.bytes(id), { stream: true });
  }

  // What is left at the end: U+FFFD for a character that stayed incomplete, else nothing.
  flush() {
    return this.decoder.decode();
  }
}
