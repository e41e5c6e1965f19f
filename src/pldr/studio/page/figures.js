// Figures: SVG that a reader can take away as SVG or PNG. d3 is the global of vendor/d3.min.js
// (Observable Plot puts a style element into each figure, which the page's security policy refuses).
import { make, short } from "./dom.js";

const d3 = globalThis.d3;
const POSITIVE = [222, 92, 32], NEGATIVE = [38, 124, 222]; // seen on white and on black alike; also in the dark of one colour
export const COLOURS = ["#de5c20", "#267cde", "#7a8b99", "#a9791c", "#8757c9", "#2a9378", "#c94f8b", "#5a6b2f"];

/** A figure with a heading and buttons to save it; `show(draw)` draws it at its width, again when that changes. */
export function figure(title, caption = "") {
  const heading = make("h3", {}, title), holder = make("div", { class: "holder" }), note = make("figcaption", {}, caption);
  const save = (kind) => make("button", { type: "button", class: "save", "aria-label": `Save ${title} as ${kind}`,
    onclick: () => download(holder.querySelector("svg"), title, kind) }, kind);
  const element = make("figure", {}, make("div", { class: "head" }, heading, save("SVG"), save("PNG")), holder, note);
  let draw = null, width = 0;
  const again = () => draw && width && holder.replaceChildren(draw(width).node());
  new ResizeObserver(() => {
    if (holder.clientWidth !== width) [width] = [holder.clientWidth], again();
  }).observe(holder);
  const show = (how, text) => {
    draw = how;
    if (text !== undefined) note.textContent = text;
    again();
  };
  const clear = () => ((draw = null), holder.replaceChildren());
  return { element, show, clear, holder };
}

function canvas(width, height, title) {
  return d3.create("svg").attr("viewBox", `0 0 ${width} ${height}`).attr("width", width).attr("height", height)
    .attr("role", "img").attr("aria-label", title).attr("font-size", 12).attr("fill", "currentColor");
}

/** Symmetric around zero: even near it, logarithmic far from it; from the median magnitude on. Of several tensors, common to them. */
export function scaleOf(...tensors) {
  const sizes = new Float64Array(tensors.reduce((sum, values) => sum + values.length, 0));
  let next = 0, signed = false;
  for (const values of tensors)
    for (const value of values) {
      sizes[next++] = Math.abs(value);
      signed ||= value < 0;
    }
  sizes.sort();
  const bound = sizes[sizes.length - 1] || 1;
  const linear = Math.max(sizes[sizes.length >> 1], bound / 1e3);
  return { bound, signed, position: (value) => Math.asinh(value / linear) / Math.asinh(bound / linear) };
}

/** Pixels of one colour for a sign and an opacity for the size, so that zero is the ground; `at` gives places on a scale. */
function paint(rows, columns, at) {
  const board = make("canvas", { width: columns, height: rows });
  const context = board.getContext("2d"), pixels = context.createImageData(columns, rows);
  for (let row = 0, next = 0; row < rows; row++)
    for (let column = 0; column < columns; column++, next += 4) {
      const place = Math.max(-1, Math.min(1, at(row, column)));
      pixels.data.set(place < 0 ? NEGATIVE : POSITIVE, next);
      pixels.data[next + 3] = Math.round(255 * Math.abs(place));
    }
  context.putImageData(pixels, 0, 0);
  return board.toDataURL();
}

const LEGEND = 32; // pixels of its height

/** What the colours stand for: a bar from the least of the scale to its most. */
function legend(svg, scale, x, y, width) {
  const long = Math.min(width, 220), least = scale.signed ? -1 : 0;
  svg.append("image").attr("href", paint(1, 200, (_, column) => least + ((1 - least) * column) / 199)).attr("x", x).attr("y", y + 8)
    .attr("width", long).attr("height", 8).attr("preserveAspectRatio", "none");
  const marks = scale.signed ? [[0, "start", -scale.bound], [long / 2, "middle", 0], [long, "end", scale.bound]] : [[0, "start", 0], [long, "end", scale.bound]];
  for (const [along, anchor, value] of marks)
    svg.append("text").attr("x", x + along).attr("y", y + 28).attr("text-anchor", anchor).attr("font-size", 10).text(short(value, 2));
}

