// The list of jobs, the newest first, as they go on; some of them can be chosen to compare.

import { listen, read } from "./api.js";
import { count, h, plural, setText, visible } from "./dom.js";
import { framed, jobMark, notice, row, table } from "./parts.js";
import { bytes, moment, seconds, share } from "./units.js";

const COLUMNS = [
  ["Job", "name"],
  ["State", "state"],
  ["Node", "device"],
  ["Model and method", "device"],
  ["Accuracy", "number"],
  ["Time", "number"],
  ["Memory", "number"],
];
const PHASES = ["created", "offered", "accepted", "staging", "ready", "running", "paused", "finalizing", "ended"];
const OUTCOMES = ["succeeded", "failed", "rejected", "canceled", "timed_out", "expired"];
const AT_ONCE = 100;

export function jobsPage(place, session, { query }) {
  const filter = { phase: query.get("phase") ?? "", outcome: query.get("outcome") ?? "", node: query.get("node") ?? "" };
  const { element, body } = table("Jobs", COLUMNS);
  const told = h("p", { class: "hint", role: "status" }),
    more = h("button", { hidden: true, onclick: () => load(false) }, "Show more"),
    compare = h("a", { class: "button", hidden: true });
  const jobs = new Map(),
    chosen = new Set(),
    rows = new Map(),
    changed = new Set();
  let next = null;

  const choice = (name, values) =>
    h(
      "select",
      { "aria-label": name, onchange: (event) => refine(name, event.target.value) },
      h("option", { value: "" }, `any ${name}`),
      ...values.map((value) => h("option", { value, selected: filter[name] === value }, value.replace("_", " "))),
    );
  const node = h("input", {
    type: "search",
    value: filter.node,
    placeholder: "Node  /",
    "aria-label": "Jobs of the node",
    onchange: (event) => refine("node", event.target.value.trim()),
  });
  place.append(
    h("h1", {}, "Jobs"),
    h("div", { class: "tools" }, node, choice("phase", PHASES), choice("outcome", OUTCOMES), compare),
    told,
    element,
    more,
  );

  function refine(name, value) {
    filter[name] = value;
    const given = new URLSearchParams(Object.entries(filter).filter(([, text]) => text !== ""));
    history.replaceState(null, "", `#/jobs${given.size ? `?${given}` : ""}`);
    load(true);
  }
  async function load(anew) {
    const given = new URLSearchParams({ limit: AT_ONCE });
    for (const [name, value] of Object.entries(filter)) if (value !== "") given.set(name, value);
    if (!anew && next !== null) given.set("after", next);
    try {
      const page = await read(`/jobs?${given}`);
      if (anew) jobs.clear();
      for (const job of page.items) jobs.set(job.id, job);
      next = page.next;
      arrange();
    } catch (error) {
      told.replaceChildren(notice(error.message, "wrong"));
    }
  }
  const wanted = (job) =>
    (filter.phase === "" || job.phase === filter.phase) &&
    (filter.outcome === "" || job.outcome === filter.outcome) &&
    (filter.node === "" || job.node === filter.node);
  function arrange() {
    const sorted = [...jobs.values()].sort((a, b) => b.created - a.created || (a.id < b.id ? 1 : -1));
    rows.clear();
    for (const job of sorted) rows.set(job.id, jobRow(job));
    body.replaceChildren(...rows.values());
    element.hidden = !rows.size;
    more.hidden = next === null;
    setText(told, rows.size ? `${next === null ? "" : "The newest "}${plural(rows.size, "job")}` : "There is no such job.");
  }
  function jobRow(job) {
    const box = h("input", {
      type: "checkbox",
      checked: chosen.has(job.id),
      "aria-label": `Compare job ${job.id}`,
      onchange: () => choose(job.id, box.checked),
    });
    const { accuracy, seconds: time, peak_bytes: peak } = job.result ?? {};
    return row(COLUMNS, [
      h("span", { class: "pick" }, box, h("span", {}, jobLink(job.id), h("small", {}, moment(job.created)))),
      jobMark(job),
      h("a", { href: `#/nodes/${encodeURIComponent(job.node)}` }, visible(job.node)),
      [visible(job.order.job.model), h("small", {}, job.order.job.method.name)],
      accuracy?.after ? [share(accuracy.after.value), h("small", {}, `from ${share(accuracy.before.value)}`)] : "–",
      seconds(time),
      bytes(peak),
    ]);
  }
  function choose(id, whether) {
    if (whether) chosen.add(id);
    else chosen.delete(id);
    compare.hidden = chosen.size < 2;
    compare.href = `#/compare/${[...chosen].join("/")}`;
    setText(compare, `Compare ${count(chosen.size)} jobs`);
  }
  const later = framed(() => {
    for (const job of changed) {
      const known = rows.get(job.id);
      if (known?.contains(document.activeElement) || (known === undefined && !wanted(job))) continue;
      jobs.set(job.id, job);
      if (known === undefined) {
        arrange();
        continue;
      }
      const made = jobRow(job);
      known.replaceWith(made);
      rows.set(job.id, made);
    }
    changed.clear();
  });
  let started = false;
  return listen(
    "/events",
    (kind, data) => {
      if (kind === "start" && (!started || data.lost)) {
        started = true;
        load(true);
      } else if (kind === "job") {
        changed.add(data);
        later();
      }
    },
    session.standing,
  );
}

export function jobLink(id) {
  return h("a", { class: "to-job", href: `#/jobs/${encodeURIComponent(id)}` }, shortId(id));
}

// Enough of an id to tell jobs apart: when it was made, and the end.
export function shortId(id) {
  return id.length > 16 ? `${id.slice(0, 10)}…${id.slice(-4)}` : id;
}
