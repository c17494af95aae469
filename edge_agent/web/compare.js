// Jobs beside each other: accuracy with intervals, time, memory, energy, and in what they differ.

import { read } from "./api.js";
import { makeIntervals } from "./chart.js";
import { count, h, visible } from "./dom.js";
import { jobLink, shortId } from "./jobs.js";
import { jobMark, notice, row, section, table } from "./parts.js";
import { bytes, joules, points, rate, seconds, share } from "./units.js";

const COLUMNS = [
  ["Job", "name"],
  ["State", "state"],
  ["Before", "number"],
  ["After", "number"],
  ["Difference", "number"],
  ["Time", "number"],
  ["Peak memory", "number"],
  ["Energy", "number"],
  ["Training tokens/s", "number"],
];
const MOST = 20;

export function comparePage(place, session, { parts: ids }) {
  place.append(h("h1", {}, "Compare jobs"));
  const wanted = [...new Set(ids)].slice(0, MOST);
  if (wanted.length < 2) {
    place.append(notice("Choose two jobs or more in the list of jobs."), h("p", {}, h("a", { href: "#/jobs" }, "Jobs")));
    return undefined;
  }
  const waiting = h("p", { class: "hint", role: "status" }, "…");
  place.append(waiting);
  let left = false;
  Promise.all(wanted.map(look)).then((found) => {
    if (left) return;
    waiting.remove();
    for (const { id, problem } of found) if (problem) place.append(notice(`${id}: ${problem}`, "wrong"));
    const known = found.filter(({ problem }) => !problem);
    if (known.length) place.append(...sections(known));
  });
  return () => (left = true);
}

// A job with its report, where there is one.
async function look(id) {
  try {
    const path = `/jobs/${encodeURIComponent(id)}`,
      job = await read(path);
    const has = job.result?.artifacts.some((artifact) => artifact.name === "result.json");
    return { id, job, result: has ? await read(`${path}/artifacts/result.json`) : null };
  } catch (error) {
    return { id, problem: error.message };
  }
}

function sections(found) {
  const measured = ({ job, result }) => result?.accuracy ?? job.result?.accuracy ?? null;
  const rows = found.map((one) => {
    const { job, result } = one,
      accuracy = measured(one);
    const held = (at) => (at ? [share(at.value), h("small", {}, `${(100 * at.low).toFixed(1)} to ${(100 * at.high).toFixed(1)}`)] : "");
    const { difference, low, high } = accuracy?.paired ?? {};
    return row(COLUMNS, [
      [jobLink(job.id), h("small", {}, `${job.order.job.method.name}, ${visible(job.order.job.model)}, ${visible(job.node)}`)],
      jobMark(job),
      held(accuracy?.before),
      held(accuracy?.after),
      difference === undefined ? "" : [points(difference), h("small", {}, `${points(low)} to ${points(high)}`)],
      seconds(result?.seconds ?? job.result?.seconds),
      bytes(result?.peak_bytes ?? job.result?.peak_bytes),
      result?.energy.total_j ? joules(result.energy.total_j) : "",
      result?.tokens_per_s ? rate(result.tokens_per_s) : "",
    ]);
  });
  const name = ({ job }) => `${shortId(job.id)} ${job.order.job.method.name}`;
  const after = found.filter((one) => measured(one)?.after).map((one) => ({ one, at: measured(one).after }));
  const bars = after.map(({ one, at }) => ({ name: name(one), ...at, text: `${share(at.value)} of ${count(at.n)}` }));
  const sets = new Set(
    after.map(({ one }) => one.job.order.job.dataset.evaluation_sha256 ?? `held out of ${one.job.order.job.dataset.sha256}`),
  );
  return [
    bars.length
      ? section(
          "Accuracy after training",
          makeIntervals("Accuracy after training", bars, { show: (x) => `${Math.round(100 * x)} %` }),
          h(
            "p",
            { class: "hint" },
            sets.size > 1
              ? "They were measured on different questions, so their accuracies cannot be held against each other."
              : "Intervals of 95 %, each by itself. Whether two jobs differ, `edge-agent compare` tells best: it pairs the answers to the same questions.",
          ),
        )
      : null,
    section("Measures", table("Measures", COLUMNS, rows).element),
    differences(found),
  ].filter((part) => part !== null);
}

// The fields of the job documents in which not all are equal.
function differences(found) {
  const flat = found.map(({ job }) => new Map([["node", job.node], ...flattened(job.order.job)]));
  const names = [...new Set(flat.flatMap((fields) => [...fields.keys()]))].filter(
    (name) => new Set(flat.map((fields) => fields.get(name))).size > 1,
  );
  if (!names.length) return section("In what they differ", h("p", { class: "hint" }, "Their documents and their node are the same."));
  const columns = [["Field", "name"], ...found.map(({ job }) => [shortId(job.id), "wide"])];
  const rows = names.map((name) => row(columns, [name, ...flat.map((fields) => visible(fields.get(name) ?? "–"))]));
  return section("In what they differ", table("In what they differ", columns, rows).element);
}

function flattened(value, prefix = "") {
  return Object.entries(value).flatMap(([name, part]) =>
    part !== null && typeof part === "object" && !Array.isArray(part)
      ? flattened(part, `${prefix}${name}.`)
      : [[prefix + name, typeof part === "string" ? part : JSON.stringify(part)]],
  );
}
