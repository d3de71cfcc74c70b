// The way through the house: who hands what to whom, how fast, and who idles.

import { el, put, svg } from "./dom.js";
import { ABSENT, num, rate, seconds, share, whole } from "./format.js";

const WIDE = { width: 1220, height: 288 }, NARROW = { width: 340, height: 896 };
// Boxes as [x, y, width, height]; arrows as [path, [x, y, degrees] of the head, [x, y, anchor] of the label].
const PLACES = {
  wide: {
    prompts: [0, 30, 128, 128], generators: [226, 30, 190, 128], scorers: [514, 30, 150, 128], queue: [742, 30, 220, 128], learner: [1044, 30, 176, 128],
    broadcaster: [514, 222, 448, 60],
    tickets: ["M128 93H216", [216, 93, 0], [173, 80, "middle"]],
    sampled: ["M416 93H504", [504, 93, 0], [461, 80, "middle"]],
    scored: ["M664 93H732", [732, 93, 0], [699, 80, "middle"]],
    batches: ["M962 93H1034", [1034, 93, 0], [999, 80, "middle"]],
    trained: ["M1132 158V252H972", [972, 252, 180], [1120, 208, "end"]],
    installed: ["M514 252H321V168", [321, 168, 270], [333, 208, "start"]],
  },
  narrow: {
    prompts: [60, 8, 260, 72], generators: [60, 138, 260, 112], scorers: [60, 308, 260, 112], queue: [60, 478, 260, 124], learner: [60, 660, 260, 112],
    broadcaster: [60, 830, 260, 60],
    tickets: ["M190 80V128", [190, 128, 90], [202, 112, "start"]],
    sampled: ["M190 250V298", [190, 298, 90], [202, 274, "start"]],
    scored: ["M190 420V468", [190, 468, 90], [202, 452, "start"]],
    batches: ["M190 602V650", [190, 650, 90], [202, 626, "start"]],
    trained: ["M190 772V820", [190, 820, 90], [202, 796, "start"]],
    installed: ["M60 860H24V194H50", [50, 194, 0], [34, 626, "start"]],
  },
};

/** The panel; `show(run)` draws a run as the server tells it. */
export function flowPanel() {
  const panel = el("section", { class: "card flow", "aria-label": "Flow" });
  let last = null;
  const draw = () => { if (last && panel.clientWidth) put(panel, picture(last, panel.clientWidth < 860), caption(last)); };
  new ResizeObserver(draw).observe(panel);
  return { panel, show(run) { last = run; draw(); } };
}

function picture(run, narrow) {
  const { flow, live } = run, { means, queue } = flow, size = narrow ? NARROW : WIDE, at = PLACES[narrow ? "narrow" : "wide"];
  const busy = (key) => (means[key] === null || means[key] === undefined ? null : means[key]);
  const box = (name, title, lines, idle = undefined) => boxOf(at[name], title, lines, idle, run.bottleneck === name);
  const arrow = (name, ...labels) => arrowOf(at[name], labels, live);
  const stages = [
    box("prompts", "Prompts", [`${whole(run.numbers.prompts)} trained`]),
    box("generators", many("Generator", flow.generators, flow.engine), engineLines(means), busy("generate/idle_share")),
    box("scorers", many("Scorer", flow.scorers), [`${seconds(busy("score/latency_s"))} per call`, flow.rewards ? `${flow.rewards} reward actors` : "reward, reference"], busy("score/idle_share")),
    queueBox(at.queue, queue, run),
    box("learner", many("Learner", flow.ranks, flow.ranks > 1 ? "ranks" : ""), [`${seconds(busy("train/step_s"))} per update`, `waits ${seconds(busy("queue/wait_s"))} for a batch`], busy("train/idle_share")),
    box("broadcaster", "Weight broadcaster", [`version ${whole(flow.weights_version)}, ${seconds(busy("weights/transfer_s"))} per transfer`]),
  ];
  const arrows = [
    arrow("tickets", rate(flow.tickets_per_s, "tickets")),
    arrow("sampled", rate(busy("generate/tokens_per_s"), "tokens"), flow.sampled_per_s === null ? null : rate(flow.sampled_per_s, "groups")),
    arrow("scored", rate(flow.scored_per_s, "groups")),
    arrow("batches", rate(flow.updates_per_s, "batches"), rate(flow.batch_groups_per_s, "groups")),
    arrow("trained", rate(flow.updates_per_s, "versions"), [seconds(busy("weights/export_s")), "export"]),
    arrow("installed", [`v${whole(flow.weights_version)}`, "weights"], [seconds(busy("weights/install_s")), "install"]),
  ];
  return svg("svg", { viewBox: `0 0 ${size.width} ${size.height}`, role: "img", "aria-label": aloud(run) }, ...arrows, ...stages);
}

const many = (name, count, more = "") => `${name}${count > 1 ? `s ${count}\u00d7` : ""}${more ? ` \u00b7 ${more}` : ""}`;

function engineLines(means) {
  const running = means["generate/running_requests"], waiting = means["generate/waiting_requests"], cache = means["generate/kv_use_share"];
  if (running === null || running === undefined) return [`${num(means["generate/tokens_per_s"] ?? null)} tokens/s`];
  return [`${whole(running)} running, ${whole(waiting)} waiting`, `KV cache ${share(cache)}`];
}

