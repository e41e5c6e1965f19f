// Elements, made of text alone.

export const $ = (id) => document.getElementById(id);

/** An element with attributes and properties in `given`; strings among `children` are text. */
export function make(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

export const docs = (page) => `https://github.com/pldr-llm/pldr/blob/main/docs/${page}`;

/** A number in few characters. */
export function short(number, digits = 3) {
  if (number === null || number === undefined) return "–";
  if (typeof number !== "number") return String(number);
  if (!Number.isFinite(number)) return number > 0 ? "∞" : "−∞";
  if (Number.isInteger(number) && Math.abs(number) < 1e6) return String(number).replace("-", "−");
  const small = Math.abs(number) < 1e-3 && number !== 0;
  return (small || Math.abs(number) >= 1e6 ? number.toExponential(digits - 2) : number.toPrecision(digits)).replaceAll("-", "−");
}

export function table(element, head, rows) {
  const cells = (values, tag) => make("tr", {}, ...values.map((value, column) =>
    column === 0 ? make("th", { scope: tag === "th" ? "col" : "row" }, value) : make(tag, tag === "th" ? { scope: "col" } : {}, value)));
  element.replaceChildren(make("thead", {}, cells(head, "th")), make("tbody", {}, ...rows.map((row) => cells(row, "td"))));
}
