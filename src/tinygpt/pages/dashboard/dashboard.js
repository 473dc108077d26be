// The dashboard: runs, their curves, their samples, as they stand and as they go on.

import { Chart } from "../shared/chart.js";
import { showSettings } from "./differences.js";
import { byId, debounced, h } from "../shared/dom.js";
import { Feed } from "./feed.js";
import { Film } from "./film.js";
import * as format from "../shared/format.js";
import { ApiError, get, request } from "../shared/net.js";
import { look, repaint, RunList, showFigures } from "./runs.js";
import { Series, smooth } from "../shared/series.js";
import { Strip } from "./strip.js";

const SHOWN_AT_FIRST = 10;
const MANY = 3; // runs beyond which only the one in focus shows its spread
const CHOICES = "tinygpt-dashboard";
const SMOOTHED = ", smoothed";

const runs = new Map(); // by id, in the order in which they came
let order = [];
let focused = null;
let range = null; // the steps that are seen; null for all
let away = false; // whether the server does not answer
const choices = { log: false, smooth: true, ...stored() };

const list = new RunList({ onShow: calmly(showRun), onFocus: calmly(focus) });
const film = new Film({ onStep: point });
const strip = new Strip(byId("layers"));
const feed = new Feed({ cursor, onEvent: take, onState: tellLink });
const charts = Object.fromEntries(
  Object.entries({
    loss: { title: "Loss", write: format.loss, ticks: 7 },
    grad_norm: { title: "Gradient norm", write: format.short },
    lr: { title: "Learning rate", write: format.short, zero: true },
    tokens_per_second: { title: "Tokens per second", write: format.many, zero: true },
    memory: { title: "Memory", write: format.megabytes, zero: true },
  }).map(([key, options]) => [key, new Chart(byId(key), { ...options, onZoom: zoom, onPoint: point })]),
);

// ---- what there is ----

const listed = () => order.map((id) => runs.get(id)).filter(Boolean);
const shown = () => listed().filter((run) => run.shown && run.series);

function cursor() {
  return shown().map((run) => `${run.id}:${run.series.rows}:${run.series.mark}`).join(",");
}

