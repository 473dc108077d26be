// What a person has chosen, in the address of the page: a link shows the same.

const DEFAULTS = { x: "step", unit: "nats", log: false, smooth: true, outliers: false, same: false, run: null, shown: null, range: null };
const ALLOWED = { x: ["step", "tokens", "time"], unit: ["nats", "bits"] };

export const choices = { ...DEFAULTS };

for (const [name, text] of new URLSearchParams(location.search)) {
  if (typeof DEFAULTS[name] === "boolean") choices[name] = text === "true";
  else if (name === "run" || ALLOWED[name]?.includes(text)) choices[name] = text;
  else if (name === "shown") choices.shown = text.split(",");
  else if (name === "range") {
    const [low, high] = text.split(",").map(Number);
    if (low < high) choices.range = [low, high];
  }
}

/** Take over some choices, and write what differs from the defaults into the address. */
export function choose(changes) {
  Object.assign(choices, changes);
  const told = Object.entries(choices).filter(([name, value]) => value !== DEFAULTS[name]);
  const query = new URLSearchParams(told.map(([name, value]) => [name, String(value)]));
  history.replaceState(null, "", location.pathname + (told.length ? `?${query}` : "") + location.hash);
}
