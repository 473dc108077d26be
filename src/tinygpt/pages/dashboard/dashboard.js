// The dashboard: runs, their curves, their samples, as they stand and as they go on.

import { Chart } from "../shared/chart.js";
import { byId, debounced, h, modal } from "../shared/dom.js";
import * as format from "../shared/format.js";
import { ApiError, get, request } from "../shared/net.js";
import { Series } from "../shared/series.js";
import { choices, choose } from "./choices.js";
import { showSettings } from "./differences.js";
import { saveCsv, savePng } from "./download.js";
import { Feed } from "./feed.js";
import { Film } from "./film.js";
import { axis, curveLines, detail, hasBits, hasTokens, legend, lossLines, placing, unit } from "./lines.js";
import { look, RunList, showFigures } from "./runs.js";
import { Strip } from "./strip.js";

const SHOWN_AT_FIRST = 10;
const UNIT_NAMES = { nats: "nats per token", bits: "bits per byte" };

const runs = new Map(); // by id, in the order in which they came
let order = [];
let focused = null;
let away = false; // whether the server does not answer

const list = new RunList({ onShow: calmly(showRun), onFocus: calmly(chooseRun) });
const film = new Film({ onStep: (step) => {
  const run = runs.get(focused);
  point(step === null || !run.series ? null : placing(run, axis(shown()))(step));
} });
const strip = new Strip(byId("layers"));
const feed = new Feed({ cursor, onEvent: take, onState: tellLink });
const SMALL = {
  grad_norm: { title: "Gradient norm", unit: "before clipping", write: format.short },
  lr: { title: "Learning rate", write: format.short, zero: true },
  tokens_per_second: { title: "Speed", unit: "tokens per second", write: format.many, zero: true },
  memory: { title: "Memory", write: format.megabytes, zero: true },
};
const charts = { loss: new Chart(byId("loss"), { title: "Loss", write: format.loss, ticks: 7, onZoom: zoom, onPoint: point }) };
for (const [key, options] of Object.entries(SMALL)) {
  const holder = h("div", { class: "chart", id: key });
  const title = h("h2", { id: `${key}-title` }, `${options.title} `, options.unit && h("span", { class: "unit" }, options.unit));
  byId("small").append(h("section", { class: "card", "aria-labelledby": title.id }, title, holder));
  charts[key] = new Chart(holder, { ...options, onZoom: zoom, onPoint: point });
}

// ---- what there is ----

const listed = () => order.map((id) => runs.get(id)).filter(Boolean);
const shown = () => listed().filter((run) => run.shown && run.series);

function cursor() {
  return shown().map((run) => `${run.id}:${run.series.rows}:${run.series.mark}`).join(",");
}

async function begin() {
  const answer = await get("dashboard/runs");
  byId("pages").hidden = !answer.playground;
  answer.runs.forEach((card) => add(card, choices.shown?.includes(card.id) ?? runs.size < SHOWN_AT_FIRST));
  order = answer.runs.map((card) => card.id);
  await Promise.all(listed().filter((run) => run.shown).map(load));
  await focus(order.includes(choices.run) ? choices.run : order[0] ?? null);
  feed.restart();
  await fetchDetail();
}

function add(card, isShown) {
  const run = runs.get(card.id) ?? { look: look(runs.size), shown: isShown, series: null, frames: null, settings: {} };
  runs.set(card.id, Object.assign(run, card));
  return run;
}

/** Fetch all of a run's curves. */
async function load(run) {
  run.loading = true;
  try {
    run.series = new Series(await get(`dashboard/runs/${run.id}/curves`));
    run.detail = null;
  } catch (error) {
    if (error.status !== 404) throw error; // it has gone meanwhile
  } finally {
    run.loading = false;
  }
}

async function loadSamples(run) {
  const fresh = run.frames === null;
  const answer = await get(`dashboard/runs/${run.id}/samples`).catch(() => null);
  run.frames = answer?.samples ?? run.frames;
  if (run.id === focused && (answer || fresh)) film.load(run.frames ?? [], run, fresh); // not those of another run
}

