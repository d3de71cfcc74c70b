// Completions: of the held-out prompts before and now, and the newest that were sampled for training.

import { el, said, table } from "./dom.js";
import { num, whole } from "./format.js";

const FOLD = 240;

/** A text, its rest behind a fold when it is long. */
function folded(text) {
  if (text.length <= FOLD) return text ? said(text) : el("span", { class: "muted" }, "(empty)");
  return el("details", {}, el("summary", {}, said(`${text.slice(0, 120)} \u2026`)), said(text));
}

function answer(sample) {
  if (!sample) return "";
  const exact = sample.score === 0 || sample.score === 1, right = sample.score === 1;
  const mark = exact ? el("span", { class: `mark ${right ? "good" : "bad"}` }, right ? "\u2713 right" : "\u2717 wrong") : el("span", { class: "mark" }, num(sample.score));
  return el("div", {}, mark, sample.reward === null ? null : el("span", { class: "mark" }, `reward ${num(sample.reward)}`), folded(sample.text));
}

function heldOut(found) {
  const two = found.after !== null, expects = found.rows.some((sample) => sample.expected);
  const rows = found.rows.map((sample) => el("tr", {}, two ? el("td", { class: found.colours[sample.kind] ?? "" }, sample.kind) : null, el("td", {}, folded(sample.prompt)),
    expects ? el("td", {}, folded(sample.expected)) : null, el("td", {}, answer(sample.before)), two ? el("td", {}, answer(sample.after)) : null));
  const heads = [two ? "" : null, "prompt", expects ? "reference" : null, found.before, two ? found.after : null].filter((head) => head !== null);
  const counts = Object.entries(found.counts).map(([kind, count]) => `${whole(count)} ${kind}`).join(", ");
  return el("div", { class: "card" }, el("p", { class: "note" }, `${whole(found.rows.length)} shown (${counts}).`), table(heads, rows, "samples"));
}

function group(found) {
  const parts = (each) => Object.entries(each.parts).map(([name, value]) => `${name} ${num(value)}`).join(", ");
  return el("div", { class: "card group" }, el("p", { class: "asked mono" }, folded(found.prompt)),
    ...found.completions.map((each) => el("p", { class: "mono" }, el("span", { class: "mark", title: parts(each) }, num(each.score)), each.cut ? el("span", { class: "mark" }, "cut") : null, folded(each.text))),
    el("p", { class: "note" }, `sampled by version ${whole(found.version)}`));
}

/** Everything that the server sent. */
export function samplesPanel(view) {
  return [
    view.sampled.length ? el("div", {}, el("h2", {}, "Newest samples, with their rewards"), el("div", { class: "groups" }, ...view.sampled.map(group))) : null,
    view.held_out ? el("div", {}, el("h2", {}, "Held-out prompts, before and now"), heldOut(view.held_out)) : null,
    !view.sampled.length && !view.held_out ? el("p", { class: "note" }, "No completions yet.") : null,
  ];
}
