// Elements made of text and properties. Nothing a model or a person wrote is ever parsed as HTML.

/** An element: h("button", { class: "quiet", onclick: go }, "Go"). Falsy children are left out. */
export function h(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child || child === 0 || child === ""));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** A function that runs once it has not been called for so many milliseconds. */
export function debounced(milliseconds, action) {
  let timer = 0;
  const later = (...given) => {
    clearTimeout(timer);
    timer = setTimeout(action, milliseconds, ...given);
  };
  later.cancel = () => clearTimeout(timer);
  return later;
}

/** Runs the newest of several overlapping actions; an older one's result is dropped. */
export function newestOnly() {
  let controller = null;
  return async (action) => {
    controller?.abort();
    const own = (controller = new AbortController());
    try {
      const result = await action(own.signal);
      return own.signal.aborted ? undefined : result;
    } catch (error) {
      if (own.signal.aborted) return undefined;
      throw error;
    }
  };
}

/** A probability as people read it: 31.2 %, 0.04 %, <0.01 %. */
export function percent(p) {
  if (p === 0) return "0 %";
  if (p < 0.0001) return "<0.01 %";
  return `${(100 * p).toFixed(p < 0.01 ? 2 : 1)} %`;
}

/** Whole numbers with separators: 50,257. */
export const whole = (n) => n.toLocaleString("en");

/** "1 token", "2 tokens". */
export const counted = (n, noun) => `${whole(n)} ${noun}${n === 1 ? "" : "s"}`;

export const clamp = (n, low, high) => Math.min(Math.max(n, low), high);

const STEPS = {
  ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
  PageUp: [0, -10], PageDown: [0, 10], Home: [-Infinity, 0], End: [Infinity, 0],
};

/** The step [columns, rows] of a key that moves, without its usual effect; null for other keys. */
export function stepOf(event) {
  const step = event.altKey || event.ctrlKey || event.metaKey ? null : STEPS[event.key] ?? null;
  if (step) event.preventDefault();
  return step;
}

/** Arrow keys, Home and End move the focus within a list of elements of which one can be tabbed to. */
export function moveWithArrows(event, elements, go) {
  const at = elements.indexOf(document.activeElement);
  const step = at < 0 ? null : stepOf(event);
  if (step) go(clamp(at + step[0] + step[1], 0, elements.length - 1));
}

/** Show a dialog until it is closed; -> its return value, that of the button which closed it. */
export function modal(properties, ...children) {
  const box = h("dialog", properties, h("form", { method: "dialog" }, ...children));
  document.body.append(box);
  box.showModal();
  return new Promise((resolve) => {
    box.addEventListener("close", () => {
      box.remove();
      resolve(box.returnValue);
    });
  });
}

/** Save something as a file. */
export function download(content, type, name) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
