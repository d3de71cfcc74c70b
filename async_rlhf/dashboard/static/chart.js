// One figure: lines over the policy version, with axes, a legend, and values under the pointer or the arrow keys.

import { el, put, svg } from "./dom.js";
import { num, share, whole } from "./format.js";

const HEIGHT = 220, LEFT = 50, RIGHT = 12, TOP = 24, BOTTOM = 36;
const MAX_LINEAR_RATIO = 8; // as in the report: lines further apart share a logarithmic axis
const MAX_MARKED = 60;

/**
 * @typedef {{label: string, colour: string, x: number[], y: (number|null)[], low?: (number|null)[], high?: (number|null)[],
 *   smooth?: (number|null)[], to?: (number|null)[]}} Series  `colour` names a CSS variable; `to`: shade the space up to there.
 * @typedef {{name: string, title: string, y_label: string, caption: string, signed: boolean, percent: boolean, level: number|null,
 *   level_label: string}} Curve
 */

/** A figure for a curve; `draw(series, bound)` shows new points. */
export function chart(/** @type {Curve} */ curve) {
  const legend = el("div", { class: "legend" }), tip = el("div", { class: "tip", hidden: true });
  const picture = svg("svg", { class: "chart", role: "img", tabindex: 0, "aria-label": `${curve.title}, ${curve.y_label}, over the policy version. Arrow keys show values.` });
  const figure = el("figure", { class: "card", id: `curve-${curve.name}` }, el("h3", {}, curve.title), legend, picture, tip, el("figcaption", {}, curve.caption));
  let shown = null, at = null;

  const redraw = () => {
    if (!shown || !picture.clientWidth) return;
    const plot = layOut(curve, shown.series, shown.bound, picture.clientWidth);
    picture.setAttribute("viewBox", `0 0 ${plot.width} ${HEIGHT}`);
    picture.setAttribute("height", String(HEIGHT));
    put(picture, ...axes(plot), ...shown.series.flatMap((series) => lines(series, plot)), ...cursor(curve, shown.series, plot, at, tip));
  };
  const point = (event) => {
    if (!shown) return;
    const box = picture.getBoundingClientRect(), plot = layOut(curve, shown.series, shown.bound, picture.clientWidth);
    at = nearest(plot.versions, plot.from + ((event.clientX - box.left - LEFT) / plot.inner) * (plot.to - plot.from));
    redraw();
  };
  const leave = () => { at = null; tip.hidden = true; redraw(); };
  const key = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
    if (!step || !shown) return;
    event.preventDefault();
    const { versions } = layOut(curve, shown.series, shown.bound, picture.clientWidth);
    const index = at === null ? versions.length - 1 : versions.indexOf(at) + step;
    at = versions[Math.max(0, Math.min(versions.length - 1, index))] ?? null;
    redraw();
  };
  picture.addEventListener("pointermove", point);
  picture.addEventListener("pointerleave", leave);
  picture.addEventListener("keydown", key);
  picture.addEventListener("blur", leave);
  new ResizeObserver(redraw).observe(picture);

  return {
    figure,
    draw(/** @type {Series[]} */ series, /** @type {number|null} */ bound = null) {
      shown = { series, bound };
      put(legend, ...series.map((each) => legendOf(curve, each)), curve.level === null ? null : dashed(curve.level_label), bound === null ? null : dashed(`bound ${num(bound)}`));
      redraw();
    },
  };
}

const valueText = (curve, value) => (curve.percent ? share(value) : num(value));
const dashed = (text) => el("span", {}, el("i", { class: "key dashed" }), text);

function key(colour) {
  const mark = el("i", { class: "key" });
  mark.style.color = `var(--${colour})`;
  return mark;
}

function legendOf(curve, series) {
  const last = series.y.findLast((value) => value !== null) ?? null;
  return el("span", {}, key(series.colour), el("bdi", {}, series.label), " ", el("b", {}, valueText(curve, last)));
}

