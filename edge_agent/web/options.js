// The fields of NlftOptions as controls: sliders whose track is the distribution of what the threshold decides on.

import { h, svg, setText } from "./dom.js";

const linear = (low, high) => ({ low, high, place: (x) => (x - low) / (high - low), value: (f) => low + f * (high - low) });
const logarithmic = (low, high) => ({
  low,
  high,
  place: (x) => Math.log(Math.max(x, low) / low) / Math.log(high / low),
  value: (f) => low * (high / low) ** f,
});

// `least` and `most` are the bounds of the field, of which the scale shows the useful part; `open` ones may not be reached.
// `plot` names the distribution of tokens or answers over which the slider moves.
export const FIELDS = [
  {
    name: "correct_threshold",
    group: "Correct answers",
    label: "τ, scoring threshold of c",
    kind: "number",
    least: 0,
    most: 1,
    open: true,
    scale: linear(0, 1),
    ticks: [0, 0.25, 0.5, 0.75, 1],
    plot: "standard",
    tone: "pos",
  },
  {
    name: "correct_boost_power",
    group: "Correct answers",
    label: "Power of the boost above τ",
    kind: "number",
    least: 0,
    most: 100,
    scale: linear(0, 10),
    ticks: [0, 5, 10],
  },
  {
    name: "correct_cluster_power",
    group: "Correct answers",
    label: "Power of c/τ, joined tokens",
    kind: "number",
    least: 0,
    most: 100,
    scale: linear(0, 2),
    ticks: [0, 1, 2],
  },
  {
    name: "correct_other_power",
    group: "Correct answers",
    label: "Power of c/τ, other tokens",
    kind: "number",
    least: 0,
    most: 100,
    scale: linear(0, 2),
    ticks: [0, 1, 2],
  },
  {
    name: "judge_base_ratio",
    group: "Incorrect answers",
    label: "Least j/b of a flagged token",
    kind: "number",
    least: 0,
    most: 1e6,
    scale: logarithmic(0.01, 1e4),
    ticks: [0.01, 1, 100, 1e4],
    plot: "overBase",
    tone: "neg",
  },
  {
    name: "judge_standard_ratio",
    group: "Incorrect answers",
    label: "Least j/c of a flagged token",
    kind: "number",
    least: 0,
    most: 1e6,
    scale: logarithmic(0.01, 1e4),
    ticks: [0.01, 1, 100, 1e4],
    plot: "overStandard",
    tone: "neg",
  },
  {
    name: "judge_minimum",
    group: "Incorrect answers",
    label: "Least j of a flagged token",
    kind: "number",
    least: 0,
    most: 1,
    scale: logarithmic(1e-6, 1),
    ticks: [1e-6, 1e-4, 0.01, 1],
    plot: "judge",
    tone: "neg",
  },
  {
    name: "unlikelihood_scale",
    group: "Incorrect answers",
    label: "Scale of the unlikelihood",
    kind: "number",
    least: 0,
    most: 1e6,
    scale: linear(0, 8),
    ticks: [0, 4, 8],
  },
  { name: "imitate_incorrect", group: "Incorrect answers", label: "Imitate what is not flagged", kind: "flag" },
  {
    name: "imitate_flagged_share",
    group: "Incorrect answers",
    label: "but not above this flagged share",
    kind: "number",
    least: 0,
    most: 1,
    scale: linear(0, 0.5),
    ticks: [0, 0.25, 0.5],
    plot: "flagged",
    tone: "neg",
  },
  { name: "cluster", group: "Clusters", label: "Neighbours that join", kind: "choice", choices: ["none", "like", "unlike"] },
  {
    name: "cluster_distance",
    group: "Clusters",
    label: "Threshold of the distance",
    kind: "number",
    least: 0,
    most: 2,
    scale: linear(0, 2),
    ticks: [0, 0.5, 1, 1.5, 2],
    plot: "distance",
    tone: "ink",
  },
  {
    name: "cluster_max_span",
    group: "Clusters",
    label: "Longest walk",
    kind: "whole",
    least: 1,
    most: 1e6,
    nullable: "no limit",
    scale: logarithmic(1, 256),
    ticks: [1, 4, 16, 64, 256],
  },
  { name: "standard_answers", group: "When training", label: "Train on standard answers", kind: "flag" },
  { name: "repair", group: "When training", label: "Repair incorrect outputs", kind: "flag" },
  {
    name: "turning_ratio",
    group: "When training",
    label: "Turning point of repairs",
    kind: "number",
    least: 0,
    most: 1,
    open: true,
    scale: logarithmic(0.001, 1),
    ticks: [0.001, 0.01, 0.1, 1],
  },
  { name: "references", group: "When training", label: "When answers are scored", kind: "choice", choices: ["once", "epoch", "live"] },
];
const BINS = 56,
  STEPS = 1000;

