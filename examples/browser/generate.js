// Text from a folder that `pldr export` wrote, by onnxruntime-web: in a browser (index.html) or in Node (node.js).
import * as ort from "onnxruntime-web";
import { Tokenizer } from "@huggingface/tokenizers";

// `read` gives the bytes of a file of the folder by its name.
export async function load(read) {
  const json = async (name) => JSON.parse(new TextDecoder().decode(await read(name)));
  return {
    config: await json("config.json"),
    tokenizer: new Tokenizer(await json("tokenizer.json"), await json("tokenizer_config.json")),
    session: await ort.InferenceSession.create(new Uint8Array(await read("model.onnx"))),
  };
}

// The most probable continuation, or with a temperature a random one; yields the new text so far after each token.
export async function* generate({ config, tokenizer, session }, prompt, { maxNewTokens = 64, temperature = 0 } = {}) {
  const ends = [config.eos_token_id].flat();
  const written = [];
  let ids = tokenizer.encode(prompt).ids;
  let cache = emptyCache(config);
  if (!ids.length) throw new Error("the prompt is empty");
  for (let seen = 0; written.length < maxNewTokens && seen + ids.length <= config.max_position_embeddings; ) {
    const positions = ids.map((_, index) => seen + index);
    seen += ids.length;
    const outputs = await session.run({
      input_ids: integers(ids),
      attention_mask: integers(new Array(seen).fill(1)),
      position_ids: integers(positions),
      ...cache,
    });
    cache = Object.fromEntries(
      Object.keys(cache).map((name) => [name, outputs[name.replace("past_key_values", "present")]]),
    );
    const next = choose(outputs.logits.data.subarray(-config.vocab_size), temperature);
    if (ends.includes(next)) return;
    written.push(next);
    ids = [next];
    yield tokenizer.decode(written);
  }
}

function emptyCache(config) {
  const heads = config.num_attention_heads;
  const width = config.hidden_size / heads;
  const cache = {};
  for (let layer = 0; layer < config.num_hidden_layers; layer++) {
    const sizes = { key: config.operator_ranks?.[layer] ?? width, value: width };
    for (const [kind, size] of Object.entries(sizes))
      cache[`past_key_values.${layer}.${kind}`] = new ort.Tensor("float32", new Float32Array(0), [1, heads, 0, size]);
  }
  return cache;
}

const integers = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

function choose(logits, temperature) {
  const best = logits.reduce((found, value, index) => (value > logits[found] ? index : found), 0);
  if (!temperature) return best;
  const weights = Array.from(logits, (value) => Math.exp((value - logits[best]) / temperature));
  let left = Math.random() * weights.reduce((sum, weight) => sum + weight);
  const chosen = weights.findIndex((weight) => (left -= weight) < 0);
  return chosen < 0 ? best : chosen;
}
