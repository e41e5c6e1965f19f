// Training: a run's loss, and what it measured of the operator, while it trains.
import { ask, floats, latest } from "./api.js";
import { $, make, short } from "./dom.js";
import { figure, lines, scaleOf, tiles } from "./figures.js";
import { model, onChange, set, state } from "./state.js";

const EVERY = 2000; // milliseconds
const MOST_CURVES = 12;
const figures = new Map();
const operators = new Map(); // step to G of every head
let kept = []; // steps
let picture = null;
let timer;

// Title, and what it is.
const QUANTITIES = {
  loss: ["Loss in training, nats per token", "How badly the text is foretold that the model learns from."],
  eval_loss: ["Loss on held-out text, nats per token", "The same for text that it does not learn from: where this rises while the other falls, it learns by heart."],
  eval_accuracy: ["Accuracy on held-out text", "How often the most probable token is the right one."],
  G_variation: ["Variation of G over texts", "How far G of one text is from that of others, in parts of its size: near 0, one G serves for all."],
  G_frozen_difference: ["Loss with G frozen, minus learned", "What it costs to keep one G for all texts, nats per token."],
  G_rank: ["Rank of G", "How many singular values exceed a hundredth of the largest."],
  G_log10_determinant: ["log₁₀ |det G|", "The size of G's determinant, in powers of ten; very negative where G is nearly singular."],
  row_gain: ["Growth of a small change through the network", "How much of a random change of the network's input arrives in its output: below 1, differences between texts fade."],
  row_norm: ["Largest growth through the network", "The same for the change that grows most."],
  dag_A_LM: ["DAG loss of A_LM", "How far A_LM is from a graph without cycles, which has 0."],
  dag_A_P: ["DAG loss of A_P", "How far A_P is from a graph without cycles, which has 0."],
  dag_G_LM: ["DAG loss of G_LM", "How far G_LM is from a graph without cycles, which has 0."],
};

const follow = latest(async (signal) => {
  clearTimeout(timer);
  if (state.screen !== "training" || !state.run) return;
  const said = await ask(`training?run=${encodeURIComponent(state.run)}`, undefined, signal);
  draw(said);
  await evaluated(signal);
  if (!said.ended) timer = setTimeout(follow, EVERY);
});

const operator = async (step, signal) => {
  if (!operators.has(step)) {
    const said = await ask(`training/operator?run=${encodeURIComponent(state.run)}&step=${step}`, undefined, signal);
    operators.set(step, { ...said, values: floats(said.values) });
  }
  return operators.get(step);
};

/** The operator at the evaluation that the slider stands at, on the scale of the last one. */
async function evaluated(signal) {
  $("evaluations").hidden = !kept.length;
  if (!kept.length) return;
  const place = state.step ? kept.findIndex((step) => step >= state.step) : -1, at = place < 0 ? kept.length - 1 : place, step = kept[at];
  Object.assign($("evaluation"), { max: kept.length - 1, value: at });
  $("evaluation-output").textContent = `step ${step}, ${at + 1} of ${kept.length}`;
  const last = await operator(kept.at(-1), signal), now = await operator(step, signal);
  const { layers, heads, size, values, rank, log10_determinant: determinant } = now;
  picture.show(tiles(values, layers, heads, size, scaleOf(last.values), `G_LM of all layers and heads at step ${step}`, {
    own: state.scale === "own",
    labels: (row, column) => `layer ${row}, head ${column}: rank ${short(rank[row][column])}, log₁₀ |det| ${short(determinant[row][column])}`,
  }), `G_LM of a held-out text at step ${step}: a row for each layer, a column for each head, ${state.scale === "own" ? "each on a scale of its own" : "all on the scale of the last evaluation"}.`);
}

const redraw = latest(evaluated);

function draw({ steps, evaluations, operators: found, recipe, ended }) {
  kept = found;
  const last = steps.at(-1);
  $("training-status").textContent = last ? `Step ${last.step}, loss ${short(last.loss, 4)}${ended ? "; ended" : "; running"}.` : "No step yet.";
  $("recipe").textContent = JSON.stringify(recipe, null, 2);
  curve("loss", steps);
  const measured = new Set(evaluations.flatMap((row) => Object.keys(row).filter((name) => name !== "step")));
  [...measured].slice(0, MOST_CURVES).forEach((name) => curve(name, evaluations));
}

/** One line, or one for each layer. */
function curve(name, rows) {
  const [title, sentence] = QUANTITIES[name] ?? [name.replaceAll("_", " "), ""];
  if (!figures.has(name)) {
    figures.set(name, figure(title));
    $("curves").append(figures.get(name).element);
  }
  const there = rows.filter((row) => typeof row[name] === "number" || Array.isArray(row[name]));
  const layers = Math.max(1, ...there.map((row) => [row[name]].flat().length));
  const series = [...Array(layers).keys()].map((layer) => ({
    name: layers > 1 ? `layer ${layer}` : title,
    points: there.map((row) => [row.step, [row[name]].flat()[layer]]).filter(([, value]) => typeof value === "number"),
  }));
  const values = series.flatMap(({ points }) => points.map((point) => point[1]));
  const log = Math.min(...values) > 0 && Math.max(...values) > 20 * Math.min(...values);
  figures.get(name).show(lines(series, { title, x: "step", y: "", log, keys: layers > 1 }), `${sentence}${layers > 1 ? " A line for each layer, from blue (the first) to orange (the last)." : ""}`);
}

export function start() {
  $("runs").replaceChildren(...model.runs.map((run) => make("option", { value: run }, run)));
  if (!model.runs.length) $("training-status").textContent = "No run folder was given: start the studio with --run FOLDER.";
  for (const place of ["run-field", "recipe-field"]) $(place).hidden = !model.runs.length;
  if (!model.runs.includes(state.run)) set({ run: model.runs[0] ?? "" });
  $("runs").value = state.run;
  picture = figure("The operator at an evaluation");
  $("evaluated").append(picture.element);
  $("evaluation").addEventListener("input", () => {
    const at = Number($("evaluation").value);
    set({ step: at === kept.length - 1 ? 0 : kept[at] });
  });
  onChange((names) => {
    if (names.has("run")) {
      kept = [];
      figures.clear();
      operators.clear();
      $("curves").replaceChildren();
    }
    if (names.has("run") || names.has("screen")) follow();
    else if (state.screen === "training" && (names.has("step") || names.has("scale"))) redraw();
  });
  follow();
}
