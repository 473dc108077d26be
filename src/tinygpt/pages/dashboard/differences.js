// The settings of several runs side by side.

import { byId, h } from "../shared/dom.js";
import { swatch } from "../shared/chart.js";

/** Show the settings in which ``runs`` differ, with ``same`` all of them. */
export function showSettings(runs, same) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const differs = (name) => new Set(runs.map((run) => JSON.stringify(run.settings[name]))).size > 1;
  const alone = runs.length < 2;
  const rows = names.filter((name) => alone || same || differs(name));
  byId("same-label").hidden = alone;
  byId("settings-title").textContent = alone || same ? "Settings" : "Settings that differ";
  if (!rows.length) {
    const text = names.length ? "These runs have the same settings." : "No settings can be read here.";
    byId("settings").replaceChildren(h("p", { class: "hint" }, text));
    return;
  }
  const head = runs.map((run) => h("th", { scope: "col" }, swatch(run.look), h("span", { class: "clip" }, run.name)));
  byId("settings").replaceChildren(
    h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Setting"), ...head)),
      h("tbody", {}, ...rows.map((name) => row(name, runs, !alone && differs(name))))),
  );
}

function row(name, runs, differs) {
  const [table, ...rest] = name.split(".");
  return h("tr", { class: differs ? "differs" : null },
    h("th", { scope: "row" }, h("span", { class: "table" }, `${table}.`), rest.join(".")),
    ...runs.map((run) => h("td", {}, written(run.settings[name]))));
}

const written = (value) => (value === undefined ? "–" : JSON.stringify(value));
