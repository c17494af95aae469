// The options, what they come to over all answers, and what they are compared with.

import { FIELDS, makeControl, makeDistribution } from "./options.js";
import { count, h, number, percent, plural, setText } from "./dom.js";
import { flaggedShare } from "./degree.js";

const PRESETS = { corrected: "Corrected", released: "Released", job: "This job" };

export function makeOptions(view, actions) {
  const { table, state, now, then, choices } = view;
  const controls = new Map(FIELDS.map((field) => [field.name, makeControl(field, (value, done) => actions.set(field.name, value, done))]));
  const groups = Map.groupBy(FIELDS, (field) => field.group);
  const figures = ["flagged", "loss", "differ"].map(() => ({ value: h("dd", {}), note: h("dd", { class: "note" }) }));
  const presets = Object.entries(PRESETS).map(([name, label]) =>
    h("button", { "data-preset": name, onclick: () => actions.preset(name) }, label),
  );
  const compared = h(
    "select",
    { "aria-label": "Compare with", onchange: () => actions.compare(compared.value) },
    ...Object.entries(PRESETS).map(([name, label]) => h("option", { value: name, selected: name === state.compared }, label.toLowerCase())),
  );
  const losses = makeDistribution("Loss of the answers; the line: as compared");
  const notes = {
    Clusters: h("p", { class: "hint" }),
    "When training": h("p", { class: "hint" }, "What has no effect on this page is for the next run."),
  };
  const element = h(
    "aside",
    { class: "panel options", "aria-label": "Options" },
    h(
      "div",
      { class: "totals" },
      h(
        "dl",
        {},
        ...["Flagged of incorrect", "Mean loss", "Weights that differ"].map((label, n) =>
          h("div", {}, h("dt", {}, label), figures[n].value, figures[n].note),
        ),
      ),
    ),
    h(
      "div",
      { class: "presets" },
      h("div", { class: "buttons", role: "group", "aria-label": "Presets" }, ...presets),
      h("label", { class: "compare" }, "compare with", compared),
    ),
    ...[...groups].map(([group, fields]) =>
      h(
        "section",
        { class: "group" },
        h("h3", {}, group),
        notes[group] ?? null,
        ...fields.map((field) => controls.get(field.name).element),
      ),
    ),
    h("section", { class: "group" }, h("h3", {}, "All answers"), losses.element),
    h("div", { class: "use" }, h("button", { class: "primary", onclick: actions.use }, "Use these options")),
  );

  function plot() {
    for (const field of FIELDS)
      if (field.plot && field.plot !== "flagged") controls.get(field.name).plot(distribution(table, state.step, field.plot));
  }

  function update() {
    const records = table.records.map((_, r) => r),
      own = records.filter(view.trained);
    const others = records.filter((r) => choices[state.compared].standard_answers || !table.records[r].standard_answer);
    const wrong = records.filter((r) => table.incorrect[r]);
    const flagged = (out) => total(wrong, (r) => out.salient[r]) / total(wrong, (r) => table.starts[r + 1] - table.starts[r]);
    const mean = (out, of) => total(of, (r) => out.recordLoss[r]) / of.length;
    const different = total(records, (r) => view.changed[r]);
    const shown = [
      [percent(flagged(now)), `vs ${percent(flagged(then))}`],
      [number(mean(now, own)), `vs ${number(mean(then, others))}`],
      [
        count(different),
        `in ${plural(
          total(records, (r) => (view.changed[r] ? 1 : 0)),
          "answer",
        )}`,
      ],
    ];
    shown.forEach(([value, note], n) => {
      setText(figures[n].value, value);
      setText(figures[n].note, note);
    });
    const partly = total(records, (r) => now.unknown[r]);
    setText(
      notes.Clusters,
      `By the hidden states before training, also for later scores.${partly ? ` ${plural(partly, "answer")}: not all is known.` : ""}`,
    );
    for (const field of FIELDS) {
      const control = controls.get(field.name),
        value = state.options[field.name];
      control.show(value);
      control.element.classList.toggle("differs", value !== choices[state.compared][field.name]);
    }
    controls.get("imitate_flagged_share").plot(wrong.map((r) => flaggedShare(view, r)));
    losses.draw(
      own.map((r) => now.recordLoss[r]),
      others.map((r) => then.recordLoss[r]),
    );
    for (const button of presets)
      button.setAttribute("aria-pressed", String(FIELDS.every(({ name }) => choices[button.dataset.preset][name] === state.options[name])));
  }
  return { element, plot, update };
}

function total(records, of) {
  return records.reduce((sum, r) => sum + of(r), 0);
}

// What a threshold decides on, over all answers that it decides on.
function distribution(table, step, plot) {
  const { base, standard, judge } = table.steps[step],
    values = [];
  table.records.forEach((_, r) => {
    const from = table.starts[r],
      to = table.starts[r + 1],
      wrong = table.incorrect[r];
    if (plot === "distance") {
      values.push(...neighbours(table.products[r], to - from));
      return;
    }
    if ((plot === "standard") === Boolean(wrong)) return;
    for (let t = from; t < to; t++) {
      values.push(
        Math.exp({ standard: standard[t], judge: judge[t], overBase: judge[t] - base[t], overStandard: judge[t] - standard[t] }[plot]),
      );
    }
  });
  return values;
}

function neighbours(products, length) {
  if (products === null || products.width < 2) return [];
  const { values, width } = products;
  return Array.from(
    { length: length - 1 },
    (_, n) => 1 - values[(n + 1) * width + 1] / Math.sqrt(values[n * width] * values[(n + 1) * width]),
  );
}