async function begin() {
  const answer = await get("dashboard/runs");
  byId("pages").hidden = !answer.playground;
  answer.runs.forEach((card) => add(card, runs.size < SHOWN_AT_FIRST));
  order = answer.runs.map((card) => card.id);
  await Promise.all(listed().filter((run) => run.shown).map(load));
  await focus(order[0] ?? null);
  feed.restart();
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
  if (!answer) {
    if (fresh && run.id === focused) film.load([], run, true); // not those of another run
    return;
  }
  run.frames = answer.samples;
  if (run.id === focused) film.load(run.frames, run, fresh);
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

const show = (() => {
  let frame = null;
  return () => (frame ??= requestAnimationFrame(() => {
    frame = null;
    showAll();
  }));
})();

function showAll() {
  const run = runs.get(focused);
  byId("empty").hidden = order.length > 0;
  byId("board").hidden = !run;
  list.show(listed(), focused);
  if (!run) return;
  document.title = `${run.state === "training" && !away ? "▶ " : ""}${run.name} · TinyGPT`;
  showFigures(run);
  byId("buttons").hidden = run.state !== "training";
  byId("save").disabled = byId("stop").disabled = away;
  byId("away").hidden = !away;
  showOdd(run);
  for (const of of document.querySelectorAll("[data-of-run]")) of.textContent = run.name;
  showCurves();
  showLayers(run);
  showSettings(shown().length ? shown() : [run], choices.same);
  byId("whole").hidden = range === null;
  document.documentElement.dataset.ready = "true";
}

/** What is wrong with the run's files, if anything is. */
function showOdd({ odd }) {
  byId("odd").hidden = !odd.length;
  byId("odd-list").replaceChildren(...odd.map((reason) => h("li", {}, reason)));
}

function showCurves() {
  const seen = shown().sort((a, b) => (a.id === focused) - (b.id === focused)); // on top, it is last
  const several = seen.length > 1;
  const marks = seen.flatMap((run) => run.series.skipped);
  charts.loss.show({ lines: seen.flatMap((run) => lossLines(run, several)), marks, range, log: choices.log });
  for (const key of ["grad_norm", "lr", "tokens_per_second", "memory"]) {
    const lines = seen.flatMap((run) => curveLines(run, key, run.name, choices.smooth && !["lr", "memory"].includes(key)));
    charts[key].show({ lines, range, log: key === "grad_norm" });
  }
  byId("keys").textContent = keysOf(charts.loss.lines, marks);
}

/** What the lines of the losses mean that are drawn. */
function keysOf(lines, marks) {
  const smoothed = lines.some((line) => line.name?.endsWith(SMOOTHED));
  return [
    `Thick: training${smoothed ? SMOOTHED : ""}.`,
    lines.some((line) => line.low) && "The shade behind it: from the lowest to the highest step.",
    lines.some((line) => line.faint) && "Faint: as it was.",
    lines.some((line) => line.dots && line.x.length) && "Thin: validation.",
    marks.length > 0 && "▲ a step that was skipped.",
  ].filter(Boolean).join(" ");
}

function lossLines(run, several) {
  const { x, y } = (detail(run) ?? run.series).validation;
  const name = (what) => (several ? `${run.name}, ${what}` : what);
  const told = run.id === focused || shown().length <= MANY;
  const color = several ? run.look : { color: "--run-1", dash: [] };
  return [
    ...curveLines(run, "train_loss", name("training"), choices.smooth),
    { ...color, name: told ? name("validation") : null, x, y, width: 1.4, dots: true },
  ];
}

/** Lines of one curve: as it is, or faint with a smooth one over it. */
function curveLines(run, key, name, smoothly) {
  const series = detail(run) ?? run.series;
  const { mean: found, low, high } = series.curves[key];
  const mean = key === "memory" ? found.map((n) => n && n / 2 ** 20) : found;
  const line = { ...run.look, x: series.x.mean, name, stride: series.stride };
  const many = shown().length > MANY;
  const inFront = run.id === focused;
  const spread = series.stride > 1 && (inFront || !many) ? { low, high } : {};
  if (!smoothly || mean.length < 8) return [{ ...line, ...spread, y: mean }];
  const rough = { ...line, ...spread, y: mean, name: null, faint: true, width: 1, dash: [] };
  const even = key === "grad_norm" ? smoothLog(mean) : smooth(mean);
  return [...(inFront || !many ? [rough] : []), { ...line, y: even, name: `${name}${SMOOTHED}`, width: inFront && many ? 2.8 : 2 }];
}

/** On a logarithmic axis a single spike must not lift its neighbours. */
const smoothLog = (values) =>
  smooth(values.map((n) => (n > 0 ? Math.log(n) : null))).map((n) => n && Math.exp(n));

/** The finer curves of the steps that are seen, if they are there. */
const detail = (run) => (range && run.detail?.of === range ? run.detail : null);

function showLayers(run) {
  const source = run.series && (detail(run) ?? run.series);
  const layers = source ? [...source.layers].map(([name, buckets]) => [name, buckets.mean]) : [];
  const there = layers.length > 0;
  byId("layers").hidden = byId("scale").hidden = !there;
  byId("layers-hint").textContent = there
    ? "Embeddings first, then the layers from the text upwards; colours as on the scale, before clipping."
    : run.iter === null ? "They come with the first step." : "The rows of this run hold no gradient norms by layer.";
  if (there) strip.show(source.layerX.mean, layers, range, source.layerX.stride);
}

// ---- what a person does ----

async function showRun(id, isShown) {
  const run = runs.get(id);
  run.shown = isShown;
  if (isShown && !run.series) await load(run);
  if (isShown && !order.includes(focused)) await focus(id);
  await fetchDetail();
  show();
  feed.restart();
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

function zoom(to) {
  range = to;
  point(null);
  show();
  if (range) fetchDetailSoon();
}

const fetchDetailSoon = debounced(120, fetchDetail);

/** Finer curves for the steps that are seen, of runs of which not every row is here. */
async function fetchDetail() {
  const of = range;
  if (!of) return;
  await Promise.all(shown().filter((run) => run.series.stride > 1 && !detail(run)).map(async (run) => {
    const answer = await get(`dashboard/runs/${run.id}/curves?from=${of[0]}&to=${of[1]}`).catch(() => null);
    if (answer && range === of) run.detail = Object.assign(new Series(answer), { of });
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

function stop() {
  const run = runs.get(focused);
  byId("stopping-text").textContent =
    `${run.name} ends after the step in progress, with a checkpoint. It can be resumed with: tinygpt train --resume --out …`;
  byId("stopping").returnValue = "";
  byId("stopping").showModal();
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

function stored() {
  try {
    return JSON.parse(localStorage.getItem(CHOICES)) ?? {};
  } catch {
    return {};
  }
}

function choose(name, value) {
  choices[name] = value;
  try {
    localStorage.setItem(CHOICES, JSON.stringify(choices));
  } catch {
    // storage is switched off: the choice lasts as long as the page
  }
  show();
}

for (const name of ["log", "smooth", "same"]) {
  byId(name).checked = Boolean(choices[name]);
  byId(name).addEventListener("change", (event) => choose(name, event.target.checked));
}
byId("whole").addEventListener("click", () => {
  zoom(null);
  charts.loss.canvas.focus();
});
byId("save").addEventListener("click", () => ask("save", "A checkpoint comes after the step in progress."));
byId("stop").addEventListener("click", stop);
byId("stopping").addEventListener("close", (event) => {
  if (event.target.returnValue === "stop") ask("stop", "It stops after the step in progress.");
});
document.addEventListener("themechange", () => {
  repaint(list, listed());
  for (const chart of Object.values(charts)) chart.redraw();
  strip.redraw();
  show();
});

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
