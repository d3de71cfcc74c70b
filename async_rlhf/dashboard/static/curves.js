// The grid of curves: figures are made once per curve, and get new points as they come.

import { chart } from "./chart.js";
import { el, put } from "./dom.js";

const SMOOTHED = ":smoothed";
export const FIRST = ["reward", "kl", "staleness", "throughput", "idle", "depth"];

/** Figures by name in `grid`, in the order of `curves`. */
export function gallery(grid) {
  const figures = new Map();
  return (curves, draw) => {
    for (const curve of curves) {
      const id = JSON.stringify([curve.name, curve.lines.map((line) => line.key), curve.title]);
      if (!figures.has(id)) figures.set(id, chart(curve));
      draw(figures.get(id), curve);
    }
    const wanted = curves.map((curve) => figures.get(JSON.stringify([curve.name, curve.lines.map((line) => line.key), curve.title])).figure);
    if (wanted.length !== grid.children.length || wanted.some((figure, index) => grid.children[index] !== figure)) put(grid, ...wanted);
  };
}

/** The points of a curve's lines. */
export function seriesOf(curve, columns, colourOf = (line) => line.colour) {
  const made = curve.lines.map((line) => ({
    label: line.label,
    colour: colourOf(line),
    x: columns.version ?? [],
    y: columns[line.key] ?? [],
    low: line.banded ? columns[`${line.key}_low`] : undefined,
    high: line.banded ? columns[`${line.key}_high`] : undefined,
    smooth: curve.smoothed ? columns[line.key + SMOOTHED] : undefined,
  }));
  if (curve.bounded && made.length > 1) made[1].to = made[0].y; // from the mean up to the maximum
  return made;
}

/** The curves of one run: the first ones, the evaluations, and the others behind a fold. */
export function curvePanel() {
  const [first, evaluated, more] = [0, 1, 2].map(() => el("div", { class: "curves" }));
  const note = el("p", { class: "note" }), fold = el("details", { id: "more-curves" }, el("summary", {}, "More curves"), more);
  const heading = el("h2", {}, "Evaluations on held-out prompts");
  const panel = el("section", { "aria-label": "Curves" }, el("h2", {}, "Curves"), first, note, heading, evaluated, fold);
  const [showFirst, showEvaluated, showMore] = [first, evaluated, more].map(gallery);
  return {
    panel,
    show(view) {
      const of = (part) => (figure, curve) => figure.draw(seriesOf(curve, view[part].columns), curve.bounded ? view.bound : null);
      const { curves } = view.training;
      showFirst(FIRST.flatMap((name) => curves.filter((curve) => curve.name === name)), of("training"));
      showMore(curves.filter((curve) => !FIRST.includes(curve.name)), of("training"));
      showEvaluated(view.evaluations.curves, of("evaluations"));
      heading.hidden = view.evaluations.curves.length === 0;
      fold.hidden = curves.length <= FIRST.length;
      note.textContent = view.rows ? `Over the policy version. Pale: each update; bold: the mean over ${view.window} updates.` : "No updates yet.";
    },
  };
}
