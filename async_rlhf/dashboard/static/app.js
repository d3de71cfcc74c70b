// Where the page is (#runs, #run=NAME, #compare=NAME,NAME, or nothing: what there is to follow), and its heartbeat.

import { comparePage } from "./compare.js";
import { curvePanel } from "./curves.js";
import { el, put, said } from "./dom.js";
import { flowPanel } from "./flow.js";
import { crew, headline, losses, tiles } from "./panels.js";
import { MAX_COMPARED, runsPage } from "./runs.js";
import { samplesPanel } from "./samples.js";

const RETRY_MS = 2000, FOLLOW_MS = 3000;
const [main, nav, pulse] = ["main", "nav", "pulse"].map((id) => document.getElementById(id));

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store" });
  if (answer.status === 404) throw new Gone();
  if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
  return answer.json();
}

class Gone extends Error {}

/** The page `#run=NAME`; returns what brings it up to date, and says when to come again. */
function runPage(root, name) {
  const [head, numbers, completions, below] = [el("section", { "aria-label": "Run" }), el("section", { class: "tiles", "aria-label": "Numbers" }), el("section", { "aria-label": "Samples", id: "samples" }), el("div", { class: "pair" })];
  const flow = flowPanel(), curves = curvePanel();
  put(root, head, flow.panel, numbers, curves.panel, el("h2", {}, "Health"), below, completions);
  let drawn = "", sampled = "", samplesAt = 0;
  return async () => {
    const run = await ask(`/api/runs/${name}`);
    document.title = `${run.title} \u00b7 ${run.version}/${run.num_updates} \u00b7 async-rlhf`;
    put(head, ...headline(run));
    flow.show(run);
    put(numbers, ...tiles(run));
    put(below, crew(run), losses(run));
    if (run.stamps.curves !== drawn) {
      curves.show(await ask(`/api/runs/${name}/curves`));
      drawn = run.stamps.curves;
    }
    const stamp = `${run.stamps.samples}/${run.version}`, reading = completions.contains(document.activeElement) || completions.querySelector("details[open]");
    if (stamp !== sampled && Date.now() > samplesAt && !reading) {
      put(completions, ...samplesPanel(await ask(`/api/runs/${name}/samples`)));
      [sampled, samplesAt] = [stamp, Date.now() + 3000]; // a text needs a moment to be read
    }
    return run.live ? 1000 : 2500;
  };
}

/** Where to go when the address names nothing, and whether to go on to the newest living run whenever there is another one. */
async function home() {
  const { follows, runs } = await ask("/api/runs");
  if (!follows) return [runs.length > 1 ? `compare=${runs.slice(0, MAX_COMPARED).map((run) => run.name).join(",")}` : `run=${runs[0].name}`, false];
  const live = runs.find((run) => run.live);
  return live ? [`run=${live.name}`, true] : ["runs", false];
}

async function navigation(place) {
  const { follows, runs } = await ask("/api/runs"), link = (href, text) => el("a", { href, "aria-current": href === `#${place}` ? "page" : null }, text);
  const opened = place.startsWith("run=") ? runs.filter((run) => `run=${run.name}` === place) : [], shown = follows ? opened : runs.slice(0, MAX_COMPARED);
  const all = `compare=${runs.slice(0, MAX_COMPARED).map((run) => run.name).join(",")}`;
  put(nav, link("#runs", "Runs"), ...shown.map((run) => link(`#run=${run.name}`, said(run.title))), !follows && runs.length > 1 ? link(`#${all}`, "Compare") : null);
}

let turn = 0;

/** Shows what the address names until it names something else. */
async function go() {
  const mine = (turn += 1), asked = location.hash.slice(1), alive = () => mine === turn;
  let place = asked, step = null, followed = 0, following = "";
  while (alive()) {
    try {
      if (!asked && Date.now() > followed) {
        const [now, follows] = await home();
        followed = Date.now() + FOLLOW_MS;
        following = follows ? "following \u00b7 " : "";
        // A run that ended stays on the screen until another one begins.
        if (step === null || (now !== place && now !== "runs")) [place, step] = [now, null];
      }
      if (!alive()) return;
      if (step === null) {
        await navigation(place);
        document.title = "async-rlhf";
        const [kind, names] = place.split("=");
        step = kind === "run" ? runPage(main, names) : kind === "compare" ? comparePage(main, ask, names.split(",")) : runsPage(main, ask);
      }
      const wait = await step();
      if (!alive()) return;
      pulse.className = "pulse";
      pulse.textContent = `${following}updated ${new Date().toLocaleTimeString("sv-SE")}`;
      await new Promise((resume) => setTimeout(resume, wait));
    } catch (error) {
      if (!alive()) return;
      pulse.className = "pulse bad";
      pulse.textContent = error instanceof Gone ? "there is no such run any more" : "no answer: is async-rlhf dashboard still running?";
      await new Promise((resume) => setTimeout(resume, RETRY_MS));
    }
  }
}

addEventListener("hashchange", go);
go();