// One control: `element`, and `show(value)` to move it. `changed(value, done)` is called while it moves, and when it rests.
export function makeControl(field, changed) {
  return { flag: makeFlag, choice: makeChoice, number: makeSlider, whole: makeSlider }[field.kind](field, changed);
}

function makeFlag(field, changed) {
  const box = h("input", { type: "checkbox", name: field.name, onchange: () => changed(box.checked, true) });
  const element = h("div", { class: "control flag" }, h("label", {}, box, h("span", {}, field.label)));
  return {
    element,
    show: (value) => {
      box.checked = value;
    },
  };
}

function makeChoice(field, changed) {
  const radios = field.choices.map((choice) =>
    h("input", { type: "radio", name: field.name, value: choice, onchange: () => changed(choice, true) }),
  );
  const element = h(
    "fieldset",
    { class: "control choice" },
    h("legend", {}, field.label),
    h("div", { class: "segments" }, ...radios.map((radio) => h("label", {}, radio, h("span", {}, radio.value)))),
  );
  return {
    element,
    show: (value) => {
      for (const radio of radios) radio.checked = radio.value === value;
    },
  };
}

function makeSlider(field, changed) {
  const { scale } = field,
    id = `option-${field.name}`;
  const range = h("input", { type: "range", min: 0, max: STEPS, step: 1, "aria-label": field.label });
  const box = h("input", { type: "text", inputmode: "decimal", id, name: field.name, size: 7, autocomplete: "off" });
  const unlimited = field.nullable ? h("input", { type: "checkbox" }) : null;
  const histogram = field.plot ? makeHistogram(field.tone) : null;
  const where = (value) => Math.min(1, Math.max(0, scale.place(value)));
  const show = (value) => {
    if (unlimited) unlimited.checked = value === null;
    const off = value === null;
    range.disabled = box.disabled = off;
    if (off) box.value = "";
    else {
      range.value = Math.round(STEPS * where(value));
      if (document.activeElement !== box) box.value = String(value);
      box.removeAttribute("aria-invalid");
    }
    range.setAttribute("aria-valuetext", off ? field.nullable : field.kind === "whole" ? `${value} tokens` : String(value));
    histogram?.mark(off ? null : where(value));
  };
  const slid = (done) => changed(fromPlace(field, Number(range.value) / STEPS), done);
  range.addEventListener("input", () => slid(false));
  range.addEventListener("change", () => slid(true));
  box.addEventListener("input", () => {
    const value = box.value.trim() === "" ? NaN : Number(box.value);
    if (allowed(field, value)) {
      box.removeAttribute("aria-invalid");
      changed(value, true);
    } else box.setAttribute("aria-invalid", "true");
  });
  unlimited?.addEventListener("change", () => changed(unlimited.checked ? null : 32, true));
  const ticks = h(
    "div",
    { class: "ticks", "aria-hidden": "true" },
    ...field.ticks.map((tick) => {
      const label = h(
        "span",
        {},
        tick >= 1e4 || (tick < 0.001 && tick > 0) ? tick.toExponential(0).replace("e+", "e").replace("-", "−") : String(tick),
      );
      label.style.left = `${100 * where(tick)}%`;
      return label;
    }),
  );
  const element = h(
    "div",
    { class: "control slider" },
    h(
      "div",
      { class: "head" },
      h("label", { for: id }, field.label),
      unlimited && h("label", { class: "nolimit" }, unlimited, field.nullable),
      box,
    ),
    h("div", { class: "track" }, histogram?.element ?? null, range, ticks),
  );
  return { element, show, plot: (values) => histogram?.draw(bins(values, scale)) };
}

