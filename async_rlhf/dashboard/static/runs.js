// The list of runs: newest first, some to be compared.

import { el, put, said, table } from "./dom.js";
import { clock, num, whole } from "./format.js";
import { badge } from "./panels.js";

export const MAX_COMPARED = 8;

/** The page `#runs`. */
export function runsPage(root, ask) {
  const chosen = new Set(), compare = el("button", { type: "button", disabled: true, on: { click: () => { location.hash = `#compare=${[...chosen].join(",")}`; } } }, "Compare");
  const list = el("div", { class: "card" });
  put(root, el("h2", {}, "Runs"), list, el("p", {}, compare, " ", el("span", { class: "note" }, `Choose two to ${MAX_COMPARED} to see their curves over each other.`)));
  const line = (run) => {
    const box = el("input", { type: "checkbox", "aria-label": `compare ${run.title}`, on: { change: () => { chosen[box.checked ? "add" : "delete"](run.name); ready(); } } });
    box.checked = chosen.has(run.name);
    return el("tr", {}, el("td", {}, box), el("td", {}, el("a", { href: `#run=${run.name}` }, said(run.title))), el("td", {}, badge(run)), el("td", {}, said(run.algorithm)),
      el("td", {}, `${whole(run.version)} of ${whole(run.num_updates)}`), el("td", {}, num(run.reward_mean)), el("td", { class: "muted" }, clock(run.started_at)));
  };
  const ready = () => { compare.disabled = chosen.size < 2 || chosen.size > MAX_COMPARED; };
  let before = "";
  return async () => {
    const { runs } = await ask("/api/runs"), now = JSON.stringify(runs.map(({ seen_s_ago: _, ...rest }) => rest));
    if (now !== before && !list.contains(document.activeElement)) {
      before = now;
      put(list, runs.length ? table(["", "run", "phase", "algorithm", "updates", "reward", "begun"], runs.map(line)) : el("p", {}, "No runs under ./runs yet. async-rlhf train conf/quickstart.yaml makes one; it appears here by itself."));
    }
    return 1500;
  };
}
