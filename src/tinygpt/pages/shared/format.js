// Numbers as people read them.

import { whole } from "./dom.js";

const NOTHING = "–";

const given = (write) => (n) => (n == null || !Number.isFinite(n) ? NOTHING : write(n));

/** 2.1034 */
export const loss = given((n) => (Math.abs(n) < 1e4 ? n.toFixed(4) : n.toExponential(2)));

/** 3 digits, in powers of ten where they are far from one: 0.123, 4.5e-5 */
export const short = given((n) => {
  const size = Math.abs(n);
  if (size !== 0 && (size < 1e-2 || size >= 1e5)) return n.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(n.toPrecision(3)));
});

/** 1,234 or 12.3k or 4.56M */
export const many = given((n) => {
  if (n < 1e4) return whole(Math.round(n));
  return n < 1e6 ? `${(n / 1e3).toFixed(1)}k` : `${(n / 1e6).toFixed(2)}M`;
});

/** Megabytes: 512 MB, 1.25 GB */
export const megabytes = given((n) => (n < 1000 ? `${Math.round(n)} MB` : `${(n / 1024).toFixed(2)} GB`));

/** Whole steps: 12,345 */
export const steps = given((n) => whole(Math.round(n)));

/** 59s, 3m 20s, 2h 05m, 3d 4h */
export const duration = given((seconds) => {
  const total = Math.max(Math.floor(seconds), 0);
  const [minutes, hours, days] = [60, 3600, 86400].map((size) => Math.floor(total / size));
  const two = (n) => String(n).padStart(2, "0");
  if (days) return `${days}d ${hours % 24}h`;
  if (hours) return `${hours}h ${two(minutes % 60)}m`;
  return minutes ? `${minutes}m ${two(total % 60)}s` : `${total}s`;
});
