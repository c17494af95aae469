// For whom a job of the form is: one node, the best of some, or all of some, one after the other.

import { count, h, plural, visible } from "./dom.js";
import { notice, row, section, table } from "./parts.js";

const KINDS = { node: "One node", best: "The best node", many: "Many nodes, a rollout" };
const NODES = [
  ["Node", "name"],
  ["", "text"],
];
const MOST_SHOWN = 100;

// `field(label, control, hint)` makes a field of the form; `changed` hears of every change.
export function makeTarget(field, changed) {
  const input = (placeholder, mode = "text") =>
    h("input", { placeholder, inputmode: mode, autocomplete: "off", spellcheck: "false", oninput: changed });
  const kind = h(
    "select",
    { onchange: changed },
    ...Object.entries(KINDS).map(([value, label]) => h("option", { value }, label)),
  );
  const labels = input("site=north, kind=orin"),
    rate = input("60", "numeric"),
    above = input("never", "decimal"),
    ended = input("10", "numeric");
  const of = (control, label, kinds, hint = null) => ({ kinds, element: field(label, control, hint ? h("small", {}, hint) : null) });
  const others = [
    of(labels, "Nodes with the labels", ["best", "many"], "of those that have the model and lend the budget; none: all"),
    of(rate, "Jobs per minute", ["many"]),
    of(above, "Stop above this share of failures, in %", ["many"]),
    of(ended, "Once so many have ended", ["many"]),
  ];
  const number = (control, fallback) => {
    const text = control.value.trim(),
      value = text === "" ? fallback : Number(text);
    control.setAttribute("aria-invalid", String(value !== null && !Number.isFinite(value)));
    if (value !== null && !Number.isFinite(value)) throw new Error(`${text} is no number`);
    return value;
  };
  function selector() {
    const found = new Map();
    for (const pair of labels.value.split(",").map((text) => text.trim()))
      if (pair) {
        const [, name, value] = /^([^=\s]+)\s*=\s*(.+)$/.exec(pair) ?? [];
        labels.setAttribute("aria-invalid", String(name === undefined));
        if (name === undefined) throw new Error(`${pair} is no label; write it like site=north`);
        if (found.has(name)) throw new Error(`${name} has two values; a node has one`);
        found.set(name, value);
      }
    labels.removeAttribute("aria-invalid");
    return { labels: Object.fromEntries(found) };
  }
  return {
    kind,
    elements: others.map(({ element }) => element),
    // Shows the fields that this kind has.
    arrange() {
      for (const { kinds, element } of others) element.hidden = !kinds.includes(kind.value);
    },
    selector,
    // The document of a rollout of a job. Throws where a field cannot be read.
    rollout(job, priority) {
      const share = number(above, null),
        abort = share === null ? null : { threshold: share / 100, minimum_ended: number(ended, 10) };
      return { job, priority, selector: selector(), rate: { maximum_per_minute: number(rate, 60) }, abort };
    },
  };
}

// Which nodes a rollout would have, and why not others.
export function choiceSection({ choice }) {
  const lines = (candidates) => candidates.slice(0, MOST_SHOWN).map(({ node, why }) => row(NODES, [visible(node), visible(why)]));
  const part = (title, candidates) =>
    candidates.length
      ? [
          h("h3", {}, `${title}${candidates.length > MOST_SHOWN ? `, the first ${count(MOST_SHOWN)}` : ""}`),
          table(title, NODES, lines(candidates)).element,
        ]
      : [];
  return section(
    "Rollout",
    notice(`${plural(choice.chosen.length, "node")} would get this job.`, choice.chosen.length ? "" : "wrong"),
    ...part("In this order", choice.chosen),
    ...part("Not", choice.others),
  );
}
