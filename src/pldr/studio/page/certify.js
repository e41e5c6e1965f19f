// Certify: may G be frozen? The verdict, its numbers, and the frozen model to take away.
import { ask, latest, report } from "./api.js";
import { $, make, short, table } from "./dom.js";
import { set, state } from "./state.js";

const LONGEST = 200_000; // characters that the server reads

const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

const certify = latest(async (signal) => {
  const progress = $("certify-progress"), status = $("certify-status");
  $("verdict").replaceChildren();
  progress.value = 0;
  progress.hidden = false;
  status.textContent = "starting …";
  try {
    const { job } = await ask("certify", { text: $("held-out").value }, signal);
    for (;;) {
      const said = await ask(`certify/${encodeURIComponent(job)}`, undefined, signal);
      if (said.error) throw new Error(said.error);
      progress.value = said.done;
      status.textContent = said.stage;
      if (said.verdict) return show(said, job);
      await pause(300);
    }
  } finally {
    if (!signal.aborted) {
      progress.hidden = true;
      status.textContent = "";
    }
  }
});

function show({ verdict, reasons, numbers }, job) {
  const modes = make("table", {}), all = make("table", {});
  table(modes, ["G_LM", "loss difference, nats per token", "its 95% interval", "same greedy tokens", "mean KL, nats"],
    Object.entries(numbers.modes ?? {}).map(([name, mode]) =>
      [name, short(mode.loss_difference), interval(mode.loss_interval ?? []), short(mode.agreement, 6), short(mode.kl_mean)]));
  table(all, ["measured", "value"], flat(numbers).map(([name, value]) => [name.replaceAll("_", " "), value]));
  const file = (name, text) => make("a", { class: "download", href: `api/certify/${encodeURIComponent(job)}/${name}`, download: name }, text);
  $("verdict").replaceChildren(
    make("h2", { class: numbers.certified ? "verdict" : "verdict no" }, verdict[0].toUpperCase() + verdict.slice(1)),
    make("ul", {}, ...reasons.map((reason) => make("li", {}, reason))),
    make("p", { class: "quiet" }, `On ${short(numbers.tokens)} tokens, with G cached from the start of each passage and with one constant G, against the learned one.`),
    make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Measured" }, modes),
    make("p", { class: "actions" }, ...(numbers.certified ? [file("model.zip", "Frozen model")] : []), file("certificate.json", "Certificate")),
    make("details", {}, make("summary", {}, "Everything measured"), all));
}

const interval = (pair) => `[${pair.map((one) => short(one)).join(", ")}]`;

/** Nested numbers as lines: names joined, an interval in brackets. */
function flat(numbers, before = "") {
  return Object.entries(numbers).flatMap(([name, value]) => {
    const whole = before ? `${before}, ${name}` : name;
    if (Array.isArray(value)) return [[whole, interval(value)]];
    return value && typeof value === "object" ? flat(value, whole) : [[whole, short(value, 4)]];
  });
}

export function start() {
  $("certify-go").addEventListener("click", () => certify());
  $("text-file").addEventListener("change", async () => {
    const [file] = $("text-file").files;
    if (!file) return;
    const text = await file.slice(0, 4 * LONGEST).text();
    set({ held: text.slice(0, LONGEST) });
    $("held-out").value = state.held;
    report(text.length > LONGEST ? `${file.name}: its first ${LONGEST.toLocaleString("en")} characters are taken.` : "");
  });
}
