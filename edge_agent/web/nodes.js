// The fleet: every node with its state, what its device does, and the job that it runs, as it happens.

import { listen, read, readAll, send } from "./api.js";
import { count, h, plural, setText, visible } from "./dom.js";
import { jobLink } from "./jobs.js";
import { confirmed, doing, facts, framed, jobMark, mark, memoryBar, notice, row, section, table } from "./parts.js";
import { bytes, moment, reading } from "./units.js";

const COLUMNS = [
  ["Node", "name"],
  ["State", "state"],
  ["Device", "device"],
  ["Memory of the budget", "memory"],
  ["Temperature", "number"],
  ["Power", "number"],
  ["Queue", "number"],
  ["Running job", "job"],
];
const SHOWN = 200;
const STATES = ["ready", "draining", "init", "offline", "lost"];
// What is known of a node that is away is of the past.
const AWAY = new Set(["offline", "lost"]);

// Keeps all nodes as they are now: the list, and then what is told of each. Calls `changed` with the name of a node, or null for all.
function follow(session, changed) {
  const fleet = { nodes: new Map(), progress: new Map(), problem: null };
  let newer = new Set();
  async function load() {
    newer = new Set();
    try {
      const nodes = await readAll("/nodes");
      for (const node of nodes) if (!newer.has(node.id)) fleet.nodes.set(node.id, node);
      fleet.problem = null;
    } catch (error) {
      fleet.problem = error.message;
    }
    changed(null);
  }
  let started = false;
  const stop = listen(
    "/events",
    (kind, data) => {
      if (kind === "start" && (!started || data.lost)) {
        started = true;
        load();
      } else if (kind === "node") {
        newer.add(data.id);
        fleet.nodes.set(data.id, data);
        changed(data.id);
      } else if (kind === "progress") fleet.progress.set(data.job, data.progress);
      else if (kind === "job" && data.phase === "ended") fleet.progress.delete(data.id);
      if (kind === "progress" || kind === "job") changed(data.node ?? nodeOf(fleet, data.job));
    },
    session.standing,
  );
  return { fleet, stop };
}

function nodeOf({ nodes }, job) {
  for (const node of nodes.values()) if (node.heartbeat?.job === job) return node.id;
  return undefined;
}

export function nodesPage(place, session) {
  const { element, body } = table("Nodes", COLUMNS);
  const search = h("input", { type: "search", placeholder: "Find a node  /", "aria-label": "Find a node", oninput: () => later() }),
    states = h("div", { class: "chips", role: "group", "aria-label": "States" }),
    told = h("p", { class: "hint", role: "status" }),
    more = h("button", { hidden: true, onclick: () => ((shown += SHOWN), arrange()) }, "Show more");
  let state = null,
    shown = SHOWN,
    all = true;
  const rows = new Map(),
    waiting = new Set();
  place.append(h("h1", {}, "Nodes"), h("div", { class: "tools" }, search, states), told, element, more);
  const { fleet, stop } = follow(session, (name) => {
    if (name === undefined) return;
    if (name === null || !rows.has(name)) all = true;
    else waiting.add(name);
    later();
  });
  const later = framed(() => {
    if (all || document.activeElement === search) arrange();
    else {
      for (const name of waiting) replace(name);
      chips();
    }
    waiting.clear();
    all = false;
  });

  function replace(name) {
    const made = nodeRow(fleet.nodes.get(name), fleet);
    const old = rows.get(name),
      focused = old?.contains(document.activeElement) ? document.activeElement.className : null;
    old?.replaceWith(made);
    rows.set(name, made);
    if (focused !== null) made.getElementsByClassName(focused)[0]?.focus();
  }
  function arrange() {
    const word = search.value.trim().toLowerCase();
    const found = [...fleet.nodes.values()]
      .filter((node) => (state === null || node.state === state) && matches(node, word))
      .sort((a, b) => (a.id < b.id ? -1 : 1));
    rows.clear();
    for (const node of found.slice(0, shown)) rows.set(node.id, nodeRow(node, fleet));
    body.replaceChildren(...rows.values());
    more.hidden = found.length <= shown;
    element.hidden = !found.length;
    setText(told, fleet.problem ?? sayFound(found.length, fleet.nodes.size, Math.min(found.length, shown)));
    chips();
  }
  function chips() {
    const counts = new Map();
    for (const node of fleet.nodes.values()) counts.set(node.state, (counts.get(node.state) ?? 0) + 1);
    const found = [[null, fleet.nodes.size], ...STATES.filter((name) => counts.has(name)).map((name) => [name, counts.get(name)])];
    const wanted = found.map(([name, n]) => `${name ?? "all"} ${count(n)}`).join();
    if (states.dataset.shown === `${wanted} ${state}`) return;
    states.dataset.shown = `${wanted} ${state}`;
    const choose = (name) => () => {
      state = name;
      arrange();
    };
    states.replaceChildren(
      ...found.map(([name, n]) =>
        h("button", { "aria-pressed": String(state === name), onclick: choose(name) }, `${name ?? "all"} ${count(n)}`),
      ),
    );
  }
  return stop;
}

