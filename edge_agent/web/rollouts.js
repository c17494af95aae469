// Rollouts: one job for many nodes, how far it has come, and which nodes it has failed on.

import { listen, read, send } from "./api.js";
import { count, h, plural, setText, svg, visible } from "./dom.js";
import { jobLink, shortId } from "./jobs.js";
import { confirmed, doing, facts, mark, notice, row, section, table } from "./parts.js";
import { bytes, moment, share } from "./units.js";

const COLUMNS = [
  ["Rollout", "name"],
  ["State", "state"],
  ["Model and method", "device"],
  ["Nodes", "memory"],
  ["Next job", "number"],
];
const NODE_COLUMNS = [
  ["Node", "name"],
  ["State", "state"],
  ["Job", "job"],
  ["Said", "text"],
];
const AT_ONCE = 100;
const FAILURES = ["failed", "rejected", "timed_out", "expired"];
// At most one question a second, however many of its jobs change; by then the coordinator has seen whether it has ended.
const PAUSE_MS = 1000;

export function rolloutsPage(place, session) {
  const { element, body } = table("Rollouts", COLUMNS),
    told = h("p", { class: "hint", role: "status" }),
    more = h("button", { hidden: true, onclick: () => load(false) }, "Show more");
  const rollouts = new Map();
  let next = null;
  place.append(h("h1", {}, "Rollouts"), told, element, more);

  async function load(anew) {
    const after = anew || next === null ? "" : `&after=${encodeURIComponent(next)}`;
    try {
      const page = await read(`/rollouts?limit=${AT_ONCE}${after}`);
      if (anew) rollouts.clear();
      for (const rollout of page.items) rollouts.set(rollout.id, rollout);
      next = page.next;
      arrange();
    } catch (error) {
      told.replaceChildren(notice(error.message, "wrong"));
    }
  }
  function arrange() {
    body.replaceChildren(...[...rollouts.values()].map(rolloutRow));
    element.hidden = !rollouts.size;
    more.hidden = next === null;
    if (rollouts.size) setText(told, plural(rollouts.size, "rollout"));
    else told.replaceChildren("There is none yet. ", h("code", {}, "edge-agent rollout submit"), " gives one job to many nodes.");
  }
  const refresh = paced(async (changed) => {
    if (changed.some((id) => !rollouts.has(id))) return load(true);
    for (const id of changed) rollouts.set(id, await read(`/rollouts/${encodeURIComponent(id)}`));
    arrange();
  });
  return heard(session, () => load(true), refresh);
}

function rolloutRow(rollout) {
  const { job } = rollout.plan;
  return row(COLUMNS, [
    [
      h("a", { class: "to-job", href: `#/rollouts/${encodeURIComponent(rollout.id)}` }, shortId(rollout.id)),
      h("small", {}, moment(rollout.created)),
    ],
    mark(rollout.state),
    [visible(job.model), h("small", {}, job.method.name)],
    [countsBar(rollout), h("small", {}, sayCounts(rollout.counts))],
    rollout.next === null ? "–" : moment(rollout.next),
  ]);
}

export function rolloutPage(place, session, { parts: [id] }) {
  const path = `/rollouts/${encodeURIComponent(id)}`;
  const { element, body } = table("Nodes of the rollout", NODE_COLUMNS),
    told = h("p", { class: "told", role: "alert" }),
    head = h("div", { class: "slot" }),
    document_ = h("div", { class: "slot" }),
    more = h("button", { hidden: true, onclick: () => doing(more, told, () => loadNodes(false)) }, "Show more");
  let next = null,
    shown = [];
  place.append(h("h1", {}, "Rollout ", h("span", { class: "id" }, visible(id))), told, head, section("Nodes", element, more), document_);

  async function load() {
    const rollout = await read(path);
    head.replaceChildren(headSection(rollout));
    if (!document_.firstChild) document_.append(documentSection(rollout.plan));
    await loadNodes(true);
  }
  async function loadNodes(anew) {
    const limit = anew ? Math.min(1000, Math.max(AT_ONCE, shown.length)) : AT_ONCE;
    const page = await read(`${path}/nodes?limit=${limit}${anew || next === null ? "" : `&after=${encodeURIComponent(next)}`}`);
    shown = anew ? page.items : [...shown, ...page.items];
    next = page.next;
    body.replaceChildren(...shown.map(nodeRow));
    more.hidden = next === null;
  }
  function headSection(rollout) {
    const { plan, counts, nodes } = rollout,
      open = counts.waiting + counts.open > 0;
    const button = (label, text, force) =>
      h(
        "button",
        {
          class: "danger",
          onclick: async (event) => {
            if (!(await confirmed(text, label))) return;
            await doing(event.target, told, async () => {
              await send("POST", `${path}/cancel${force ? "?force=true" : ""}`);
              await load();
            });
          },
        },
        label,
      );
    const may = session.may("submit") && open;
    return h(
      "section",
      { class: "sheet" },
      h(
        "div",
        { class: "headline" },
        mark(rollout.state),
        h("span", {}, sayCounts(counts)),
        h(
          "div",
          { class: "buttons" },
          may && rollout.state === "running"
            ? button("Stop", "No more jobs are made, and those that no trainer has begun are canceled. Others run to their end.", false)
            : null,
          may ? button("Cancel all", "No more jobs are made, and all that have not ended are canceled.", true) : null,
        ),
      ),
      countsBar(rollout),
      rollout.text ? notice(rollout.text, rollout.state === "aborted" ? "wrong" : "") : null,
      facts(
        ["Nodes", count(nodes)],
        ["Made", moment(rollout.created)],
        ["Next job", rollout.next === null ? null : moment(rollout.next)],
        ["Jobs a minute", sayRate(plan.rate)],
        ["Given up", plan.abort ? sayAbort(plan.abort) : "never"],
        ["Model", visible(plan.job.model)],
        ["Method", plan.job.method.name],
        ["Budget", bytes(plan.job.budget_bytes)],
        ["Chosen by", saySelector(plan.selector)],
      ),
    );
  }
  const reload = () =>
    load().then(
      () => setText(told, ""),
      (error) => setText(told, visible(error.message)),
    );
  return heard(session, reload, paced(reload), id);
}

