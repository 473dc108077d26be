// The controls of sampling: what they are, in what range, and what they do.

import { byId, clamp, h } from "../shared/dom.js";

const fixed = (value) => value.toFixed(2);

/** Sliders; at ``off`` a filter is not used. The values of a fresh page come with the model's card. */
const SLIDERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, off: null,
    hint: "Low plays safe, high takes risks. At 0 the likeliest token is always taken.",
    shown: (value) => (value === 0 ? "greedy" : fixed(value)) },
  { name: "top_p", label: "Top-p", min: 0.05, max: 1, step: 0.01, off: 1, shown: fixed,
    hint: "Choose among the fewest tokens that together reach this share." },
  { name: "top_k", label: "Top-k", min: 0, max: 200, step: 1, off: 0, shown: String,
    hint: "Choose among this many of the likeliest tokens." },
  { name: "min_p", label: "Min-p", min: 0, max: 0.5, step: 0.01, off: 0, shown: fixed,
    hint: "Leave out tokens less likely than this part of the likeliest one." },
  { name: "repetition_penalty", label: "Repetition penalty", min: 1, max: 2, step: 0.05, off: 1, shown: fixed,
    hint: "Above 1, tokens that have occurred become less likely." },
];
const FIRST = 2; // sliders that are always seen; the rest is under "More"
const LINKED = [...SLIDERS.map(({ name }) => name), "max_tokens", "seed", "stop"];
const LARGEST_SEED = 2 ** 32 - 1;

export class Sampling {
  /** Builds the controls into a form; ``onChange()`` when a value of them does. */
  constructor(form, onChange) {
    const check = (id, label, checked) => h("label", { class: "check" }, h("input", { type: "checkbox", id, checked }), label);
    const number = (values) => h("input", { type: "number", step: 1, min: 1, value: 1, ...values });
    this.ends = h("div", { class: "control", hidden: true }, check("ignore_eos", "Go on where the text ends"));
    form.append(
      ...SLIDERS.slice(0, FIRST).map(slider),
      h("details", { class: "more" }, h("summary", {}, "More"), h("div", {},
        ...SLIDERS.slice(FIRST).map(slider),
        control("Length", "The most tokens to write at a time.", number({ id: "max_tokens", max: 4096, value: 200 })),
        control("Seed", "With the same text and settings, the same seed writes the same.",
          number({ id: "seed", min: 0, max: LARGEST_SEED }), check("random", "New each time", true)),
        control("Stop at", "Texts before which the writing ends, one a line; \\n is a line break.", h("textarea", { id: "stop", rows: 2, spellcheck: "false" })),
        control("Samples", "More than one are written side by side, to choose from.", number({ id: "sample-count", max: 4 })),
        this.ends)),
      h("button", { type: "reset", class: "quiet" }, "Reset"),
    );
    const changed = () => {
      this.#show();
      onChange();
    };
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", changed);
    form.addEventListener("reset", () => setTimeout(changed)); // once the fields have their first values
    this.#show();
  }

  /** The model is known: its limits, and the values of a fresh page. */
  describe({ limits, sampling, tokenizer }) {
    byId("max_tokens").max = limits.max_tokens;
    for (const [name, value] of Object.entries(sampling)) {
      const off = SLIDERS.find((each) => each.name === name)?.off;
      byId(name).defaultValue = Math.min(value ?? off, name === "max_tokens" ? limits.max_tokens : Infinity);
    }
    this.ends.hidden = !tokenizer.ends;
    this.#show();
  }

  /** The settings that shape a distribution; null is off. */
  get values() {
    const sent = ({ name, off }) => [name, number(name) === off ? null : number(name)];
    return Object.fromEntries(SLIDERS.map(sent));
  }

  /** The settings of the next text, with a new seed unless it is held; that of the i-th sample differs. */
  next(i = 0) {
    const field = byId("seed");
    if (byId("random").checked) field.value = crypto.getRandomValues(new Uint32Array(1))[0];
    const stop = byId("stop").value.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
    const seed = (Math.round(within(field)) + i) % (LARGEST_SEED + 1);
    const ends = byId("ignore_eos").checked ? { ignore_eos: true } : {};
    return { ...this.values, max_tokens: Math.round(within(byId("max_tokens"))), seed, stop, ...ends };
  }

  get samples() {
    return Math.round(within(byId("sample-count")));
  }

  get seedIsHeld() {
    return !byId("random").checked;
  }

  /** What the fields hold, for a link. */
  get fields() {
    return Object.fromEntries(LINKED.map((name) => [name, byId(name).value]));
  }

  /** Take over what a link holds. */
  take(fields) {
    for (const name of LINKED) if (name in fields) byId(name).value = fields[name];
    byId("random").checked = false;
    this.#show();
  }

  #show() {
    for (const { name, shown, off } of SLIDERS) {
      const text = number(name) === off ? "off" : shown(number(name));
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
  field.value = Number.isNaN(value) ? field.defaultValue : clamp(value, Number(field.min), Number(field.max));
  return field.valueAsNumber;
}

function slider({ name, label, hint, min, max, step, off }) {
  const output = h("output", { id: `${name}-value`, for: name, "aria-hidden": "true" });
  return control(label, hint, h("input", { type: "range", id: name, min, max, step, value: off ?? 1 }), output);
}

/** A field with its label, and a hint that is seen while the field has the focus. */
function control(label, hint, field, ...more) {
  field.setAttribute("aria-describedby", `${field.id}-hint`);
  return h("div", { class: "control" },
    h("label", { for: field.id }, label), field, ...more, h("p", { class: "over", id: `${field.id}-hint` }, hint));
}