function boxOf([x, y, width, height], title, lines, idle, bottleneck) {
  const found = [svg("rect", { class: `box${bottleneck ? " bottleneck" : ""}`, x, y, width, height, rx: 10 })];
  if (typeof idle === "number") found.push(svg("rect", { class: "tint", x, y, width, height, rx: 10, opacity: (0.32 * idle).toFixed(3) }));
  found.push(svg("text", { class: "title", x: x + 12, y: y + 24 }, title));
  lines.filter((line) => line !== null).forEach((line, index) => found.push(svg("text", { class: "dim", x: x + 12, y: y + 45 + 18 * index }, line)));
  if (idle !== undefined) found.push(...idleBar(x + 12, y + height - 24, width - 24, idle));
  if (bottleneck) found.push(svg("text", { class: "tag", x: x + 2, y: y - 8 }, "\u25b2 bottleneck"));
  return svg("g", {}, ...found);
}

function idleBar(x, y, width, idle) {
  const track = svg("rect", { class: "track", x, y: y + 6, width, height: 6, rx: 3 });
  if (idle === null) return [track, svg("text", { class: "dim", x, y }, `idle ${ABSENT}`)];
  return [track, svg("rect", { class: "busy", x, y: y + 6, width: width * (1 - idle), height: 6, rx: 3 }), svg("text", { x, y }, `idle ${share(idle)}`)];
}

function queueBox([x, y, width, height], queue, run) {
  const inner = width - 24, parts = ["leased", "scoring", "waiting"];
  const live = parts.reduce((sum, place) => sum + queue[place], 0), bound = queue.bound ?? Math.max(live, 1);
  const found = [], bar = y + 34;
  let from = x + 12;
  for (const place of parts) {
    const wide = Math.min(inner, (inner * queue[place]) / Math.max(bound, live, 1));
    found.push(svg("rect", { class: place, x: from, y: bar, width: wide, height: 16 }));
    from += wide;
  }
  parts.forEach((place, index) => {
    const left = x + 12 + (inner / 3) * index;
    found.push(svg("rect", { class: place, x: left, y: y + 62, width: 8, height: 8, rx: 2 }), svg("text", { class: "dim", x: left + 12, y: y + 70 }, place), svg("text", { class: "strong", x: left, y: y + 88 }, queue.known ? whole(queue[place]) : ABSENT));
  });
  const mean = run.flow.means["queue/staleness_mean"] ?? null;
  return svg("g", {},
    svg("rect", { class: "box", x, y, width, height, rx: 10 }), svg("text", { class: "title", x: x + 12, y: y + 24 }, "Replay queue"),
    svg("text", { class: "dim", x: x + width - 12, y: y + 24, "text-anchor": "end" }, queue.known ? `${whole(live)} of ${whole(queue.bound)}` : ""),
    svg("rect", { class: "track", x: x + 12, y: bar, width: inner, height: 16, rx: 3 }), ...found,
    svg("text", { class: "dim", x: x + 12, y: y + height - 14 }, `staleness ${num(mean)}, bound ${num(run.max_staleness)}`));
}

function arrowOf([path, [headX, headY, degrees], [x, y, anchor]], labels, live) {
  const known = labels.filter((label) => label !== null), moving = live && known[0][0] !== ABSENT && known[0][0] !== "0";
  const told = known.flatMap(([value, unit], index) => {
    if (anchor !== "middle") return [svg("text", { x, y: y + 17 * index, "text-anchor": anchor }, svg("tspan", { class: "strong" }, value), svg("tspan", { class: "dim" }, ` ${unit}`))];
    const top = index === 0 ? y - 13 : y + 33;
    return [svg("text", { class: "strong", x, y: top, "text-anchor": "middle" }, value), svg("text", { class: "dim", x, y: top + 15, "text-anchor": "middle" }, unit)];
  });
  const head = svg("path", { class: "head", d: "M-2 -5L8 0L-2 5Z", transform: `translate(${headX} ${headY}) rotate(${degrees})` });
  return svg("g", {}, svg("path", { class: `arrow${moving ? " moving" : ""}`, d: path }), head, ...told);
}

function caption({ flow, live }) {
  const window = flow.updates ? `Rates are means over the last ${flow.updates} updates (${seconds(flow.window_s)}).` : "Rates come with the first updates.";
  return el("p", { class: "note" }, `${live ? window : flow.updates ? window.replace("the last", "its last") : ""} The warmer a box, the more it idles.`);
}

/** The picture for those who cannot see it. */
function aloud({ flow, max_staleness: bound }) {
  const { means, queue } = flow, idle = (key) => share(means[key] ?? null);
  return `Prompts go to generators (idle ${idle("generate/idle_share")}, ${num(means["generate/tokens_per_s"] ?? null)} tokens per second), to scorers, `
    + `to the replay queue (${queue.leased} groups leased, ${queue.scoring} with scorers, ${queue.waiting} waiting, at most ${queue.bound ?? "unknown"}; staleness bound ${num(bound)}), `
    + `to the learner (idle ${idle("train/idle_share")}), whose weights the broadcaster takes back to the generators.`;
}