/** A square tensor as colours. `choose(row, column, value)` hears what the pointer or the arrow keys are on; `names` stand at its axes. */
export function heatmap(values, size, scale, title, choose, names = []) {
  const href = paint(size, size, (row, column) => scale.position(values[row * size + column]));
  return (width) => {
    const margin = names.length ? Math.min(96, 10 + 6.6 * Math.max(...names.map((name) => name.length))) : 0;
    const side = Math.min(width - margin, 620), step = side / size;
    const svg = canvas(margin + side, margin + side + LEGEND, title), board = svg.append("g").attr("transform", `translate(${margin},${margin})`);
    board.append("image").attr("href", href).attr("width", side).attr("height", side).attr("image-rendering", "pixelated");
    board.append("rect").attr("width", side - 1).attr("height", side - 1).attr("x", 0.5).attr("y", 0.5)
      .attr("fill", "none").attr("stroke", "currentColor").attr("stroke-opacity", 0.25);
    legend(svg, scale, margin, margin + side, side);
    const every = Math.ceil(11 / step);
    names.forEach((name, place) => {
      if (place % every) return;
      const middle = (place + 0.5) * step, label = (text) => text.attr("font-size", 11).attr("dy", "0.32em").text(name.slice(0, 13));
      label(board.append("text").attr("x", -5).attr("y", middle).attr("text-anchor", "end"));
      label(board.append("text").attr("transform", `translate(${middle},-5) rotate(-90)`));
    });
    if (!choose) return svg;
    const cursor = board.append("rect").attr("width", step).attr("height", step).attr("fill", "none")
      .attr("stroke", "currentColor").attr("stroke-width", 1.5).attr("visibility", "hidden");
    let row = 0, column = 0;
    const go = (to, along) => {
      row = Math.max(0, Math.min(size - 1, to));
      column = Math.max(0, Math.min(size - 1, along));
      cursor.attr("x", column * step).attr("y", row * step).attr("visibility", "visible");
      choose(row, column, values[row * size + column]);
    };
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    svg.attr("tabindex", 0)
      .on("pointermove pointerdown", (event) => {
        const [x, y] = d3.pointer(event, board.node());
        if (y <= side) go(Math.floor(y / step), Math.floor(x / step));
      })
      .on("keydown", (event) => {
        if (!moves[event.key]) return;
        event.preventDefault();
        go(row + moves[event.key][0], column + moves[event.key][1]);
      })
      .on("pointerleave blur", () => cursor.attr("visibility", "hidden"));
    return svg;
  };
}

/** Many square tensors [rows, columns, size, size] on one scale, or each on its own; `choose(row, column)` hears a click. */
export function tiles(values, rows, columns, size, scale, title, { chosen = [], labels, choose, own = false }) {
  const gap = Math.max(1, Math.round(size / 12)), cell = size + gap, area = size * size;
  const scales = d3.range(rows * columns).map((head) => (own ? scaleOf(values.subarray(head * area, (head + 1) * area)) : scale));
  const href = paint(rows * cell - gap, columns * cell - gap, (y, x) => {
    const head = Math.floor(y / cell) * columns + Math.floor(x / cell), i = y % cell, j = x % cell;
    return i < size && j < size ? scales[head].position(values[head * area + i * size + j]) : 0;
  });
  return (width) => {
    const left = 28, top = 20, step = Math.min((width - left) / columns, 146), tile = (step * size) / cell;
    const svg = canvas(left + step * columns, top + step * rows + (own ? 0 : LEGEND), title);
    svg.append("image").attr("href", href).attr("x", left).attr("y", top).attr("image-rendering", "pixelated")
      .attr("width", step * columns - (step - tile)).attr("height", step * rows - (step - tile));
    if (!own) legend(svg, scale, left, top + step * rows - (step - tile), step * columns);
    const label = (text, x, y) => svg.append("text").attr("x", x).attr("y", y).attr("text-anchor", "middle").text(text);
    d3.range(columns).forEach((column) => label(column, left + column * step + tile / 2, 13));
    d3.range(rows).forEach((row) => label(row, 12, top + row * step + tile / 2 + 4));
    for (let row = 0; row < rows; row++)
      for (let column = 0; column < columns; column++) {
        const is = row === chosen[0] && column === chosen[1];
        const square = svg.append("rect").attr("x", left + column * step).attr("y", top + row * step).attr("width", tile).attr("height", tile)
          .attr("fill", "transparent").attr("stroke", "currentColor").attr("stroke-opacity", is ? 1 : 0.2).attr("stroke-width", is ? 2 : 1);
        square.append("title").text(labels(row, column));
        if (choose) square.attr("cursor", "pointer").on("click", () => choose(row, column));
      }
    return svg;
  };
}

