// What is set, in one object; it lives in the address's fragment, so that a link restores it.

const DEFAULTS = {
  screen: "write", prompt: "Once upon a time there was an old king who lived in a castle by the sea. He had three daughters, and", operator: "cached", ids: "",
  max_new_tokens: 80, temperature: 0.8, top_k: 0, top_p: 1, repetition_penalty: 1, seed: 0,
  layer: 0, head: 0, tensor: "G_LM", length: 0, // 0: all tokens
  scale: "shared", token: -1, // the last
  compared: "learned,cached,frozen,stored,identity,uniform", rank: 8, score: "", held: "", run: "", step: 0, // the last evaluation
};

export const state = { ...DEFAULTS };
export const model = {}; // what api/state says
export const uploads = new Map(); // operators of the reader: "file:ID" to the file's name
const listeners = [];
let timer;

export function onChange(listener) {
  listeners.push(listener);
}

/** Change some of it; listeners hear which names. */
export function set(changes) {
  const names = Object.keys(changes).filter((name) => state[name] !== changes[name]);
  if (!names.length) return;
  Object.assign(state, changes);
  clearTimeout(timer);
  timer = setTimeout(() => history.replaceState(null, "", link()), 100);
  listeners.forEach((listener) => listener(new Set(names)));
}

/** As the type of its default; a number that is none is the default. */
export function parse(name, text) {
  if (typeof DEFAULTS[name] !== "number") return String(text);
  const number = Number(text);
  return text !== "" && Number.isFinite(number) ? number : DEFAULTS[name];
}

/** The address of what is set, or of another screen of it. */
export function link(screen = state.screen) {
  const changed = Object.entries({ ...state, screen }).filter(([name, value]) => value !== DEFAULTS[name]);
  return `${location.origin}${location.pathname}#${new URLSearchParams(changed)}`;
}

/** Read the fragment: true where it said something. */
export function restore() {
  const said = new URLSearchParams(location.hash.slice(1));
  const known = [...said].filter(([name]) => name in DEFAULTS);
  set({ ...DEFAULTS, ...Object.fromEntries(known.map(([name, text]) => [name, parse(name, text)])) });
  return known.length > 0;
}

export const pinned = () => (state.ids ? state.ids.split(",").map(Number) : null);
export const compared = () => state.compared.split(",").filter(Boolean);
