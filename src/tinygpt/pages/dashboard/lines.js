// What the charts draw of a run: its curves over steps, tokens or time, in nats or in bits per byte.

import { usual } from "../shared/axes.js";
import { swatch } from "../shared/chart.js";
import { clamp, h } from "../shared/dom.js";
import { nearest, smooth } from "../shared/series.js";
import { choices } from "./choices.js";

const MANY = 3; // runs beyond which only the one in focus shows its spread
const SMOOTHED = ", smoothed";
const STEADY = ["lr", "memory"]; // curves that are never smoothed

/** Tokens of one step of a run; NaN where its settings do not say. */
const tokensOf = ({ settings: s }) => s["train.batch_size"] * (s["train.grad_accum_steps"] ?? 1) * s["model.block_size"];

export const hasTokens = (runs) => runs.every((run) => tokensOf(run) > 0);
export const hasBits = (runs) => runs.every((run) => run.bits_per_nat);

/** The x axis that was chosen, or steps where a run lacks what it takes; the loss's unit likewise. */
export const axis = (runs) => (choices.x !== "tokens" || hasTokens(runs) ? choices.x : "step");
export const unit = (runs) => (hasBits(runs) ? choices.unit : "nats");

/** From steps of a run to places on the x axis, and with ``back`` the other way round. */
export function placing(run, x, back = false) {
  if (x === "step") return (step) => step;
  if (x === "tokens") return (step) => (back ? step / tokensOf(run) : step * tokensOf(run));
  let latest = 0;
  const pairs = run.series.x.mean.map((step, i) => {
    latest = Math.max(latest, run.series.curves.elapsed.mean[i] ?? 0); // a resumed run may go back
    return [step, latest];
  });
  const [from, to] = (back ? [1, 0] : [0, 1]).map((side) => pairs.map((pair) => pair[side]));
  return (value) => between(from, to, value);
}

/** The value at ``x`` on the line through some points, of which there is at least one. */
function between(xs, ys, x) {
  let i = nearest(xs, x);
  if (xs[i] < x) i++;
  i = clamp(i, 1, xs.length - 1);
  const width = xs[i] - xs[i - 1];
  return width > 0 ? ys[i - 1] + ((x - xs[i - 1]) / width) * (ys[i] - ys[i - 1]) : ys[Math.max(i, 0)];
}

/** The finer curves of what is seen, if they are there. */
export const detail = (run) => (choices.range && run.detail?.of === choices.range ? run.detail : null);

/** Training and validation of a run, with its best. */
export function lossLines(run, runs, focused, x, scale) {
  const { validation } = detail(run) ?? run.series;
  const at = placing(run, x);
  const name = (what) => (runs.length > 1 ? `${run.name}, ${what}` : what);
  const told = run === focused || runs.length <= MANY;
  return [
    ...curveLines(run, "train_loss", name("training"), runs, focused, x, scale),
    {
      ...run.look, name: told ? name("validation") : null, x: validation.x.map(at), y: scaled(validation.y, scale),
      width: 1.2, dots: true, best: told && run.best_iter !== null && [at(run.best_iter), run.best_val_loss * scale],
    },
  ];
}

/** Lines of one curve: as it was measured, or that faintly and a smooth one over it. */
export function curveLines(run, key, name, runs, focused, x, scale = 1) {
  const series = detail(run) ?? run.series;
  const { low, high, mean } = series.curves[key];
  const y = scaled(mean, scale);
  const line = { ...run.look, x: series.x.mean.map(placing(run, x)), name, stride: series.stride };
  const [many, inFront] = [runs.length > MANY, run === focused];
  const spread = series.stride > 1 && low && (inFront || !many) ? { low: scaled(low, scale), high: scaled(high, scale) } : {};
  if (!choices.smooth || STEADY.includes(key) || y.length < 8) return [{ ...line, ...spread, y }];
  const rough = { ...line, ...spread, y, name: null, faint: true, width: 1, dash: [] };
  const even = key === "grad_norm" ? smoothLog(y) : smooth(choices.outliers ? y : usual(y));
  return [...(inFront || !many ? [rough] : []), { ...line, y: even, name: `${name}${SMOOTHED}`, width: inFront && many ? 2.8 : 2 }];
}

const scaled = (values, scale) => (scale === 1 ? values : values.map((value) => value && value * scale));

/** On a logarithmic axis a single spike must not lift its neighbours. */
const smoothLog = (values) =>
  smooth(values.map((n) => (n > 0 ? Math.log(n) : null))).map((n) => n && Math.exp(n));

/** The legend: what each kind of line means, and each colour where there are several runs. */
export function legend(lines, runs, marks) {
  const look = runs.length === 1 ? runs[0].look : { color: "--muted" };
  const entries = [
    [look, `training${lines.some((line) => line.name?.endsWith(SMOOTHED)) ? SMOOTHED : ""}`],
    lines.some((line) => line.faint) && [{ ...look, faint: true, width: 1.5 }, "as measured"],
    lines.some((line) => line.low) && [{ ...look, band: true }, "from the lowest to the highest step"],
    lines.some((line) => line.dots && line.x.length) && [{ ...look, dots: true, width: 1.2 }, "validation"],
    lines.some((line) => line.best) && [{ ...look, sign: "best" }, "best"],
    marks.length > 0 && [{ color: "--bad", sign: "skipped" }, "a step that was skipped"],
    ...(runs.length > 1 ? runs.map((run) => [run.look, run.name]) : []),
  ];
  return entries.filter(Boolean).map(([of, text]) => h("span", { class: "check" }, swatch(of), text));
}
