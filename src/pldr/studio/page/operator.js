// The operator: the four tensors of a head, how G settles as the text grows, and all heads at a glance.
import { ask, floats, latest } from "./api.js";
import { $, make, short, table } from "./dom.js";
import { figure, heatmap, lines, scaleOf, tiles } from "./figures.js";
import { model, onChange, set, state } from "./state.js";

const TENSORS = {
  A: "what the metric learner, a deep network, makes of which dimensions of the queries occur together",
  A_LM: "the metric tensor: how strongly two dimensions are related",
  A_P: "the potential tensor: each entry of A_LM to a power of its own",
  G_LM: "the operator that stands between query and key",
};
const figures = {};
let tokens = 0; // of the text
let scales = {}; // of the head at the whole text, so that shorter ones can be compared with it; "shared" of its tensors together
let seen = {}; // what is drawn: each tensor's values, and its size
let settled = new Map(); // length to the difference from the whole text's G
let stale = true;

const asked = () => ({ text: state.prompt, operator: state.operator, length: state.length || null });

function draw(answer, length) {
  settled.set(length, answer.settled);
  const there = Object.entries(answer.tensors).filter(([, tensor]) => tensor);
  seen = Object.fromEntries(there.map(([name, { values, size }]) => [name, { values: floats(values), size, length }]));
  for (const name of Object.keys(TENSORS)) figures[name].element.hidden = !seen[name];
  if (!scales.shared) {
    scales = Object.fromEntries(Object.entries(seen).map(([name, { values }]) => [name, scaleOf(values)]));
    scales.shared = scaleOf(...Object.values(seen).map(({ values }) => values));
  }
  drawTensors();
  table($("tensor-numbers"), ["", "rank", "log₁₀ |det|", "size (RMS)"],
    there.map(([name, tensor]) => [name, short(tensor.rank), short(tensor.log10_determinant), short(tensor.rms)]));
  figures.singular.show(lines(there.map(([name, { singular_values: values }]) => ({ name, points: values.map((value, index) => [index + 1, value / values[0]]) })),
    { title: "Singular values", x: "number", y: "of the largest", log: true }));
  const points = [...settled].filter(([, value]) => value !== null).sort((a, b) => a[0] - b[0]);
  figures.settling.show(lines([{ name: "G_LM", points }], { title: "How G settles", x: "tokens", y: "difference from all tokens' G", log: true,
    mark: length, span: [1, tokens], top: [1], empty: "Move the slider, or press Walk." }));
  figures.settling.element.hidden = there.length === 1; // a constant
  const now = answer.settled;
  $("length-output").textContent = `${length} of ${tokens}${!now || length === tokens ? "" : `: G differs by ${short(now, 2)} of its size`}`;
}

function drawTensors() {
  for (const [name, { values, size, length }] of Object.entries(seen)) {
    const title = `${name}, layer ${state.layer}, head ${state.head}, ${length} tokens`;
    const scale = state.scale === "own" ? scales[name] : scales.shared;
    const small = 100 * scales[name].bound < scale.bound ? " Too small to be seen on this scale: choose the colours “each its own”." : "";
    figures[name].show(heatmap(values, size, scale, title, (row, column, value) => point(name, row, column, value)), explained(name) + small);
  }
}

const explained = (name) => `${TENSORS[name][0].toUpperCase()}${TENSORS[name].slice(1)}.`;

function point(name, row, column, value) {
  const what = name === "G_LM"
    ? `multiplies query component ${row} by key component ${column}: the score is the sum of all q[${row}] · G[${row}, ${column}] · k[${column}].`
    : `${TENSORS[name]}.`;
  $("cell").textContent = `${name}[${row}, ${column}] = ${short(value)}: ${what}`;
}

