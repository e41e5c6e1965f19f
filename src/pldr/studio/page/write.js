// Write: the model continues a text; each token's chance, what else it might have been, and going on from that.
import { latest, stream } from "./api.js";
import { $, make, short } from "./dom.js";
import { onChange, pinned, set, state } from "./state.js";

let tokens = []; // {id, text} of the prompt, then {id, text, logprob, top}
let current = -1;
let held = false; // a click keeps the alternatives of a token, whatever the pointer does

const chance = (logprob) => Math.exp(logprob);

/** Continue the prompt; or the pinned ids, of whose tokens `known` are on the page already. */
const generate = latest(async (signal, known = []) => {
  const ids = pinned();
  const status = (text) => ($("write-status").textContent = text);
  tokens = [];
  current = -1;
  held = false;
  $("written").replaceChildren();
  $("alternatives").replaceChildren();
  busy(true);
  status("…");
  const body = {
    prompt: ids ? null : state.prompt, ids, operator: state.operator, max_new_tokens: state.max_new_tokens, ...sampling(),
    repetition_penalty: state.repetition_penalty, seed: state.seed,
  };
  try {
    for await (const said of stream("generate", body, signal)) {
      if (said.prompt) said.prompt.forEach((token, place) => add(known[place]?.id === token.id ? known[place] : token));
      else if (said.finish_reason) status(`${short(said.tokens_per_second)} tokens/s, ${said.finish_reason === "length" ? "as long as asked" : "ended by itself"}`);
      else add(said);
    }
  } catch (error) {
    if (!signal.aborted) status("");
    throw error;
  } finally {
    if (!signal.aborted) busy(false);
  }
});

/** Greedy unless one of the three is given. */
function sampling() {
  const drawn = state.temperature !== 0;
  return { temperature: drawn ? state.temperature : null, top_k: (drawn && state.top_k) || null, top_p: drawn ? state.top_p : null };
}

function busy(is) {
  $("stop").disabled = !is;
  $("written").setAttribute("aria-busy", is);
}

function add(token) {
  const place = tokens.push(token) - 1;
  const written = token.logprob !== undefined && token.logprob !== null;
  const pick = () => {
    held = current !== place || !held;
    show(place);
  };
  const button = make("span", { // a button's text would not wrap as a line of text does
    role: "button", class: written ? "token" : "token given", tabindex: place ? -1 : 0,
    onclick: pick,
    onkeydown: (event) => ["Enter", " "].includes(event.key) && (event.preventDefault(), pick()),
    onpointerenter: () => held || show(place),
    onfocus: () => held || show(place),
  }, token.text);
  if (written) {
    button.style.setProperty("--surprise", Math.min(1, -token.logprob / 6).toFixed(3));
    button.setAttribute("aria-label", `${token.text}, probability ${short(chance(token.logprob), 2)}`);
  }
  const last = pinned()?.length;
  if (last && place === last - 1) button.classList.add("pinned");
  $("written").append(button);
}

/** A token's alternatives, each of which the text can go on from. */
function show(place) {
  current = place;
  const token = tokens[place], buttons = [...$("written").children];
  buttons.forEach((button, index) => {
    button.classList.toggle("current", index === place);
    button.tabIndex = index === place ? 0 : -1;
  });
  const goOn = (id) => make("button", { type: "button", class: "go-on", onclick: () => goFrom(place, id) }, "go on from it");
  if (!token.top) {
    $("alternatives").replaceChildren(make("h3", {}, quoted(token.text)), make("p", { class: "quiet" }, "Part of what was given."), goOn(token.id));
    return;
  }
  const others = token.top.some((other) => other.id === token.id) ? token.top : [...token.top, token];
  const rows = others.map((other) => {
    const share = make("span", { class: "share", "aria-hidden": "true" });
    share.style.setProperty("--share", chance(other.logprob).toFixed(4));
    return make("li", { class: other.id === token.id ? "chosen" : "" },
      make("button", { type: "button", title: "Go on from this token", onclick: () => goFrom(place, other.id, other) },
        make("span", { class: "word" }, quoted(other.text)), share, make("span", { class: "number" }, short(chance(other.logprob), 2))));
  });
  $("alternatives").replaceChildren(
    make("h3", {}, quoted(token.text)),
    make("p", { class: "quiet" }, `Probability ${short(chance(token.logprob), 3)}. It might have been:`),
    make("ol", {}, ...rows),
    make("p", { class: "quiet" }, "Choose one, and the text goes on from it."));
}

const quoted = (text) => `“${text.replaceAll("\n", "↵").replaceAll(" ", "␣")}”`;

function goFrom(place, id, other) {
  const kept = tokens.slice(0, place);
  kept.push(id === tokens[place].id ? tokens[place] : { ...other, top: tokens[place].top });
  set({ ids: kept.map((token) => token.id).join(",") });
  generate(kept);
}

export function start(runs) {
  $("go").addEventListener("click", () => {
    set({ ids: "" });
    generate();
  });
  $("stop").addEventListener("click", () => {
    generate.stop();
    busy(false);
    $("write-status").textContent = "stopped";
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && state.screen === "write") $("go").click();
  });
  $("written").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const next = step && $("written").children[current + step];
    if (!next) return;
    event.preventDefault();
    held = false;
    next.focus();
  });
  onChange((names) => names.has("prompt") && set({ ids: "" }));
  if (runs) generate();
}
