// What a job has come to, from its result.json: names of stages and measures are those of docs/report.md.

import { makeIntervals, makeLine } from "./chart.js";
import { count, h, number, plural, visible } from "./dom.js";
import { facts, memoryBar, notice, row, section, table, written } from "./parts.js";
import { bytes, joules, points, rate, seconds, share } from "./units.js";

const STAGES = [
  ["Stage", "name"],
  ["Time", "state number"],
  ["Tokens", "number"],
  ["Tokens/s", "number"],
  ["Energy", "number"],
  ["Measured peak, over what was planned", "memory"],
];

// Stages of a run: rows of result.json, or of what a node has told so far, of which nothing was planned that is known here.
export function stagesSection(stages, budget, running = null) {
  if (!stages.length && running === null) return null;
  const scale = Math.max(budget, ...stages.map((stage) => Math.max(stage.peak_bytes, stage.planned_bytes ?? 0)));
  const rows = stages.map((stage) =>
    row(STAGES, [
      [stage.stage, stage.resumed ? h("small", {}, "resumed") : null],
      seconds(stage.seconds),
      stage.tokens ? count(stage.tokens) : "",
      stage.tokens && stage.seconds ? rate(stage.tokens / stage.seconds) : "",
      stage.energy_j ? joules(stage.energy_j) : "",
      [
        memoryBar(stage.peak_bytes, budget, { label: `${stage.stage}, measured peak`, planned: stage.planned_bytes ?? null, scale }),
        h("small", {}, bytes(stage.peak_bytes), stage.planned_bytes ? ` of ${bytes(stage.planned_bytes)} planned` : ""),
      ],
    ]),
  );
  if (running !== null) rows.push(row(STAGES, [running, "running", "", "", "", ""]));
  return section(
    "Stages",
    table("Stages", STAGES, rows).element,
    h("p", { class: "hint key" }, `The budget is ${bytes(budget)}${scale > budget ? ", the line across the bars" : ", the whole width"}.`),
  );
}

// What was measured before and after, or why nothing was.
export function accuracySection(measured, accepted, acceptance) {
  if (!measured) return null;
  const parts = [];
  const held = (name, at) => ({
    name,
    ...at,
    text: `${share(at.value)} [${(100 * at.low).toFixed(1)}, ${(100 * at.high).toFixed(1)}]`,
  });
  const whole = { show: (x) => `${Math.round(100 * x)} %` };
  if (measured.before && measured.after) {
    parts.push(makeIntervals("Accuracy", [held("before", measured.before), held("after", measured.after)], whole));
    parts.push(h("p", { class: "hint" }, `Correct answers to ${plural(measured.after.n, "held-out question")}, with intervals of 95 %.`));
  }
  if (measured.paired) {
    const { difference, low, high, gained, lost, p_value: p } = measured.paired;
    const text = `${points(difference)} points [${points(low)}, ${points(high)}] on the same questions: ${count(gained)} gained, ${count(lost)} lost, p ${p < 0.001 ? "< 0.001" : `= ${number(p)}`}.`;
    parts.push(h("p", {}, text));
  }
  for (const [name, given] of [
    ["Pass@k before", measured.pass_before],
    ["Pass@k after", measured.pass_after],
  ])
    if (given?.length)
      parts.push(
        h("h3", {}, name),
        makeIntervals(
          name,
          given.map((at) => held(`k = ${at.k}`, at)),
          whole,
        ),
      );
  if (measured.text_before && measured.text_after) parts.push(freeText(measured));
  const cut = [measured.cut_off_before, measured.cut_off_after];
  if (cut[0] || cut[1])
    parts.push(h("p", { class: "hint" }, `Not ended at the longest output allowed: ${count(cut[0])} before, ${count(cut[1])} after.`));
  if (measured.reason) parts.push(h("p", { class: "hint" }, visible(measured.reason)));
  if (acceptance) parts.push(notice(`${accepted ? "Accepted" : "Not accepted"}: ${acceptance}`, accepted ? "" : "wrong"));
  return section("Accuracy", ...parts);
}

