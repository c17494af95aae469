// What comes of a form as it is, asked while it is filled in: the plan of its job on a node, or whatever else the form wants to know.

import { send } from "./api.js";
import { count, h, visible } from "./dom.js";
import { memoryBar, notice, row, section, table } from "./parts.js";
import { bytes } from "./units.js";

const REST_MS = 600; // without a change, before it is asked
const STAGES = [
  ["Stage", "name"],
  ["Planned", "memory"],
];

// Fills `slot` with what comes of what `wanted` returns: the title of a part, the path and document of a request, and `show`, which makes
// the part of its answer; null where there is nothing to ask for yet.
export function makePlanner(slot, wanted) {
  let waiting = 0,
    asked = "",
    latest = "";
  async function now() {
    let request = null;
    try {
      request = wanted();
    } catch {
      // the document is not whole yet: the form says so
    }
    const text = JSON.stringify(request);
    if (text === asked) return;
    asked = latest = text;
    if (request === null) return slot.replaceChildren();
    const { title, path, document, show } = request;
    let shown;
    try {
      shown = show(await send("POST", path, document));
    } catch (error) {
      shown = section(title, notice(error.message, "wrong"));
      if (text === asked) asked = ""; // the next change asks again, though it leads to the same
    }
    if (text === latest) slot.replaceChildren(shown);
  }
  return {
    ask() {
      clearTimeout(waiting);
      waiting = setTimeout(now, REST_MS);
    },
  };
}

export function planSection({ plan, text }, budget) {
  if (plan === null || !plan.stages.length) return section("Plan", notice(text ?? "the node gives no reason", "wrong"));
  const peaks = new Map();
  for (const { stage, resident_bytes: resident, transient_bytes: transient } of plan.stages)
    peaks.set(stage, Math.max(peaks.get(stage) ?? 0, resident + transient));
  const most = Math.max(...peaks.values());
  const rows = [...peaks].map(([stage, peak]) =>
    row(STAGES, [stage, [memoryBar(peak, budget, { label: stage, scale: budget }), h("small", {}, bytes(peak))]]),
  );
  return section(
    "Plan",
    h(
      "p",
      { class: "written" },
      `${most <= budget ? "It should fit" : "It would not fit"}: about ${bytes(most)} of ${bytes(budget)}, with the settings “${visible(plan.rung)}”, micro-batch ${count(plan.micro_batch)}.`,
    ),
    text ? notice(text, "wrong") : null,
    table("Plan", STAGES, rows).element,
    h(
      "p",
      { class: "hint" },
      "By arithmetic on the node, of the longest texts of the dataset at three characters a token. It plans exactly when it has the job, before it loads anything.",
    ),
  );
}
