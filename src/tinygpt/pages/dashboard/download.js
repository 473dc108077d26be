// What is seen as a file: the values as CSV, the losses as a picture.

import { download, h } from "../shared/dom.js";

const CURVES = ["train_loss", "lr", "grad_norm", "tokens_per_second", "memory", "elapsed"];

/** The curves of some runs, as fine as they are here: a row for each point and each evaluation. */
export function saveCsv(runs) {
  const rows = runs.flatMap(({ name, series, bits_per_nat: scale }) => {
    const row = (step, values) => [`"${name.replaceAll('"', '""')}"`, step, ...values].join(",");
    const bits = (loss) => (scale && loss !== null ? loss * scale : "");
    const { x, curves, validation } = series;
    return [
      ...x.mean.map((step, i) => row(step, [...CURVES.map((key) => curves[key].mean[i]), "", bits(curves.train_loss.mean[i]), ""])),
      ...validation.x.map((step, i) => row(step, [...CURVES.map(() => ""), validation.y[i], "", bits(validation.y[i])])),
    ];
  });
  const heads = ["run", "step", ...CURVES, "val_loss", "train_bits_per_byte", "val_bits_per_byte"];
  download([heads.join(","), ...rows, ""].join("\n"), "text/csv", "curves.csv");
}

/** A chart as it is drawn, with its title and the names of its lines above it. */
export function savePng(chart, title, runs) {
  const { canvas } = chart;
  const ratio = window.devicePixelRatio || 1;
  const head = 22 * (runs.length + 1) + 10;
  const picture = h("canvas", { width: canvas.width, height: canvas.height + head * ratio });
  const context = picture.getContext("2d");
  const ink = (name) => getComputedStyle(canvas).getPropertyValue(name);
  const write = (text, color, x, row) => {
    context.fillStyle = ink(color);
    context.fillText(text, x, 22 * row + 20);
  };
  context.scale(ratio, ratio);
  context.fillStyle = ink("--surface");
  context.fillRect(0, 0, picture.width, picture.height);
  context.font = `600 14px ${getComputedStyle(canvas).fontFamily}`;
  write(title, "--ink", 12, 0);
  runs.forEach((run, i) => write(`— ${run.name}`, run.look.color, 12, i + 1));
  context.drawImage(canvas, 0, head, canvas.width / ratio, canvas.height / ratio);
  picture.toBlob((blob) => download(blob, "image/png", "loss.png"));
}
