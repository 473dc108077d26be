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

/** Arrow keys, Home and End move the focus within a list of elements of which one can be tabbed to. */
export function moveWithArrows(event, elements, go) {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const last = elements.length - 1;
  const at = elements.indexOf(document.activeElement);
  const to = event.key === "Home" ? 0 : event.key === "End" ? last : at + step;
  if (at < 0 || Number.isNaN(to) || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  go(Math.min(Math.max(to, 0), last));
}