/** One event: cards that have changed, rows that are new, and the order of all. */
async function take(event) {
  const stale = [];
  let unknown = false;
  for (const { new: added, from, reload, rows, mark, ...card } of event.runs) {
    unknown ||= !runs.has(card.id);
    const before = runs.get(card.id)?.frames?.length;
    const run = add(card, order.length < SHOWN_AT_FIRST);
    const whole = !reload && (!added || !run.series || run.series.append(from, added, mark, rows));
    if (reload) run.frames = null;
    if (!whole || (run.shown && !run.series)) stale.push(run);
    if (run.id === focused && (run.frames === null || before !== card.samples)) loadSamples(run);
  }
  order = event.order;
  for (const id of [...runs.keys()]) if (!order.includes(id)) runs.get(id).shown = false;
  if (unknown || stale.length) await catchUp(unknown, stale);
  if (!order.includes(focused)) await focus(order[0] ?? null);
  show();
}

async function catchUp(unknown, stale) {
  await Promise.all(stale.filter((run) => !run.loading).map(load));
  const { runs: cards } = await get("dashboard/runs"); // with settings, which may be others now
  for (const card of cards) add(card, order.length <= SHOWN_AT_FIRST);
  if (unknown) await Promise.all(listed().filter((run) => run.shown && !run.series && !run.loading).map(load));
  feed.restart();
}

// ---- what is seen ----

let frame = null;

function show() {
  frame ??= requestAnimationFrame(showAll);
}

function showAll() {
  frame = null;
  const run = runs.get(focused);
  byId("empty").hidden = order.length > 0;
  byId("board").hidden = !run;
  list.show(listed(), focused);
  if (!run) return;
  document.title = `${run.state === "training" && !away ? "▶ " : ""}${run.name} · TinyGPT`;
  const seen = shown();
  const [x, of] = [axis(seen), unit(seen)];
  const scale = (each) => (of === "bits" ? each.bits_per_nat : 1);
  showFigures(run, of === "bits" && run.bits_per_nat ? run.bits_per_nat : 1);
  byId("buttons").hidden = run.state !== "training";
  byId("save").disabled = byId("stop").disabled = away;
  byId("away").hidden = !away;
  showOdd(run);
  for (const part of document.querySelectorAll("[data-of-run]")) part.textContent = run.name;
  byId("x").value = x;
  byId("unit").value = of;
  byId("x").options[1].disabled = !hasTokens(seen);
  byId("unit").options[1].disabled = !hasBits(seen);
  showCurves(run, seen, x, scale);
  showLayers(run, x);
  showSettings(seen.length ? seen : [run], choices.same);
  byId("whole").hidden = choices.range === null;
  document.documentElement.dataset.ready = "true";
}

/** What is wrong with the run's files, if anything is. */
function showOdd({ odd, damaged }) {
  const told = damaged ? [...odd, `metrics.jsonl: ${format.steps(damaged)} damaged lines.`] : odd;
  byId("odd").hidden = !told.length;
  byId("odd-list").replaceChildren(...told.map((reason) => h("li", {}, reason)));
}

function showCurves(run, seen, x, scale) {
  const order = seen.toSorted((a, b) => (a === run) - (b === run)); // the last is on top
  const { range, log, outliers } = choices;
  const marks = seen.flatMap((each) => each.series.skipped.map(([step, why]) => [placing(each, x)(step), why]));
  const lines = order.flatMap((each) => lossLines(each, seen, run, x, scale(each)));
  charts.loss.show({ lines, marks, range, log, cut: !outliers, unit: x });
  for (const key of Object.keys(SMALL)) {
    const of = order.flatMap((each) => curveLines(each, key, each.name, seen, run, x, key === "memory" ? 2 ** -20 : 1));
    charts[key].show({ lines: of, range, log: key === "grad_norm", cut: !outliers && key === "tokens_per_second", unit: x });
  }
  byId("keys").replaceChildren(...legend(lines, seen, marks));
}

function showLayers(run, x) {
  const source = run.series && (detail(run) ?? run.series);
  const layers = source ? [...source.layers].map(([name, buckets]) => [name, buckets.mean]) : [];
  const there = layers.length > 0;
  byId("layers").hidden = byId("scale").hidden = !there;
  byId("layers-hint").textContent = there
    ? "Embeddings first, then the layers from the text upwards; colours as on the scale, before clipping."
    : run.iter === null ? "They come with the first step." : "The rows of this run hold no gradient norms by layer.";
  if (there) strip.show(source.layerX.mean.map(placing(run, x)), layers, choices.range, source.layerX.stride, x);
}

