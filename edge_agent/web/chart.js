// Charts as SVG by hand: lines over an axis, and shares with their intervals. Nothing here sets a style or reads markup, so they work under
// the pages' content security policy; plotly does not (docs/web.md).

import { h, setText, svg } from "./dom.js";

const LEFT = 52,
  RIGHT = 12,
  TOP = 10,
  BOTTOM = 22;

// A line over time or updates. `set(points, bound)` draws points of {x, y, note}; `bound` is a level to mark, or null. What is pointed at, or
// walked to by arrow keys, is read out; else the last one. `zero`: the axis begins at 0; `unit`: its round numbers are those of that; `whole`:
// there is nothing between two whole numbers along it.
export function makeLine({ title, x: nameX, showX, showY, zero = false, unit = 1, whole = false, tall = 150 }) {
  const told = h("output", {}),
    drawing = svg("svg", { height: tall, role: "img", tabindex: 0 }),
    element = h("figure", { class: "chart" }, h("figcaption", {}, h("span", {}, title), told), drawing);
  let points = [],
    bound = null,
    at = null,
    placeX = null,
    drawn = 0;

  function draw() {
    const width = (drawn = Math.max(160, drawing.clientWidth || 320));
    drawing.setAttribute("viewBox", `0 0 ${width} ${tall}`);
    const xs = points.map((point) => point.x),
      ys = points.map((point) => point.y).concat(bound ?? []);
    const [fromX, toX] = spread(xs, false),
      [fromY, toY] = spread(ys, zero);
    placeX = (x) => LEFT + ((x - fromX) / (toX - fromX)) * (width - LEFT - RIGHT);
    const placeY = (y) => tall - BOTTOM - ((y - fromY) / (toY - fromY)) * (tall - TOP - BOTTOM);
    const parts = [];
    for (const y of ticks(fromY, toY, 3, unit)) {
      parts.push(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: placeY(y), y2: placeY(y) }));
      parts.push(svg("text", { x: LEFT - 6, y: placeY(y) + 4, "text-anchor": "end" }, showY(y)));
    }
    for (const x of points.length ? ticks(fromX, toX, Math.max(2, Math.floor(width / 130)), 1, whole ? 1 : 0) : []) {
      const nearEnd = placeX(x) > width - 30;
      parts.push(svg("text", { x: placeX(x), y: tall - 5, "text-anchor": nearEnd ? "end" : "middle" }, showX(x)));
    }
    if (bound !== null) parts.push(svg("line", { class: "bound", x1: LEFT, x2: width - RIGHT, y1: placeY(bound), y2: placeY(bound) }));
    const path = points.map((point, n) => `${n ? "L" : "M"}${placeX(point.x).toFixed(1)} ${placeY(point.y).toFixed(1)}`).join("");
    if (points.length > 1) parts.push(svg("path", { class: "line", d: path }));
    const shown = points[at ?? points.length - 1];
    if (shown) {
      if (at !== null) parts.push(svg("line", { class: "cross", x1: placeX(shown.x), x2: placeX(shown.x), y1: TOP, y2: tall - BOTTOM }));
      parts.push(svg("circle", { class: "dot", cx: placeX(shown.x), cy: placeY(shown.y), r: 3.5 }));
    }
    drawing.replaceChildren(...parts);
    const text = shown
      ? `${showY(shown.y)}${at === null ? "" : ` at ${showX(shown.x)}`}${shown.note ? ` · ${shown.note}` : ""}`
      : "nothing yet";
    setText(told, text);
    drawing.setAttribute("aria-label", `${title} over ${nameX}: ${text}`);
  }
  function point(to) {
    at = to === null || !points.length ? null : Math.min(points.length - 1, Math.max(0, to));
    draw();
  }
  drawing.addEventListener("pointermove", (event) => {
    if (!points.length) return;
    const x = event.clientX - drawing.getBoundingClientRect().left;
    point(points.reduce((best, one, n) => (Math.abs(placeX(one.x) - x) < Math.abs(placeX(points[best].x) - x) ? n : best), 0));
  });
  drawing.addEventListener("pointerleave", () => point(null));
  drawing.addEventListener("blur", () => point(null));
  drawing.addEventListener("keydown", (event) => {
    const now = at ?? points.length - 1,
      to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: points.length - 1, Escape: null }[event.key];
    if (to === undefined) return;
    point(to);
    event.preventDefault();
  });
  new ResizeObserver(() => (drawing.clientWidth === drawn ? null : draw())).observe(drawing);
  return {
    element,
    set(to, level = null) {
      points = to;
      bound = level;
      if (at !== null && at >= points.length) at = null;
      draw();
    },
  };
}

// The ends of an axis: those of the values with a little room, and 0 where that belongs to it.
function spread(values, zero) {
  let from = Infinity,
    to = -Infinity;
  for (const value of values) {
    from = Math.min(from, value);
    to = Math.max(to, value);
  }
  if (zero) from = Math.min(0, from);
  if (!(from < to)) return Number.isFinite(from) ? [from - (zero && from === 0 ? 0 : 0.5), from + 1] : [0, 1];
  return [from, to + (zero ? 0.06 : 0) * (to - from)];
}

// Some round numbers between two ends, of a unit: of bytes those that are round in MiB or GiB; `least` apart.
function ticks(from, to, about, unit = 1, least = 0) {
  const rough = (to - from) / about / unit,
    base = unit === 1 ? 10 : 2,
    size = base ** Math.floor(Math.log(rough) / Math.log(base)),
    round = unit * size * ((unit === 1 ? [1, 2, 5, 10] : [1, 2]).find((factor) => factor * size >= rough * 0.999) ?? base),
    step = Math.max(round, least);
  const found = [];
  for (let n = Math.ceil(from / step); n * step <= to + step * 1e-9; n++) found.push(n * step);
  return found;
}

// Shares with their intervals below each other on one axis from `from` to `to`: rows of {name, value, low, high, text}.
export function makeIntervals(label, rows, { from = 0, to = 1, show, middle = null }) {
  const place = (value) => `${(100 * (Math.min(to, Math.max(from, value)) - from)) / (to - from)}%`;
  const rail = (row) =>
    svg(
      "svg",
      { class: "interval", height: 22, role: "img", "aria-label": `${row.name}: ${row.text}` },
      svg("line", { class: "rail", x1: 0, x2: "100%", y1: 11, y2: 11 }),
      middle === null ? null : svg("line", { class: "bound", x1: place(middle), x2: place(middle), y1: 0, y2: 22 }),
      svg("line", { class: "whisker", x1: place(row.low), x2: place(row.high), y1: 11, y2: 11 }),
      svg("circle", { class: "dot", cx: place(row.value), cy: 11, r: 5 }),
    );
  const ends = [from, middle, to].filter((end) => end !== null);
  return h(
    "div",
    { class: "intervals", role: "group", "aria-label": label },
    ...rows.map((row) => h("div", {}, h("span", { class: "name" }, row.name), rail(row), h("span", { class: "value" }, row.text))),
    h("div", { "aria-hidden": "true" }, h("div", { class: "ends" }, ...ends.map((end) => h("span", {}, show(end))))),
  );
}