/** Scales: where a version and a value lie. */
function layOut(curve, all, bound, width) {
  const versions = [...new Set(all.flatMap((series) => series.x))].sort((a, b) => a - b);
  const from = versions[0] ?? 0, to = Math.max(versions.at(-1) ?? 1, from + 1);
  const factor = curve.percent ? 100 : 1;
  const values = all.flatMap((series) => [series.y, series.low ?? [], series.high ?? []].flat()).filter((value) => value !== null).map((value) => value * factor);
  const extra = [bound, curve.level].filter((value) => value !== null);
  let low = Math.min(...values, ...extra), high = Math.max(...values, ...extra);
  const tops = all.map((series) => Math.max(...series.y.filter((value) => value !== null))).filter((top) => top > 0);
  const log = tops.length > 1 && !curve.signed && !curve.percent && bound === null && Math.max(...tops) > MAX_LINEAR_RATIO * Math.min(...tops);
  if (curve.percent) [low, high] = [0, 100];
  else if (log) low = Math.max(Math.min(...values.filter((value) => value > 0)), high / 1e5);
  else if (!curve.signed) low = Math.min(0, low);
  if (!Number.isFinite(low)) [low, high] = [0, 1];
  if (high - low < 1e-9 * Math.max(1, Math.abs(high))) high = low + (Math.abs(low) || 1);
  if (!curve.percent && !log) { const room = 0.06 * (high - low); high += room; if (curve.signed) low -= room; }
  const scale = log ? Math.log10 : (value) => value;
  const inner = width - LEFT - RIGHT, tall = HEIGHT - TOP - BOTTOM;
  return {
    width, inner, versions, from, to, factor, bound, level: curve.level, label: log ? `${curve.y_label} (log)` : curve.y_label,
    x: (version) => LEFT + ((version - from) / (to - from)) * inner,
    y: (value) => (log && value <= 0 ? NaN : TOP + tall - ((scale(value * factor) - scale(low)) / (scale(high) - scale(low))) * tall),
    ticks: log ? logTicks(low, high) : ticks(low, high, 4),
    marks: ticks(from, to, Math.max(2, Math.floor(width / 65))).filter(Number.isInteger),
  };
}

