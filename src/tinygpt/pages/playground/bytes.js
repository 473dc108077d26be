// Tokens are bytes: what a reader sees of them.

const MARKS = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽" };
const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** A token with every byte visible: ␣the, ↵, \xE4. */
export function visible(bytes) {
  let shown = "";
  for (let i = 0; i < bytes.length; ) {
    const character = characterAt(bytes, i);
    shown += character === null ? escaped(bytes[i]) : mark(character);
    i += character === null ? 1 : lengthAt(bytes[i]);
  }
  return /^\p{M}/u.test(shown) ? `◌${shown}` : shown || "∅";
}

/** The character that begins at a byte, or null where the bytes are none. */
function characterAt(bytes, i) {
  try {
    return strict.decode(bytes.subarray(i, i + lengthAt(bytes[i])));
  } catch {
    return null;
  }
}

const lengthAt = (byte) => (byte < 0xc0 ? 1 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4);

const escaped = (byte) => `\\x${byte.toString(16).toUpperCase().padStart(2, "0")}`;

function mark(character) {
  if (character in MARKS) return MARKS[character];
  if (!/[\p{C}\p{Z}]/u.test(character)) return character;
  const point = character.codePointAt(0);
  return point < 0x80 ? escaped(point) : `\\u{${point.toString(16).toUpperCase()}}`;
}
