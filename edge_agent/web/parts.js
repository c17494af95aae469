// What several pages are made of: marks of state, bars, tables, questions to the reader.

import { h, setText, svg, visible } from "./dom.js";
import { bytes } from "./units.js";

const GOOD = new Set(["ready", "succeeded", "completed"]),
  BAD = new Set(["lost", "failed", "rejected", "timed_out", "expired", "aborted"]),
  BUSY = new Set(["accepted", "staging", "running", "finalizing", "draining"]);

// A state as a mark: its word, and a shape that says the same without colour.
export function mark(state, note = "") {
  const kind = GOOD.has(state) ? "good" : BAD.has(state) ? "bad" : BUSY.has(state) ? "busy" : "rest";
  return h("span", { class: `mark ${kind}` }, h("i", { "aria-hidden": "true" }, SHAPES[kind]), `${state.replace("_", " ")}${note}`);
}

const SHAPES = { good: "●", bad: "▲", busy: "◐", rest: "○" };

// The state of a job in one word: its outcome where it has ended.
export function jobMark(job) {
  if (job.outcome) return mark(job.outcome, job.outcome === "succeeded" && job.result?.accepted === false ? ", not accepted" : "");
  return mark(job.lost ? "lost" : job.phase, job.lost ? ` (${job.phase})` : job.cancel ? ", canceling" : "");
}

// A bar of used bytes within a whole, with a mark at a third number.
export function memoryBar(used, whole, { label, planned = null, scale = whole } = {}) {
  const at = (value) => `${Math.min(100, (100 * value) / Math.max(scale, 1)).toFixed(2)}%`;
  const text = `${label ? `${label}: ` : ""}${used === null ? "nothing" : bytes(used)} of ${bytes(whole)}${planned === null ? "" : `, planned ${bytes(planned)}`}`;
  return svg(
    "svg",
    { class: `bar-of${used !== null && used > whole ? " over" : ""}`, role: "img", "aria-label": text },
    svg("rect", { class: "rail", width: "100%", height: "100%", rx: 3 }),
    planned === null ? null : svg("rect", { class: "planned", width: at(planned), height: "100%", rx: 3 }),
    svg("rect", { class: "used", y: planned === null ? 0 : "25%", width: at(used ?? 0), height: planned === null ? "100%" : "50%", rx: 2 }),
    scale > whole ? svg("line", { class: "bound", x1: at(whole), x2: at(whole), y1: 0, y2: "100%" }) : null,
  );
}

// Names and values beside each other; what is null is left out.
export function facts(...pairs) {
  return h(
    "dl",
    { class: "facts" },
    ...pairs
      .filter((pair) => pair !== null && pair[1] !== null)
      .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}

export function notice(text, kind = "") {
  return h("p", { class: `notice ${kind}`, role: kind === "wrong" ? "alert" : "status" }, written(text));
}

// A longer text of somebody else, with its lines.
export function written(text) {
  return text ? visible(text).replaceAll("↵\n", "\n") : "";
}

// A table whose rows become cards where there is no room. Columns are pairs of a title and a class; the roles are said because a table that
// is not laid out as one loses them.
export function table(label, columns, rows = []) {
  const body = h("tbody", { role: "rowgroup" }, ...rows);
  const heads = columns.map(([title, kind]) => h("th", { role: "columnheader", scope: "col", class: kind }, title));
  const element = h(
    "table",
    { class: "rows", role: "table", "aria-label": label },
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, ...heads)),
    body,
  );
  return { element, body };
}

// One row of such a table; every cell knows the title of its column.
export function row(columns, cells, attributes = {}) {
  return h(
    "tr",
    { role: "row", ...attributes },
    ...cells.map((cell, n) =>
      h(
        "td",
        { role: "cell", class: columns[n][1], "data-title": columns[n][0] },
        ...[cell].flat().filter((part) => part !== null && part !== ""),
      ),
    ),
  );
}

export function section(title, ...children) {
  return h("section", { class: "sheet" }, h("h2", {}, title), ...children);
}

// Asks the reader yes or no; resolves to whether it was yes.
export function confirmed(text, yes) {
  return new Promise((done) => {
    let answer = false;
    const dialog = h(
      "dialog",
      { "aria-label": yes, onclose: () => (dialog.remove(), done(answer)) },
      h("p", {}, text),
      h(
        "div",
        { class: "buttons" },
        h("button", { autofocus: true, onclick: () => dialog.close() }, "Leave it"),
        h("button", { class: "danger", onclick: () => ((answer = true), dialog.close()) }, yes),
      ),
    );
    document.body.append(dialog);
    dialog.showModal();
  });
}

// Runs what a button does: once at a time, and what fails is said beside it.
export async function doing(button, told, run) {
  button.disabled = true;
  setText(told, "");
  try {
    await run();
  } catch (error) {
    setText(told, visible(error.message));
  } finally {
    button.disabled = false;
  }
}

// Draws at most once a frame, however often it is asked to.
export function framed(draw) {
  let waiting = 0;
  return () => {
    waiting ||= requestAnimationFrame(() => {
      waiting = 0;
      draw();
    });
  };
}