/** Round numbers from low to high. */
function ticks(low, high, about) {
  const raw = (high - low) / about, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((size) => size >= raw * 0.999);
  const found = [];
  for (let tick = Math.ceil(low / step); tick * step <= high * (1 + 1e-12) + 1e-12 && found.length < 50; tick += 1) found.push(Number((tick * step).toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) for (const digit of [1, 2, 5]) found.push(digit * 10 ** power);
  const inside = found.filter((tick) => tick >= low && tick <= high);
  return inside.length > 6 ? inside.filter((tick) => Number.isInteger(Math.log10(tick))) : inside;
}

function axes(plot) {
  const bottom = HEIGHT - BOTTOM, right = plot.width - RIGHT;
  const level = (value) => svg("line", { class: "level", x1: LEFT, x2: right, y1: plot.y(value / plot.factor), y2: plot.y(value / plot.factor) });
  return [
    ...plot.ticks.flatMap((tick) => {
      const y = plot.y(tick / plot.factor);
      return [svg("line", { class: "grid", x1: LEFT, x2: right, y1: y, y2: y }), svg("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, compact(tick, plot.ticks))];
    }),
    svg("line", { class: "axis", x1: LEFT, x2: right, y1: bottom, y2: bottom }),
    ...plot.marks.map((mark) => svg("text", { x: plot.x(mark), y: HEIGHT - BOTTOM + 15, "text-anchor": plot.x(mark) > right - 12 ? "end" : "middle" }, compact(mark, plot.marks))),
    svg("text", { class: "y-label", x: 0, y: 12 }, plot.label),
    svg("text", { class: "x-label", x: right, y: HEIGHT - 5, "text-anchor": "end" }, "policy version (updates)"),
    plot.bound === null ? null : level(plot.bound),
    plot.level === null ? null : level(plot.level),
  ];
}

/** In thousands where any value of its axis is long. */
const compact = (value, all) => (value && Math.max(...all.map(Math.abs)) >= 10000 ? `${short(value / 1000)}k` : Number.isInteger(value) ? whole(value) : short(value));
const short = (value) => String(Number(value.toPrecision(4)));

function lines(series, plot) {
  const colour = `var(--${series.colour})`, found = [];
  const painted = (node, what) => { node.style[what] = colour; found.push(node); };
  if (series.low && series.high) painted(svg("path", { class: "band", d: area(series.x, series.low, series.high, plot) }), "fill");
  if (series.to) painted(svg("path", { class: "band", d: area(series.x, series.y, series.to, plot) }), "fill");
  painted(svg("path", { class: series.smooth ? "line pale" : "line", d: path(series.x, series.y, plot) }), "stroke");
  if (series.smooth) painted(svg("path", { class: "line bold", d: path(series.x, series.smooth, plot) }), "stroke");
  if (!series.smooth && series.x.length <= MAX_MARKED)
    series.x.forEach((version, index) => { if (drawable(series.y[index], plot)) painted(svg("circle", { r: 2.2, cx: plot.x(version), cy: plot.y(series.y[index]) }), "fill"); });
  return found;
}

const drawable = (value, plot) => value !== null && value !== undefined && Number.isFinite(plot.y(value));
const spot = (version, value, plot) => `${plot.x(version).toFixed(1)} ${plot.y(value).toFixed(1)}`;

function path(x, y, plot) {
  let text = "", pen = false;
  x.forEach((version, index) => {
    const here = drawable(y[index], plot);
    if (here) text += `${pen ? "L" : "M"}${spot(version, y[index], plot)}`;
    pen = here;
  });
  return text;
}

function area(x, low, high, plot) {
  const known = x.map((_, index) => index).filter((index) => drawable(low[index], plot) && drawable(high[index], plot));
  const there = known.map((index) => spot(x[index], high[index], plot)), back = known.map((index) => spot(x[index], low[index], plot)).reverse();
  return known.length ? `M${[...there, ...back].join("L")}Z` : "";
}

function nearest(versions, wanted) {
  return versions.reduce((best, version) => (Math.abs(version - wanted) < Math.abs(best - wanted) ? version : best), versions[0] ?? null);
}

function cursor(curve, all, plot, at, tip) {
  if (at === null || at < plot.from || at > plot.to) { tip.hidden = true; return []; }
  const x = plot.x(at), found = [svg("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM })];
  const told = [el("div", { class: "muted" }, `version ${whole(at)}`)];
  for (const series of all) {
    const index = series.x.indexOf(at), value = index < 0 ? null : series.y[index];
    if (index < 0) continue;
    const interval = drawable(series.low?.[index], plot) ? ` (${valueText(curve, series.low[index])} to ${valueText(curve, series.high[index])})` : "";
    const mean = drawable(series.smooth?.[index], plot) ? `, running mean ${valueText(curve, series.smooth[index])}` : "";
    told.push(el("div", {}, key(series.colour), el("bdi", {}, series.label), ` ${valueText(curve, value)}${interval}${mean}`));
    if (drawable(value, plot)) {
      const dot = svg("circle", { r: 3.5, cx: x, cy: plot.y(value) });
      dot.style.fill = `var(--${series.colour})`;
      found.push(dot);
    }
  }
  put(tip, ...told);
  tip.hidden = false;
  const room = tip.parentElement.clientWidth, wide = tip.offsetWidth;
  tip.style.left = `${Math.max(4, Math.min(x + 24 + wide > room ? x - wide : x + 24, room - wide - 4))}px`;
  tip.style.top = "58px";
  return found;
}