/** Lines [{name, points: [[x, y]]}] with axes; `log` for a logarithmic y; `span` of x and `top` of y where points need not reach them. */
export function lines(series, { title, x, y, log = false, mark = null, span = [], top = [], empty = "", keys = false }) {
  return (width) => {
    const height = Math.min(280, Math.max(200, width * 0.6)), margin = { top: 26, right: 18, bottom: 38, left: 58 };
    const svg = canvas(width, height, title);
    const shown = series.map((one) => ({ ...one, points: one.points.filter(([, value]) => Number.isFinite(value) && (!log || value > 0)) }));
    const points = shown.flatMap((one) => one.points);
    if (!points.length) {
      svg.append("text").attr("x", width / 2).attr("y", height / 2).attr("text-anchor", "middle").text(empty);
      return svg;
    }
    const [first, last] = d3.extent([...span, ...points.map((point) => point[0])]);
    const across = d3.scaleLinear([first, Math.max(last, first + 1)], [margin.left, width - margin.right]);
    const [low, high] = d3.extent([...top, ...points.map((point) => point[1])]), more = low === high ? Math.abs(low) / 2 || 1 : 0;
    const up = (log ? d3.scaleLog() : d3.scaleLinear()).domain([low - more, high + more])
      .range([height - margin.bottom, margin.top]).nice();
    const axis = (place, made) => svg.append("g").attr("transform", place).call(made).attr("font-family", null).attr("font-size", 11)
      .call((group) => group.select(".domain").attr("stroke-opacity", 0.4));
    axis(`translate(0,${height - margin.bottom})`, d3.axisBottom(across).ticks(Math.min(width / 90, Math.max(1, last - first))).tickSizeOuter(0));
    axis(`translate(${margin.left},0)`, d3.axisLeft(up).ticks(5, log ? ".0e" : undefined).tickSizeOuter(0));
    svg.append("text").attr("x", width - margin.right).attr("y", height - 6).attr("text-anchor", "end").text(x);
    svg.append("text").attr("x", 0).attr("y", 12).text(y);
    if (mark !== null) svg.append("line").attr("x1", across(mark)).attr("x2", across(mark)).attr("y1", margin.top)
      .attr("y2", height - margin.bottom).attr("stroke", "currentColor").attr("stroke-dasharray", "2 3");
    const colour = (index) => (keys ? d3.interpolateRgb("#267cde", "#de5c20")(index / Math.max(1, shown.length - 1)) : COLOURS[index]);
    shown.forEach(({ name, points: own }, index) => {
      svg.append("path").attr("fill", "none").attr("stroke", colour(index)).attr("stroke-width", 2).attr("stroke-linejoin", "round")
        .attr("d", d3.line((point) => across(point[0]), (point) => up(point[1]))(own));
      if (own.length < 40) svg.append("g").attr("fill", colour(index)).selectAll("circle").data(own).join("circle").attr("r", 2.5)
        .attr("cx", (point) => across(point[0])).attr("cy", (point) => up(point[1]))
        .append("title").text((point) => `${name} ${short(point[0])}: ${short(point[1])}`);
    });
    let right = width - margin.right;
    if (shown.length > 1 && !keys) [...shown].reverse().forEach(({ name }, index) => {
      svg.append("text").attr("x", right).attr("y", 12).attr("text-anchor", "end").attr("font-weight", 600)
        .attr("fill", COLOURS[shown.length - 1 - index]).text(name);
      right -= 9 * name.length + 12;
    });
    return svg;
  };
}

/** Bars [[label, value, colour's place]], values from 0 to `most`, one a line. */
export function bars(pairs, { title, most, label = 90 }) {
  return (width) => {
    const step = 20, svg = canvas(width, step * pairs.length + 4, title);
    const along = d3.scaleLinear([0, most || 1], [0, width - label - 56]);
    pairs.forEach(([name, value, colour = 0], index) => {
      const middle = index * step + 14;
      svg.append("text").attr("x", label - 8).attr("y", middle).attr("text-anchor", "end").text(name);
      svg.append("rect").attr("x", label).attr("y", middle - 10).attr("height", 13).attr("width", Math.max(1, along(value))).attr("fill", COLOURS[colour]);
      svg.append("text").attr("x", label + along(value) + 6).attr("y", middle).text(short(value));
    });
    return svg;
  };
}

/** Save a figure as it is seen, with its ground. */
async function download(drawn, title, kind) {
  if (!drawn) return;
  const copy = drawn.cloneNode(true), look = getComputedStyle(document.body);
  const [width, height] = [Number(copy.getAttribute("width")), Number(copy.getAttribute("height"))];
  const given = { xmlns: "http://www.w3.org/2000/svg", color: look.color, "font-family": "system-ui, sans-serif" };
  Object.entries(given).forEach(([name, value]) => copy.setAttribute(name, value));
  d3.select(copy).insert("rect", "*").attr("width", width).attr("height", height).attr("fill", look.backgroundColor);
  let file = new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" });
  if (kind === "PNG") file = await raster(file, width, height);
  const address = URL.createObjectURL(file);
  make("a", { href: address, download: `${title.replace(/[^\w]+/g, "-")}.${kind.toLowerCase()}` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

async function raster(svg, width, height, zoom = 2) {
  const address = URL.createObjectURL(svg), image = new Image();
  image.src = address;
  await image.decode();
  const board = make("canvas", { width: width * zoom, height: height * zoom });
  const context = board.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(image, 0, 0, width * zoom, height * zoom);
  URL.revokeObjectURL(address);
  return new Promise((done) => board.toBlob(done, "image/png"));
}