function matches(node, word) {
  return (
    word === "" ||
    `${node.id} ${node.info?.device ?? ""} ${Object.keys(node.info?.models ?? {}).join(" ")} ${labels(node.info).join(" ")}`
      .toLowerCase()
      .includes(word)
  );
}

const labels = (info) => Object.entries(info?.labels ?? {}).map(([name, text]) => `${name}=${text}`);

function sayFound(found, all, shown) {
  if (all === 0) return "No node has been seen yet. One appears here when `edge-agent run` has reached the broker.";
  const of = found === all ? plural(all, "node") : `${count(found)} of ${plural(all, "node")}`;
  return shown < found ? `${of}, the first ${count(shown)} shown` : of;
}

const nodeLink = (name) => h("a", { class: "to-node", href: `#/nodes/${encodeURIComponent(name)}` }, visible(name));

function nodeRow(node, fleet) {
  const { heartbeat, info } = node,
    now = heartbeat?.resources,
    job = heartbeat?.job ?? null;
  return row(
    COLUMNS,
    [
      nodeLink(node.id),
      [mark(node.state), AWAY.has(node.state) ? h("small", {}, `heard ${moment(node.seen)}`) : null],
      info ? visible(info.device) : "–",
      memory(now, info),
      reading(now?.temperature_c, "°C"),
      reading(now?.power_w, "W", 1),
      heartbeat ? count(heartbeat.queue) : "–",
      job === null ? h("span", { class: "none" }, heartbeat ? "none" : "–") : [jobLink(job), stageNow(fleet.progress.get(job))],
    ],
    { class: AWAY.has(node.state) ? "away" : null },
  );
}

function memory(now, info) {
  const budget = now?.budget_bytes ?? info?.limits.budget_bytes;
  if (budget === undefined) return "–";
  const used = now?.trainer_bytes ?? null;
  return [
    memoryBar(used, budget, { label: "Memory of the running job" }),
    h("small", {}, used === null ? `lends ${bytes(budget)}` : `${bytes(used)} of ${bytes(budget)}`),
  ];
}

function stageNow(progress) {
  const event = progress?.event;
  if (!event?.stage) return h("small", {}, "");
  const done = event.done !== undefined && event.total ? ` ${count(event.done)} of ${count(event.total)}` : "";
  return h("small", {}, `${event.stage}${done}`);
}

