// Share: the link to what is seen, and the same as Python.
import { $ } from "./dom.js";
import { link, model, onChange, pinned, state, uploads } from "./state.js";

const quoted = (text) => JSON.stringify(text); // a string of JSON is one of Python

/** The lines that give `model` the chosen operator. */
function operator() {
  const [kind, which] = state.operator.split(":");
  const shape = `(${model.layers}, ${model.heads}, ${model.head_dim}, ${model.head_dim})`;
  return {
    learned: [], cached: [],
    stored: [],
    frozen: ["pldr.freeze(model, ids)  # G_LM of this text; the studio takes the mean over four held-out passages"],
    identity: ["import torch", "", `pldr.freeze(model, G_LM=torch.eye(${model.head_dim}).expand${shape})  # ordinary attention`],
    uniform: ["import torch", "", `pldr.freeze(model, G_LM=torch.rand${shape})`],
    normal: ["import torch", "", `pldr.freeze(model, G_LM=torch.randn${shape})`],
    factored: [`pldr.compress(folder, "compressed", rank=${which}, overwrite=True)  # keys in ${which} dimensions`, 'model = pldr.load_model("compressed")'],
    file: [`pldr.freeze(model, G_LM=pldr.load_predefined_G(${quoted(uploads.get(state.operator) ?? "G_LM.safetensors")}))`],
  }[kind] ?? [];
}

/** Settings as arguments, for the engine or for transformers. */
function settings(engine) {
  const drawn = state.temperature !== 0, given = [`max_new_tokens=${state.max_new_tokens}`];
  if (!engine) given.push(`do_sample=${drawn ? "True" : "False"}`, "use_cache=False");
  if (drawn) given.push(`temperature=${state.temperature}`, `top_p=${state.top_p}`);
  if (drawn && (state.top_k || !engine)) given.push(`top_k=${state.top_k}`);
  if (drawn && engine) given.push(`seed=${state.seed}`);
  if (state.repetition_penalty !== 1) given.push(`repetition_penalty=${state.repetition_penalty}`);
  return given.join(", ");
}

export function python() {
  const ids = pinned(), learned = state.operator === "learned";
  return [
    "import pldr", "",
    `folder = ${model.name === "stories-10m" ? "pldr.STORIES" : quoted(model.name)}`,
    "model, tokenizer = pldr.load_model(folder), pldr.load_tokenizer(folder)",
    `ids = tokenizer(${quoted(state.prompt)}, return_tensors="pt").input_ids`, "",
    ...(model.kind === "learned" ? ["A, A_LM, A_P, G_LM = pldr.deductive_outputs(model, ids)  # each [layers, batch, heads, head_dim, head_dim]",
      `print(${state.tensor}[${state.layer}, 0, ${state.head}])`, ""] : []),
    ...operator(),
    ...(ids ? ["", "import torch", `ids = torch.tensor([[${ids.join(", ")}]])  # the pinned tokens`] : []),
    ...(learned ? ["# G_LM anew from all tokens, at each of them", `tokens = model.generate(ids, ${settings(false)})`, "print(tokenizer.decode(tokens[0]))"]
      : ["engine = pldr.Engine(model, tokenizer)", `(written,) = engine.generate([ids[0].tolist()], ${settings(true)})`, "print(written.text)"]), "",
  ].join("\n");
}

export function start() {
  let seen = "write"; // the screen that one comes from, which is what is shared
  const shared = () => link(seen);
  const show = () => {
    if (state.screen !== "share") {
      seen = state.screen;
      return;
    }
    $("link").textContent = shared();
    $("python").textContent = python();
  };
  const copy = (button, text, what) => $(button).addEventListener("click", async () => {
    await navigator.clipboard.writeText(text());
    $("copied").textContent = `${what} copied`;
  });
  copy("copy-link", shared, "Link");
  copy("copy-python", python, "Python");
  onChange(show);
  show();
}
