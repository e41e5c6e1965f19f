// The page: waits for the model, binds what is set, and shows one screen at a time.
import { ask, report } from "./api.js";
import { start as certify } from "./certify.js";
import { $, docs, make } from "./dom.js";
import { start as operator } from "./operator.js";
import { start as share } from "./share.js";
import { model, onChange, parse, restore, set, state, uploads } from "./state.js";
import { start as switches } from "./switch.js";
import { start as training } from "./training.js";
import { start as write } from "./write.js";

const SCREENS = ["write", "operator", "switch", "certify", "training", "share"];
const WITH_TEXT = ["write", "operator", "switch"];
const all = (selector) => [...document.querySelectorAll(selector)];

/** Wait until the server says so; what it is about meanwhile stands on the page. */
async function until(enough) {
  for (;;) {
    const said = await ask("state");
    $("stage").textContent = said.layers ? "Torch is being imported: “cached” writes already, what else you ask for comes in a few seconds." : `${said.stage} …`;
    if (enough(said)) return said;
    await new Promise((done) => setTimeout(done, 200));
  }
}

function fill() {
  $("model").textContent = `${model.name}: ${(model.parameters / 1e6).toFixed(1)} M parameters, ${model.layers} layers × ${model.heads} heads of ${model.head_dim}`;
  const options = (list) => list.map((value) => make("option", { value }, String(value)));
  all("[data-count]").forEach((select) => select.replaceChildren(...options([...Array(model[select.dataset.count]).keys()])));
  const named = state.operator.match(/^factored:(\d+)$/);
  if (named) set({ rank: Number(named[1]) });
  operators();
  if ($("operator-name").value !== state.operator) set({ operator: model.operators[0] });
  const within = (number, count) => Math.max(0, Math.min(Math.trunc(number), count - 1));
  set({ layer: within(state.layer, model.layers), head: within(state.head, model.heads), length: Math.max(0, Math.trunc(state.length)) });
}

/** What can be chosen as the operator: of the model, from files, or of a lower rank. */
function operators() {
  const options = [...model.operators, ...uploads.keys(), ...(model.largest_rank ? [`factored:${state.rank}`] : [])];
  $("operator-name").replaceChildren(...options.map((value) => make("option", { value }, uploads.get(value) ?? value)));
  $("operator-name").value = state.operator;
}

/** Every control with data-state shows that part of the state, and sets it. */
function bind() {
  let waiting;
  const controls = all("[data-state]");
  const show = (control) => {
    const value = String(state[control.dataset.state]);
    if (control !== document.activeElement && control.value !== value) control.value = value;
  };
  for (const control of controls) {
    const name = control.dataset.state, slow = control.tagName === "TEXTAREA" ? 300 : 0; // not at every key of a text
    const take = () => set({ [name]: parse(name, control.value) });
    control.addEventListener("input", () => {
      clearTimeout(waiting);
      if (slow) waiting = setTimeout(take, slow);
      else take();
    });
    control.addEventListener("change", take);
    show(control);
  }
  onChange((names) => {
    if (names.has("rank") && state.operator.startsWith("factored:")) set({ operator: `factored:${state.rank}` });
    if (names.has("rank") || names.has("compared")) operators();
    controls.forEach(show);
  });
}

function tabs() {
  const tab = (screen) => $(`tab-${screen}`);
  const show = () => {
    for (const screen of SCREENS) {
      const is = screen === state.screen;
      $(screen).hidden = !is;
      tab(screen).setAttribute("aria-selected", is);
      tab(screen).tabIndex = is ? 0 : -1;
    }
    $("text").hidden = !WITH_TEXT.includes(state.screen);
  };
  SCREENS.forEach((screen, place) => {
    tab(screen).addEventListener("click", () => set({ screen }));
    tab(screen).addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      const next = SCREENS[(place + step + SCREENS.length) % SCREENS.length];
      set({ screen: next });
      tab(next).focus();
    });
  });
  onChange((names) => {
    if (!names.has("screen")) return;
    report("");
    show();
  });
  show();
}

function theme() {
  const button = $("theme"), root = document.documentElement;
  const dark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const show = () => button.setAttribute("aria-pressed", dark());
  const kept = localStorage.getItem("pldr-studio-theme");
  if (kept) root.dataset.theme = kept;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    localStorage.setItem("pldr-studio-theme", root.dataset.theme);
    show();
  });
  show();
}

async function main() {
  theme();
  all("[data-docs]").forEach((link) => link.setAttribute("href", docs(link.dataset.docs)));
  try {
    Object.assign(model, await until((said) => said.layers));
    show();
    await until((said) => said.ready);
  } catch (error) {
    report(error.message);
  }
  $("stage").hidden = true;
}

/** Everything, of a model that is known. */
function show() {
  const given = restore();
  if (!SCREENS.includes(state.screen)) set({ screen: "write" });
  fill();
  bind();
  tabs();
  write(given && state.screen === "write");
  [operator, switches, certify, training, share].forEach((start) => start());
  addEventListener("hashchange", () => restore());
}

main();