// One node: what it is, what it has, and its jobs.
export function nodePage(place, session, { parts: [name] }) {
  const top = h("div", { class: "stack" }),
    told = h("p", { class: "told", role: "alert" }),
    jobs = h("div", {});
  place.append(h("h1", {}, visible(name ?? "")), told, top, jobs);
  const show = framed(() => {
    const node = fleet.nodes.get(name);
    if (node) top.replaceChildren(...nodeParts(node, fleet, session, told, show));
    else if (fleet.problem) top.replaceChildren(notice(fleet.problem, "wrong"));
    else top.replaceChildren(notice("No such node has been seen."));
  });
  const { fleet, stop } = follow(session, (changed) => {
    if (changed === null || changed === name) show();
    if (changed === null) listJobs();
  });
  async function listJobs() {
    const columns = [
      ["Job", "name"],
      ["State", "state"],
      ["Model", "device"],
      ["Created", "number"],
    ];
    try {
      const { items } = await read(`/jobs?limit=20&node=${encodeURIComponent(name)}`);
      const rows = items.map((job) => row(columns, [jobLink(job.id), jobMark(job), visible(job.order.job.model), moment(job.created)]));
      jobs.replaceChildren(
        section("Its last jobs", items.length ? table("Jobs of the node", columns, rows).element : h("p", { class: "hint" }, "None yet.")),
      );
    } catch (error) {
      setText(told, error.message);
    }
  }
  return stop;
}

function nodeParts(node, fleet, session, told, changed) {
  const { info, heartbeat } = node,
    now = heartbeat?.resources,
    draining = node.drain === true;
  const change = h("button", {
    hidden: !session.may("admin"),
    onclick: async () => {
      const text = draining ? "It takes jobs again." : "It takes no new jobs, and finishes those that it has.";
      if (await confirmed(`${draining ? "Resume" : "Drain"} ${visible(node.id)}? ${text}`, draining ? "Resume" : "Drain"))
        await doing(change, told, async () => {
          fleet.nodes.set(node.id, await send("POST", `/nodes/${encodeURIComponent(node.id)}/${draining ? "resume" : "drain"}`));
          changed();
        });
    },
  });
  setText(change, draining ? "Resume" : "Drain");
  const models = Object.entries(info?.models ?? {}).map(([name, fingerprint]) =>
    h("li", {}, visible(name), fingerprint === null ? h("small", {}, " not there") : null),
  );
  const without = (sensor, text) => (text === "–" && sensor?.reason ? h("span", {}, "– ", h("small", {}, visible(sensor.reason))) : text);
  return [
    h("div", { class: "headline" }, mark(node.state), h("span", { class: "hint" }, `last heard ${moment(node.seen)}`), change),
    section(
      "Now",
      facts(
        ["Running job", heartbeat?.job ? h("span", {}, jobLink(heartbeat.job), " ", stageNow(fleet.progress.get(heartbeat.job))) : "none"],
        ["Waiting", heartbeat ? count(heartbeat.queue) : "–"],
        ["Memory of the budget", h("span", { class: "with-bar" }, ...[memory(now, info)].flat())],
        ["Free on the device", without(now?.device_free_bytes, bytes(now?.device_free_bytes?.value))],
        ["Free on the host", bytes(now?.host_free_bytes)],
        ["Free on the disk", bytes(now?.disk_free_bytes)],
        ["Utilisation", without(now?.utilisation_percent, reading(now?.utilisation_percent, "%"))],
        ["Temperature", without(now?.temperature_c, reading(now?.temperature_c, "°C"))],
        ["Power", without(now?.power_w, reading(now?.power_w, "W", 1))],
      ),
    ),
    info === null
      ? section("What it is", h("p", { class: "hint" }, "It has not said yet."))
      : section(
          "What it is",
          facts(
            ["Device", visible(info.device)],
            ["Its memory", info.memory_bytes === null ? null : bytes(info.memory_bytes)],
            ["Lends at most", bytes(info.limits.budget_bytes)],
            ["Dataset at most", bytes(info.limits.dataset_bytes)],
            ["Jobs that may wait", count(info.limits.queue)],
            ["Labels", labels(info).map(visible).join(", ") || "none"],
            ["Agent", visible(info.agent)],
            ["Python", visible(info.python)],
            ...Object.entries(info.versions).map(([name, version]) => [visible(name), visible(version)]),
          ),
          h("h3", {}, "Models"),
          models.length ? h("ul", {}, ...models) : h("p", { class: "hint" }, "None."),
        ),
  ];
}