// ---- what a person does ----

async function showRun(id, isShown) {
  const run = runs.get(id);
  run.shown = isShown;
  if (isShown && !run.series) await load(run);
  if (isShown && !order.includes(focused)) await focus(id);
  choose({ shown: listed().filter((each) => each.shown).map((each) => each.id) });
  await fetchDetail();
  show();
  feed.restart();
}

async function chooseRun(id) {
  choose({ run: id });
  await focus(id);
}

async function focus(id) {
  focused = id;
  byId("told").textContent = "";
  const run = runs.get(id);
  if (!run) return show();
  if (run.frames) film.load(run.frames, run, true);
  else loadSamples(run);
  if (!run.shown || !run.series) {
    run.shown = true;
    await load(run);
    feed.restart();
  }
  show();
}

/** What a person asked for, and the server could not give: said, and made up for when it is back. */
function calmly(action) {
  return (...given) => action(...given).catch((error) => {
    if (!(error instanceof ApiError)) throw error;
    show();
    byId("told").textContent = error.message;
  });
}

function zoom(range) {
  choose({ range });
  point(null);
  show();
  if (range) fetchDetailSoon();
}

const fetchDetailSoon = debounced(120, fetchDetail);

/** Finer curves for what is seen, of runs of which not every row is here. */
async function fetchDetail() {
  const of = choices.range;
  if (!of) return;
  const x = axis(shown());
  await Promise.all(shown().filter((run) => run.series.stride > 1 && !detail(run)).map(async (run) => {
    const [from, to] = of.map(placing(run, x, true));
    const answer = await get(`dashboard/runs/${run.id}/curves?from=${from}&to=${to}`).catch(() => null);
    if (answer && choices.range === of) run.detail = Object.assign(new Series(answer), { of });
  }));
  show();
}

function point(step) {
  for (const chart of Object.values(charts)) chart.point(step);
}

async function ask(what, told) {
  const run = runs.get(focused);
  byId("told").textContent = "";
  try {
    await request(`dashboard/runs/${run.id}/${what}`, { method: "POST" });
    byId("told").textContent = told;
  } catch (error) {
    byId("told").textContent = error.message;
  }
}

async function stop() {
  const sure = await modal({ "aria-labelledby": "stopping" },
    h("h2", { id: "stopping" }, "Stop this training?"),
    h("p", {}, `${runs.get(focused).name} ends after the step in progress, with a checkpoint. It can be resumed with: tinygpt train --resume --out …`),
    h("div", { class: "row" }, h("button", { value: "stop", class: "primary" }, "Stop it"), h("button", {}, "Let it go on")));
  if (sure) ask("stop", "It stops after the step in progress.");
}

// ---- the rest ----

function tellLink(state) {
  const words = { live: "live", waiting: "connection lost, it is tried again", refused: "needs the key" };
  byId("link").textContent = words[state];
  byId("link").dataset.state = state;
  if (away === (state === "waiting")) return;
  away = !away;
  if (!away) byId("told").textContent = "";
  show();
}

for (const name of ["log", "smooth", "outliers", "same"]) byId(name).checked = choices[name];
for (const name of ["log", "smooth", "outliers", "same", "x", "unit"]) {
  byId(name).addEventListener("change", ({ target }) => {
    choose({ [name]: target.type === "checkbox" ? target.checked : target.value });
    if (name === "x") zoom(null); // another axis has other places
    else show();
  });
}
byId("csv").addEventListener("click", () => saveCsv(shown()));
byId("png").addEventListener("click", () => savePng(charts.loss, `Loss, ${UNIT_NAMES[unit(shown())]}`, shown()));
byId("whole").addEventListener("click", () => {
  zoom(null);
  charts.loss.canvas.focus();
});
byId("save").addEventListener("click", () => ask("save", "A checkpoint comes after the step in progress."));
byId("stop").addEventListener("click", stop);
document.addEventListener("themechange", show);

/** Not by loading the page again: where no server answers, that is the end of the page. */
async function start() {
  try {
    await begin();
    byId("error").hidden = true;
  } catch (error) {
    byId("error").textContent = error.message;
    byId("error").hidden = false;
    if (error.status !== 401) setTimeout(start, 3000);
    if (!(error instanceof ApiError)) throw error;
  }
}

start();
