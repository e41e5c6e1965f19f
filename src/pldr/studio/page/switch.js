// Switch: the same text with other operators, side by side; and attention with and without G.
import { ask, floats, latest, report, upload } from "./api.js";
import { $, make, short, table } from "./dom.js";
import { bars, figure, heatmap, scaleOf } from "./figures.js";
import { compared, model, onChange, set, state, uploads } from "./state.js";

const WORDS = {
  learned: "G from all tokens of the text, by the network",
  cached: "G from the prompt, then kept",
  frozen: "one constant G; the network is gone",
  identity: "G is the identity: ordinary attention",
  uniform: "G is noise, even on [0, 1]: does it matter at all?",
  normal: "G is noise, normally distributed: does it matter at all?",
  stored: "the constant that the model has",
};
const NEW_TOKENS = 40;
const LARGEST = 32 << 20; // bytes that the server reads
const figures = {};
let attention = null;

const factored = () => `factored:${state.rank}`;
const named = (name) => uploads.get(name) ?? name;

function choices() {
  const others = [...uploads.keys()], asked = compared();
  const rows = [...model.operators, ...(model.largest_rank ? ["factored"] : []), ...others].map((name) => {
    const box = make("input", { type: "checkbox", value: name });
    box.checked = asked.includes(name);
    box.addEventListener("change", () => {
      const ticked = [...$("choices").querySelectorAll("input:checked")].map((one) => one.value);
      set({ compared: ticked.join(",") });
    });
    return make("label", {}, box, make("span", {}, make("b", {}, named(name)),
      make("small", {}, name === "factored" ? "G of a lower rank: keys in fewer dimensions" : WORDS[name] ?? "a file of yours")));
  });
  $("choices").replaceChildren(...rows);
}

const compare = latest(async (signal) => {
  const status = $("compare-status");
  const known = new Set([...model.operators, "factored", ...uploads.keys()]);
  const operators = compared().filter((name) => known.has(name)).map((name) => (name === "factored" ? factored() : name));
  if (!operators.length) throw new Error("Compare: choose at least one operator.");
  status.textContent = "comparing …";
  try {
    const { rows } = await ask("compare",
      { text: state.score || state.prompt, prompt: state.prompt, operators, max_new_tokens: NEW_TOKENS }, signal);
    show(rows);
  } finally {
    if (!signal.aborted) status.textContent = "";
  }
});

function show(rows) {
  const first = rows.find((row) => row.operator === "learned") ?? rows[0];
  table($("compared"), ["operator", "loss, nats per token", "next token: KL, nats", "G: change", "the same text", "seconds"],
    rows.map((row) => [named(row.operator), short(row.loss, 5), short(row.divergence), short(row.change),
      row === first ? "" : row.text === first.text ? "yes" : "no", short(row.seconds, 2)]));
  $("compared-words").hidden = false;
  const most = Math.max(...rows.flatMap((row) => row.next.map((token) => token.probability)));
  $("cards").replaceChildren(...rows.map((row) => {
    const common = same(row.text, first.text);
    const next = figure(`Next token, ${named(row.operator)}`);
    next.show(bars(row.next.map((token) => [token.text.trim() || "␣", token.probability]), { title: `Next token, ${named(row.operator)}`, most }));
    return make("article", {}, make("h3", {}, named(row.operator)), make("p", { class: "quiet" }, WORDS[row.operator] ?? ""),
      make("p", { class: "continued" }, row.text.slice(0, common).trimStart(), make("mark", {}, row.text.slice(common))), next.element);
  }));
}

function same(one, other) {
  let length = 0;
  while (length < one.length && one[length] === other[length]) length++;
  return length;
}

const attend = latest(async (signal) => {
  const operator = state.operator;
  const answer = await ask("attention", { text: state.prompt, operator, layer: state.layer, head: state.head }, signal);
  attention = { tokens: answer.tokens, with: floats(answer.with_g), without: floats(answer.without_g) };
  $("token").max = answer.tokens.length - 1;
  const names = answer.tokens.map(({ text }) => text.trim() || "␣"), scale = scaleOf(attention.with.filter(Boolean), attention.without.filter(Boolean)); // not of what is masked
  const draw = (name, title) => figures[name].show(heatmap(attention[name], answer.tokens.length, scale, title,
    (row) => token(row), names));
  draw("with", "Attention with G");
  draw("without", "Attention without G");
  token(state.token);
});

/** What a token attends to; the last of the text, where there is none at this place. */
function token(asked) {
  const { tokens } = attention, size = tokens.length, row = asked >= 0 && asked < size ? asked : size - 1;
  set({ token: row === size - 1 ? -1 : row });
  $("token").value = row;
  $("token-output").textContent = `${row}, “${tokens[row].text.trim()}”`;
  const weights = [...tokens.keys()].slice(0, row + 1).map((place) => [attention.with[row * size + place], attention.without[row * size + place], place]);
  const top = weights.sort((a, b) => b[0] - a[0]).slice(0, 8);
  const name = (place) => `${place} ${tokens[place].text.trim()}`;
  figures.attended.show(bars(top.flatMap(([withG, without, place]) => [[name(place), withG], ["without G", without, 1]]),
    { title: "What this token attends to", most: 1, label: 110 }),
  `What token ${row} attends to most with G, and how much without.`);
}

export function start() {
  figures.with = figure("Attention with G");
  figures.without = figure("Attention without G");
  figures.attended = figure("What this token attends to");
  $("with-g").append(figures.with.element);
  $("without-g").append(figures.without.element);
  $("attended").append(figures.attended.element);
  choices();
  const step = model.rank_step ?? 1;
  Object.assign($("rank"), { min: step, step, max: model.largest_rank || step, value: state.rank });
  $("rank-field").hidden = !model.largest_rank;
  $("compare").addEventListener("click", () => compare());
  $("token").addEventListener("input", () => attention && token(Number($("token").value)));
  $("operator-file").addEventListener("change", async () => {
    const [file] = $("operator-file").files;
    if (!file) return;
    if (file.size > LARGEST) {
      report(`${file.name}: an operator's file has at most ${LARGEST >> 20} MiB, this one ${Math.ceil(file.size / 2 ** 20)}.`);
      return;
    }
    try {
      report("");
      const { operator } = await upload("operators", file);
      uploads.set(operator, file.name);
      set({ compared: [...compared(), operator].join(",") });
      choices();
      compare();
    } catch (error) {
      report(error.message);
    }
  });
  let stale = true;
  const again = () => {
    if (stale) attend();
    stale = false;
  };
  onChange((names) => {
    stale ||= ["prompt", "operator", "layer", "head"].some((name) => names.has(name));
    if (names.has("rank")) {
      $("rank-output").textContent = state.rank;
      if (!compared().includes("factored")) {
        set({ compared: [...compared(), "factored"].join(",") });
        choices();
      }
    }
    if (state.screen === "switch") again();
  });
  $("rank-output").textContent = state.rank;
  if (state.screen === "switch") again();
}
