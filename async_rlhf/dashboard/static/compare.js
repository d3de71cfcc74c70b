// Several runs over each other: results, settings that differ, curves.

import { gallery, seriesOf } from "./curves.js";
import { el, put, said, table } from "./dom.js";
import { ABSENT, num, seconds, share, whole } from "./format.js";
import { badge } from "./panels.js";

const RESULTS = [
  ["held-out score", (of) => score(of.evaluation.points.at(-1))], ["at the start", (of) => score(of.evaluation.points.length > 1 ? of.evaluation.points[0] : undefined)],
  ["reward, running mean", (of) => num(of.reward)], ["KL to the start, nats per completion", (of) => num(of.kl)], ["largest staleness, updates", (of) => num(of.staleness_max)],
  ["updates", (of) => whole(of.updates)], ["training time", (of) => seconds(of.train_s)], ["generator tokens/s, mean", (of) => num(of.generator_tokens_per_s)],
  ["learner tokens/s of train_step, mean", (of) => num(of.learner_tokens_per_s)], ["generators idle", (of) => share(of.generator_idle)], ["learner idle", (of) => share(of.learner_idle)],
  ["restarts", (of) => whole(of.restarts)], ["end", (of) => said(of.exit)],
];

const score = (point) => (point ? `${num(point.score)} (${num(point.low)} to ${num(point.high)})` : ABSENT);

function headOf(run, index) {
  const key = el("i", { class: "key" });
  key.style.color = `var(--c${index})`;
  return el("span", {}, key, el("a", { href: `#run=${run.name}` }, said(run.title)), " ", badge(run));
}

/** The page `#compare=NAME,NAME`. */
export function comparePage(root, ask, names) {
  const results = el("div", { class: "card", id: "results" }), settings = el("div", { class: "card", id: "settings" }), grid = el("div", { class: "curves" }), evaluated = el("div", { class: "curves" });
  put(root, el("h1", {}, "Runs compared"), el("h2", {}, "Results"), results, el("h2", {}, "Settings that differ"), settings, el("h2", {}, "Curves"), grid, evaluated);
  const [show, showEvaluated] = [grid, evaluated].map(gallery);
  let before = "";
  return async () => {
    const view = await ask(`/api/compare?runs=${names.map(encodeURIComponent).join(",")}`), now = JSON.stringify(view, (key, value) => (key === "seen_s_ago" ? undefined : value));
    if (now !== before) {
      before = now;
      const { runs } = view, heads = ["", ...runs.map(headOf)];
      put(results, table(heads, RESULTS.map(([label, cell]) => el("tr", {}, el("th", { scope: "row" }, label), ...runs.map((run) => el("td", {}, cell(run.results)))))));
      const changed = Object.entries(view.settings).map(([key, of]) => el("tr", {}, el("th", { scope: "row" }, said(key, "mono")), ...runs.map((run) => el("td", {}, said(of[run.name] ?? ABSENT)))));
      put(settings, changed.length ? table(heads.map((_, index) => (index ? headOf(runs[index - 1], index - 1) : "")), changed) : el("p", { class: "note" }, "None: they are the same but for name and place."));
      const of = (part) => (figure, curve) => figure.draw(runs.flatMap((run, index) => {
        const columns = part.columns[run.name];
        return columns[curve.lines[0].key] ? seriesOf(curve, columns, () => `c${index}`).map((series) => ({ ...series, label: run.title })) : [];
      }));
      show(view.training.curves.map((curve) => titled(curve)), of(view.training));
      showEvaluated(view.evaluations.curves.map((curve) => titled(curve)), of(view.evaluations));
    }
    return view.runs.some((run) => run.live) ? 2000 : 5000;
  };
}

/** Of each curve only the first line is compared: its label says which. */
const titled = (curve) => ({ ...curve, title: `${curve.title}: ${curve.lines[0].label}` });