export function allowed(field, value) {
  const inside = field.open ? value > field.least && value < field.most : value >= field.least && value <= field.most;
  return Number.isFinite(value) && inside && (field.kind !== "whole" || Number.isInteger(value));
}

// Values that a slider stops at are short ones: as many digits as its steps need, and inside what the field allows.
function fromPlace(field, place) {
  const raw = field.scale.value(place);
  const value = field.kind === "whole" ? Math.round(raw) : Number(field.scale.low > 0 ? raw.toPrecision(3) : raw.toFixed(3));
  return field.open ? Math.min(field.most - 0.001, Math.max(field.least + 0.001, value)) : value;
}

function bins(values, scale) {
  const counts = new Float64Array(BINS);
  for (const value of values) {
    if (!Number.isNaN(value)) counts[Math.min(BINS - 1, Math.max(0, Math.floor(BINS * scale.place(value))))]++;
  }
  return counts;
}

// Bars whose height goes with the root of their count, so that rare values are seen; those that pass the threshold have its colour.
export function makeHistogram(tone) {
  const bars = Array.from({ length: BINS }, (_, n) => svg("rect", { x: n + 0.06, width: 0.88, y: 1, height: 0 }));
  const line = svg("line", { y1: 0, y2: 1, class: "threshold" });
  const other = svg("path", { class: "other" });
  const element = svg(
    "svg",
    { class: `histogram ${tone}`, viewBox: `0 0 ${BINS} 1`, preserveAspectRatio: "none", "aria-hidden": "true" },
    ...bars,
    other,
    line,
  );
  let at = null;
  const colour = () => bars.forEach((bar, n) => bar.setAttribute("class", at !== null && (n + 0.5) / BINS > at ? "passes" : ""));
  return {
    element,
    draw(counts, others = null) {
      const most = Math.max(1, ...counts, ...(others ?? []));
      bars.forEach((bar, n) => {
        const height = Math.sqrt(counts[n] / most);
        bar.setAttribute("y", 1 - height);
        bar.setAttribute("height", height);
      });
      other.setAttribute("d", others ? outline(others, most) : "");
    },
    mark(place) {
      at = place;
      line.setAttribute("visibility", place === null ? "hidden" : "visible");
      if (place !== null) {
        line.setAttribute("x1", BINS * place);
        line.setAttribute("x2", BINS * place);
      }
      colour();
    },
  };
}

function outline(counts, most) {
  return [...counts].map((n, bin) => `${bin ? "L" : "M"}${bin} ${1 - Math.sqrt(n / most)}H${bin + 1}`).join("");
}

// A distribution without a slider: how `values` lie between 0 and their largest, and `others` in outline.
export function makeDistribution(label) {
  const histogram = makeHistogram("plain"),
    high = h("span", { class: "high" });
  const element = h(
    "figure",
    { class: "distribution" },
    h("figcaption", {}, label),
    histogram.element,
    h("div", { class: "ends", "aria-hidden": "true" }, h("span", {}, "0"), high),
  );
  histogram.mark(null);
  return {
    element,
    draw(values, others) {
      const finite = [...values, ...others].filter(Number.isFinite);
      const scale = linear(0, finite.reduce((a, b) => Math.max(a, b), 0) || 1);
      setText(high, scale.high.toPrecision(2));
      histogram.draw(bins(values.filter(Number.isFinite), scale), bins(others.filter(Number.isFinite), scale));
    },
  };
}
