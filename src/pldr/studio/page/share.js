// Share: the link to what is seen, and the same as Python.
import { $ } from "./dom.js";
import { link, model, onChange, pinned, state } from "./state.js";

const quoted = (text) => JSON.stringify(text); // a string of JSON is one of Python

/** The lines that give `model` the chosen operator. */
function operator() {
  const [kind, which] = state.operator.split(":");
  const shape = `(${model.layers}, ${model.heads}, ${model.head_dim}, ${model.head_dim})`;
  return {
    learned: [], cached: [],
    frozen: ["pldr.freeze(model, ids)  # G_LM of this text becomes a constant; the network that computed it is gone"],
    identity: ["import torch", "", `pldr.freeze(model, G_LM=torch.eye(${model.head_dim}).expand${shape})  # ordinary attention`],
    random: ["import torch", "", `pldr.freeze(model, G_LM=torch.rand${shape})`],
    factored: [`pldr.compress(folder, "compressed", rank=${which}, overwrite=True)  # keys in ${which} dimensions`, 'model = pldr.load_model("compressed")'],
    file: ['pldr.freeze(model, G_LM=pldr.load_predefined_G("G_LM.safetensors", model.config))  # the file of yours'],
  }[kind] ?? [];
}

export function python() {
  const settings = [`max_new_tokens=${state.max_new_tokens}`];
  if (state.temperature > 0) settings.push(`temperature=${state.temperature}`, `top_p=${state.top_p}`, `seed=${state.seed}`);
  if (state.temperature > 0 && state.top_k) settings.push(`top_k=${state.top_k}`);
  if (state.repetition_penalty !== 1) settings.push(`repetition_penalty=${state.repetition_penalty}`);
  const ids = pinned();
  return [
    "import pldr", "",
    `folder = ${model.name === "stories-10m" ? "pldr.STORIES" : quoted(model.name ?? "")}`,
    "model, tokenizer = pldr.load_model(folder), pldr.load_tokenizer(folder)",
    `prompt = ${quoted(state.prompt)}`,
    'ids = tokenizer(prompt, return_tensors="pt").input_ids', "",
    "A, A_LM, A_P, G_LM = pldr.deductive_outputs(model, ids)  # each [layers, batch, heads, head_dim, head_dim]",
    `${state.tensor}[${state.layer}, 0, ${state.head}]  # what the studio shows of layer ${state.layer}, head ${state.head}`, "",
    ...operator(),
    "engine = pldr.Engine(model, tokenizer)",
    ids ? `(written,) = engine.generate([[${ids.join(", ")}]], ${settings.join(", ")})  # the pinned tokens`
      : `(written,) = engine.generate([prompt], ${settings.join(", ")})`,
    "print(written.text)", "",
  ].join("\n");
}

export function start() {
  const show = () => {
    if (state.screen !== "share") return;
    $("link").textContent = link();
    $("python").textContent = python();
  };
  const copy = (button, text, what) => $(button).addEventListener("click", async () => {
    await navigator.clipboard.writeText(text());
    $("copied").textContent = `${what} copied`;
  });
  copy("copy-link", link, "Link");
  copy("copy-python", python, "Python");
  onChange(show);
  show();
}
