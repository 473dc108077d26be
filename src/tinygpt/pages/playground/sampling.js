// The controls of sampling: what they are, in what range, and what they do.

import { byId, h } from "../shared/dom.js";

const SLIDERS = [
  {
    name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.8,
    hint: "Low plays safe, high takes risks. At 0 the likeliest token is always taken.",
    shown: (value) => (value === 0 ? "greedy" : value.toFixed(2)),
    sent: (value) => value,
  },
  {
    name: "top_k", label: "Top-k", min: 0, max: 200, step: 1, value: 0,
    hint: "Choose among this many of the likeliest tokens.",
    shown: (value) => (value === 0 ? "off" : String(value)),
    sent: (value) => value || null,
  },
  {
    name: "top_p", label: "Top-p", min: 0.05, max: 1, step: 0.01, value: 0.95,
    hint: "Choose among the fewest tokens that together reach this share.",
    shown: (value) => (value === 1 ? "off" : value.toFixed(2)),
    sent: (value) => (value === 1 ? null : value),
  },
  {
    name: "min_p", label: "Min-p", min: 0, max: 0.5, step: 0.01, value: 0,
    hint: "Leave out tokens less likely than this part of the likeliest one.",
    shown: (value) => (value === 0 ? "off" : value.toFixed(2)),
    sent: (value) => value || null,
  },
  {
    name: "repetition_penalty", label: "Repetition penalty", min: 1, max: 2, step: 0.05, value: 1,
    hint: "Above 1, tokens that have occurred become less likely.",
    shown: (value) => (value === 1 ? "off" : value.toFixed(2)),
    sent: (value) => (value === 1 ? null : value),
  },
];

const LARGEST_SEED = 2 ** 32 - 1;

export class Sampling {
  /** Builds the controls into a form; ``onChange()`` when a value of them does. */
  constructor(form, onChange) {
    form.append(...SLIDERS.map(slider), tokens(), seed());
    form.append(h("button", { type: "reset", class: "quiet" }, "Reset"));
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => {
      this.#show();
      onChange();
    });
    form.addEventListener("reset", () => setTimeout(() => { // once the fields have their first values
      this.#show();
      onChange();
    }));
    this.#show();
  }

  /** The settings that shape a distribution; null is off. */
  get values() {
    return Object.fromEntries(SLIDERS.map(({ name, sent }) => [name, sent(number(name))]));
  }

  get maxTokens() {
    return Math.round(within(byId("max_tokens")));
  }

  /** The seed of the next text: a new one, unless it is held. */
  nextSeed() {
    const field = byId("seed");
    if (byId("random").checked) field.value = crypto.getRandomValues(new Uint32Array(1))[0];
    field.value = Math.round(within(field));
    return Number(field.value);
  }

  get seedIsHeld() {
    return !byId("random").checked;
  }

  limit(maxTokens) {
    const field = byId("max_tokens");
    field.max = maxTokens;
    field.defaultValue = Math.min(Number(field.defaultValue), maxTokens);
  }

  #show() {
    for (const { name, shown } of SLIDERS) {
      const text = shown(number(name));
      byId(`${name}-value`).textContent = text;
      byId(name).setAttribute("aria-valuetext", text);
    }
    byId("seed").readOnly = byId("random").checked;
  }
}

const number = (id) => Number(byId(id).value);

/** What a field of numbers holds, put into its range. */
function within(field) {
  const value = field.valueAsNumber;
  const inside = Math.min(Math.max(value, Number(field.min)), Number(field.max));
  field.value = Number.isNaN(value) ? field.defaultValue : inside;
  return field.valueAsNumber;
}

function slider({ name, label, min, max, step, value, hint }) {
  return h(
    "div",
    { class: "control" },
    h("label", { for: name }, label),
    h("output", { id: `${name}-value`, for: name, "aria-hidden": "true" }),
    h("input", { type: "range", id: name, min, max, step, value, "aria-describedby": `${name}-hint` }),
    h("p", { class: "hint", id: `${name}-hint` }, hint),
  );
}

function tokens() {
  return h(
    "div",
    { class: "control" },
    h("label", { for: "max_tokens" }, "Tokens"),
    h("input", { type: "number", id: "max_tokens", min: 1, max: 4096, step: 1, value: 100, "aria-describedby": "max_tokens-hint" }),
    h("p", { class: "hint", id: "max_tokens-hint" }, "The most to write at a time."),
  );
}

function seed() {
  return h(
    "div",
    { class: "control" },
    h("label", { for: "seed" }, "Seed"),
    h("input", { type: "number", id: "seed", min: 0, max: LARGEST_SEED, step: 1, value: 1, "aria-describedby": "seed-hint" }),
    h("label", { class: "check" }, h("input", { type: "checkbox", id: "random", checked: true }), "New each time"),
    h("p", { class: "hint", id: "seed-hint" }, "With the same text and settings, the same seed writes the same."),
  );
}
