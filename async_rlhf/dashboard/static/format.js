// Numbers for people. What is not known is a dash.

export const ABSENT = "\u2013";

const known = (value) => typeof value === "number" && Number.isFinite(value);
const fixed = (value, digits) => value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });

/** Three digits or so: 0.283, 17.2, 1,717. */
export function num(value) {
  if (!known(value)) return ABSENT;
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e9)) return value.toExponential(1);
  return fixed(value, Number.isInteger(value) || size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3);
}

/** A count. */
export const whole = (value) => (known(value) ? fixed(Math.round(value), 0) : ABSENT);

/** A share of 1 as per cent. */
export const share = (value) => (known(value) ? `${fixed(100 * value, 0)} %` : ABSENT);

/** A duration: 80 ms, 3.2 s, 4:05, 2:07:10. */
export function seconds(value) {
  if (!known(value)) return ABSENT;
  if (value < 0.9995) return `${fixed(1000 * value, value < 0.01 ? 1 : 0)} ms`;
  if (value < 59.95) return `${fixed(value, 1)} s`;
  const all = Math.round(value), two = (part) => String(part).padStart(2, "0");
  const [hours, minutes] = [Math.floor(all / 3600), Math.floor((all % 3600) / 60)];
  return hours ? `${hours}:${two(minutes)}:${two(all % 60)}` : `${minutes}:${two(all % 60)}`;
}

/** How long ago: 3 s, 5 min, 2 h, 4 d. */
export function ago(value) {
  if (!known(value)) return ABSENT;
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) if (value >= 2 * size) return `${Math.floor(value / size)} ${unit} ago`;
  return `${Math.floor(value)} s ago`;
}

/** A rate with its unit: so many per second, or per minute where that is easier to read. */
export function rate(perSecond, unit) {
  if (!known(perSecond)) return [ABSENT, `${unit}/s`];
  return perSecond > 0 && perSecond < 0.1 ? [num(60 * perSecond), `${unit}/min`] : [num(perSecond), `${unit}/s`];
}

/** A moment of Unix seconds, in this browser's zone. */
export const clock = (unix) => (known(unix) ? new Date(1000 * unix).toLocaleString("sv-SE", { dateStyle: "short", timeStyle: "medium" }) : ABSENT);