function freeText({ text_before: before, text_after: after, text_difference: difference }) {
  const columns = [
    ["", "name"],
    ["Log-probability per token", "number"],
    ["chrF", "number"],
  ];
  const line = (name, at) =>
    row(columns, [
      name,
      `${number(at.value ?? at.logp)} [${number(at.low)}, ${number(at.high)}]`,
      at.chrf === undefined ? "–" : number(at.chrf, 1),
    ]);
  const rows = [line("before", before), line("after", after), ...(difference ? [line("difference", difference)] : [])];
  return table("Free text", columns, rows).element;
}

export function examplesSection(examples) {
  if (!examples?.length) return null;
  const verdict = (correct) => (correct === null ? "" : correct ? " · correct" : " · wrong");
  const text = (title, body, kind = "") => h("div", { class: kind }, h("h3", {}, title), h("p", { class: "written" }, written(body)));
  return section(
    "Example answers",
    ...examples.map((example) =>
      h(
        "article",
        { class: "example" },
        text("Question", example.question),
        text("Reference", example.answer),
        text(`Before${verdict(example.correct_before)}`, example.before, example.correct_before === false ? "bad" : "fine"),
        text(`After${verdict(example.correct_after)}`, example.after, example.correct_after === false ? "bad" : "fine"),
      ),
    ),
  );
}

// What it cost and how it was run.
export function costSection(result) {
  const { energy, plan, data, model, adapter } = result;
  return section(
    "Run",
    facts(
      ["Time", seconds(result.seconds)],
      ["Largest peak", `${bytes(result.peak_bytes)} of ${bytes(result.budget_bytes)}`],
      [
        "Energy",
        energy.total_j === null
          ? h("span", {}, "– ", h("small", {}, written(energy.reason)))
          : `${joules(energy.total_j)} (${energy.source})`,
      ],
      ["Training", result.tokens_per_s === null ? null : `${rate(result.tokens_per_s)} tokens/s`],
      [
        "Updates",
        result.kept_update && result.kept_update !== result.updates
          ? `${count(result.updates)}, kept that of ${count(result.kept_update)}`
          : count(result.updates),
      ],
      ["Device", visible(result.device)],
      ["Settings", plan ? visible(plan.rung) : null],
      ["Micro-batch", plan ? count(plan.micro_batch) : null],
      ["4-bit kernel", result.kernel],
      ["Questions", data ? `${count(data.questions)} trained on, ${count(data.held_out)} held out` : null],
      ["Outputs", data ? `${count(data.correct_outputs)} correct, ${count(data.incorrect_outputs)} wrong` : null],
      ["Repaired", data?.repairs.wrong ? `${count(data.repairs.repaired)} of ${count(data.repairs.wrong)}` : null],
      ["Answers trained on", data ? count(data.samples) : null],
      ["Flagged share", data ? share(data.flagged_share) : null],
      ["Adapter", adapter ? `${count(adapter.parameters)} parameters, ${bytes(adapter.size_bytes)}` : null],
      ["Context", model ? `${count(model.context_tokens)} tokens` : null],
    ),
    ...result.misses.map((miss) =>
      notice(`${miss.stage} lacked memory under "${miss.rung}": ${miss.text}. The run went on with smaller settings.`, "wrong"),
    ),
  );
}

// The loss of every update, and with early stopping that on the development records after every epoch.
export function lossPoints(losses) {
  return losses.map((loss, n) => ({ x: n + 1, y: loss, note: `update ${count(n + 1)}` }));
}

export function developmentChart(losses) {
  if (!losses?.length) return null;
  const line = makeLine({ title: "Loss on development records", x: "epochs", whole: true, showX: count, showY: (y) => number(y) });
  line.set(losses.map((loss, n) => ({ x: n + 1, y: loss, note: `epoch ${n + 1}` })));
  return line.element;
}
