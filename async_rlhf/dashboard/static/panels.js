// The other parts of a run's page: what it is, what it came to, who plays, what went wrong.

import { el, row, said, table } from "./dom.js";
import { ABSENT, ago, clock, num, seconds, whole } from "./format.js";

const COLOURS = { finished: "good", failed: "bad", silent: "bad", interrupted: "warn" };

/** Phase as a badge. */
export function badge(run) {
  return el("span", { class: `badge ${run.live ? "good live" : COLOURS[run.phase] ?? "warn"}` }, run.phase);
}

/** Name, phase, progress, verdict and error. */
export function headline(run) {
  const bar = el("i", { class: run.phase === "finished" ? "done" : "" });
  bar.style.width = `${run.num_updates ? Math.min(100, (100 * run.version) / run.num_updates) : 0}%`;
  const facts = [
    run.algorithm, `update ${whole(run.version)} of ${whole(run.num_updates)}`, !run.version || run.elapsed_s === null ? null : `${seconds(run.elapsed_s)} of training`,
    run.eta_s === null ? null : `${seconds(run.eta_s)} to go`, run.live ? null : `last sign of life ${ago(run.seen_s_ago)}`,
  ].filter(Boolean);
  const verdict = run.verdict || (run.live ? "The verdict comes with the first updates." : "");
  return [
    el("div", { class: "headline" }, el("h1", {}, said(run.title)), badge(run), el("span", { class: "muted", id: "facts" }, facts.join(" \u00b7 "))),
    el("div", { class: "progress", role: "progressbar", "aria-label": "updates", "aria-valuemin": 0, "aria-valuemax": run.num_updates, "aria-valuenow": run.version }, bar),
    verdict ? el("p", { class: `verdict ${run.verdict ? "" : "waiting"}`, id: "verdict" }, said(verdict)) : null,
    run.phase === "silent" ? el("p", { class: "error" }, `Its driver gives no sign of life: it was killed or is frozen, or its folder no longer changes here. async-rlhf resume goes on with it.`) : null,
    run.error ? el("p", { class: "error" }, said(run.error)) : null,
  ];
}

/** The numbers that matter, as tiles. */
export function tiles(run) {
  const { numbers, evaluation } = run, [first, last] = [evaluation.points[0], evaluation.points.at(-1)];
  const tile = (label, value, more, colour = "", size = "") => el("div", { class: `card tile ${size}` }, el("span", { class: "label" }, label), el("b", { class: colour }, value), el("span", { class: "more" }, more || "\u00a0"));
  const moved = first && last && last !== first, interval = last && last.low !== null ? `95 %: ${num(last.low)} to ${num(last.high)}` : "";
  const over = run.max_staleness !== null && numbers.staleness_max > run.max_staleness;
  return [
    last ? tile(`held-out ${evaluation.metric}`, moved ? `${num(first.score)} \u2192 ${num(last.score)}` : num(last.score), `${interval}${moved ? `, version ${whole(last.version)}` : ""}`, "", moved ? "wide" : "") : null,
    tile("batch reward", num(numbers.reward_mean), `best ${num(numbers.best_reward_mean)}`),
    tile("KL to the start", num(run.row["rollout/kl_k1_nats"]), "nats per completion"),
    tile("largest staleness", whole(numbers.staleness_max), `bound ${num(run.max_staleness)}`, over ? "bad" : ""),
    tile("prompts trained", whole(numbers.prompts), `${whole(numbers.tokens)} tokens`),
    tile("newest checkpoint", numbers.checkpoint === null ? "none" : whole(numbers.checkpoint), numbers.session ? `resumed ${whole(numbers.session)}\u00d7` : "never resumed"),
  ];
}

/** Who plays, and what happened to them. */
export function crew(run) {
  const rows = run.actors.map((actor) =>
    el("tr", {}, el("td", {}, el("i", { class: `dot ${actor.health}`, title: actor.health }), said(actor.name)), el("td", { class: actor.health === "down" ? "bad" : "muted" }, actor.health), el("td", {}, said(actor.does || ABSENT)),
      el("td", { class: actor.restarts ? "warn" : "muted" }, whole(actor.restarts))));
  const events = run.incidents.map((event) =>
    el("tr", {}, el("td", { class: "muted" }, clock(event.time)), el("td", {}, said(event.name)),
      el("td", {}, event.event === "lost" ? el("span", {}, el("span", { class: "bad" }, "lost: "), said(event.cause)) : el("span", { class: "good" }, event.event === "back" ? `back after ${seconds(event.after_s)}` : event.event))));
  return el("div", { class: "card", id: "crew" }, el("h3", {}, "Actors"), table(["part", "health", "last did", "restarts"], rows),
    events.length ? el("div", {}, el("h3", {}, "Incidents, newest first"), table(["when", "who", "what"], events)) : el("p", { class: "note" }, "No incidents."));
}

/** What was left out, and why. */
export function losses(run) {
  const counts = (found) => Object.entries(found).map(([reason, count]) => row(said(reason), whole(count)));
  const dropped = counts(run.drops), skipped = counts(run.skipped_rows);
  return el("div", { class: "card", id: "drops" }, el("h3", {}, "Dropped groups"), dropped.length ? table(["reason", "groups"], dropped) : el("p", { class: "note" }, run.drops_known ? "None." : "Counted when the run ends."),
    skipped.length ? el("div", {}, el("h3", {}, "Skipped rows"), table(["reason", "rows"], skipped)) : null,
    run.failed_prompts ? el("p", { class: "warn" }, `${whole(run.failed_prompts)} prompts could not be scored.`) : null);
}

