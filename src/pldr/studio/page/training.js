// Training: a run's loss, and what it measured of the operator, while it trains.
import { ask, latest } from "./api.js";
import { $, make, short } from "./dom.js";
import { figure, lines } from "./figures.js";
import { model, onChange, set, state } from "./state.js";

const EVERY = 2000; // milliseconds
const MOST_CURVES = 12;
const figures = new Map();
let timer;

const NAMES = { loss: "Loss in training, nats per token", eval_loss: "Loss on held-out text, nats per token" };

const follow = latest(async (signal) => {
  clearTimeout(timer);
  if (state.screen !== "training" || !state.run) return;
  const said = await ask(`training?run=${encodeURIComponent(state.run)}`, undefined, signal);
  draw(said);
  if (!said.ended) timer = setTimeout(follow, EVERY);
});

function draw({ steps, evaluations, recipe, ended }) {
  const last = steps.at(-1);
  $("training-status").textContent = last ? `Step ${last.step}, loss ${short(last.loss, 4)}${ended ? "; ended" : "; running"}.` : "No step yet.";
  $("recipe").textContent = JSON.stringify(recipe, null, 2);
  curve("loss", steps);
  const measured = new Set(evaluations.flatMap((row) => Object.keys(row).filter((name) => name !== "step" && typeof row[name] === "number")));
  [...measured].slice(0, MOST_CURVES).forEach((name) => curve(name, evaluations));
}

function curve(name, rows) {
  const title = NAMES[name] ?? name.replaceAll("_", " ");
  if (!figures.has(name)) {
    figures.set(name, figure(title));
    $("curves").append(figures.get(name).element);
  }
  const points = rows.filter((row) => typeof row[name] === "number").map((row) => [row.step, row[name]]);
  const values = points.map((point) => point[1]), log = Math.min(...values) > 0 && Math.max(...values) > 20 * Math.min(...values);
  figures.get(name).show(lines([{ name: title, points }], { title, x: "step", y: "", log }));
}

export function start() {
  $("runs").replaceChildren(...model.runs.map((run) => make("option", { value: run }, run)));
  if (!model.runs.length) $("training-status").textContent = "No run folder was given: start the studio with --run FOLDER.";
  if (!model.runs.includes(state.run)) set({ run: model.runs[0] ?? "" });
  $("runs").value = state.run;
  onChange((names) => {
    if (names.has("run")) figures.clear(), $("curves").replaceChildren();
    if (names.has("run") || names.has("screen")) follow();
  });
  follow();
}