const head = latest(async (signal) => {
  const length = state.length;
  const answer = await ask("operator", { ...asked(), layer: state.layer, head: state.head }, signal);
  if (tokens !== answer.tokens) {
    tokens = answer.tokens;
    $("length").max = tokens;
  }
  if (length === 0 || length >= tokens) $("length").value = tokens;
  draw(answer, length ? Math.min(length, tokens) : tokens);
});

/** The whole text first: its scale is that of every length. */
const everything = latest(async (signal) => {
  scales = {};
  settled = new Map();
  stale = false;
  const length = state.length;
  if (length) {
    const whole = await ask("operator", { ...asked(), length: null, layer: state.layer, head: state.head }, signal);
    tokens = whole.tokens;
    $("length").max = tokens;
    $("length").value = length;
    draw(whole, tokens);
    if (length >= tokens) set({ length: 0 }); // of a link to a longer text
  }
  await head();
});

const grid = latest(async (signal) => {
  const whole = ["learned", "cached"].includes(state.operator); // a constant operator has G_LM alone
  const tensor = whole ? state.tensor : "G_LM";
  for (const option of document.querySelector("[data-state=tensor]").options) option.disabled = !whole && option.value !== "G_LM";
  const answer = await ask("grid", { ...asked(), tensor }, signal);
  const values = floats(answer.values);
  figures.grid.answer = { ...answer, values, scale: scaleOf(values), tensor };
  drawGrid();
});

function drawGrid() {
  const { values, scale, tensor, layers, heads, size, rank, log10_determinant: determinant } = figures.grid.answer ?? {};
  if (!values) return;
  figures.grid.show(tiles(values, layers, heads, size, scale, `${tensor} of all layers and heads`, {
    chosen: [state.layer, state.head], own: state.scale === "own",
    labels: (row, column) => `layer ${row}, head ${column}: rank ${short(rank[row][column])}, log₁₀ |det| ${short(determinant[row][column])}`,
    choose: (layer, column) => set({ layer, head: column }),
  }), `A row for each layer, a column for each head, ${state.scale === "own" ? "each on a scale of its own" : `one scale up to ${short(scale.bound)}`}. Orange is positive, blue negative. Click a square to see it above.`);
}

/** Every length in turn, at most 48 of them. */
async function walk() {
  const button = $("walk");
  if (button.dataset.on) return delete button.dataset.on;
  button.dataset.on = "yes";
  button.textContent = "Stop";
  const step = Math.max(1, Math.ceil(tokens / 48));
  for (let length = 1; button.dataset.on && length < tokens; length += step) {
    $("length").value = length;
    set({ length });
    await head();
  }
  if (button.dataset.on) {
    set({ length: 0 });
    await head();
  }
  delete button.dataset.on;
  button.textContent = "Walk from 1 to all";
  await grid();
}

export function start() {
  for (const name of Object.keys(TENSORS)) {
    figures[name] = figure(name, explained(name));
    $("heads-tensors").append(figures[name].element);
  }
  figures.singular = figure("Singular values", "How many directions a tensor really has: a line that falls at once is one of low rank.");
  figures.settling = figure("How G settles", "How far G from the first tokens is from G of all. Lines that are low and level: a few tokens suffice.");
  figures.grid = figure("The tensor of every head");
  for (const name of ["singular", "settling", "grid"]) $(name).append(figures[name].element);

  $("length").addEventListener("input", () => {
    const length = Number($("length").value);
    set({ length: length >= tokens ? 0 : length });
    head();
  });
  $("length").addEventListener("change", () => grid());
  $("walk").addEventListener("click", walk);
  onChange((names) => {
    const any = (...of) => of.some((name) => names.has(name));
    if (any("prompt")) set({ length: 0 });
    stale ||= any("prompt", "operator", "layer", "head");
    if (state.screen !== "operator") return;
    if (any("layer", "head", "scale")) drawGrid();
    if (any("scale")) drawTensors();
    if (stale) everything();
    if (any("tensor", "prompt", "operator", "screen")) grid();
  });
  if (state.screen === "operator") everything().then(() => grid()); // the length may be one of a longer text
}
