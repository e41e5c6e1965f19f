// node node.js FOLDER "Once upon a time" [tokens]
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { generate, load } from "./generate.js";

const [folder, prompt, tokens = "64"] = process.argv.slice(2);
const model = await load((name) => readFile(join(folder, name)));
let text = "";
for await (text of generate(model, prompt, { maxNewTokens: Number(tokens) }));
console.log(text);