function nodeRow({ node, job, phase, outcome, text }) {
  return row(NODE_COLUMNS, [
    h("a", { href: `#/nodes/${encodeURIComponent(node)}` }, visible(node)),
    mark(outcome ?? phase ?? (job ? "deleted" : "waiting")),
    job ? jobLink(job) : "",
    text ? visible(text) : "",
  ]);
}

function documentSection(plan) {
  return h("details", { class: "sheet" }, h("summary", {}, "As it was asked for"), h("pre", {}, visible(JSON.stringify(plan, null, 2))));
}

// What has become of its jobs, as a bar: good, at work, failed; the rest waits or was canceled.
function countsBar({ counts, nodes }) {
  const failed = FAILURES.reduce((sum, name) => sum + counts[name], 0);
  const bar = svg("svg", { class: "bar-of", role: "img", "aria-label": sayCounts(counts) });
  bar.append(svg("rect", { class: "rail", width: "100%", height: "100%", rx: 3 }));
  let from = 0;
  for (const [kind, n] of [
    ["used", counts.succeeded],
    ["planned", counts.open],
    ["failed", failed],
  ]) {
    const [x, width] = [from, n].map((value) => `${((100 * value) / Math.max(1, nodes)).toFixed(2)}%`);
    if (n) bar.append(svg("rect", { class: kind, x, width, height: "100%" }));
    from += n;
  }
  return bar;
}

function sayCounts(counts) {
  const said = Object.entries(counts).filter(([, n]) => n > 0);
  return said.map(([name, n]) => `${count(n)} ${name.replace("_", " ")}`).join(", ") || "no node";
}

function sayRate({ maximum_per_minute: most, exponential }) {
  if (!exponential) return count(most);
  return `${count(exponential.base_per_minute)}, growing to ${count(most)} with success`;
}

function sayAbort({ minimum_ended: ended, threshold }) {
  return `above ${share(threshold)} of failures among ${count(ended)} or more`;
}

function saySelector({ labels, nodes }) {
  if (nodes.length) return `${plural(nodes.length, "name")}`;
  const said = Object.entries(labels).map(([name, text]) => `${name}=${text}`);
  return said.length ? visible(said.join(", ")) : "the model, and what nodes lend";
}

// Calls `start` when the stream of events begins or has lost some, and `changed` with the rollouts whose jobs have changed.
function heard(session, start, changed, only = null) {
  let started = false;
  return listen(
    "/events",
    (kind, data) => {
      if (kind === "start" && (!started || data.lost)) {
        started = true;
        start();
      } else if (kind === "job" && data.rollout && (only === null || data.rollout === only)) changed(data.rollout);
    },
    session.standing,
  );
}

// Runs with all that it was called for meanwhile, once in a while and never twice at once.
function paced(run) {
  const waiting = new Set();
  let busy = false;
  const go = async () => {
    busy = true;
    await new Promise((done) => setTimeout(done, PAUSE_MS));
    const now = [...waiting];
    waiting.clear();
    try {
      await run(now);
    } catch {
      // what cannot be read now is read with the next change
    }
    busy = false;
    if (waiting.size) go();
  };
  return (id) => {
    waiting.add(id);
    if (!busy) go();
  };
}
