// A job for a node: what to train on, how, and under which budget; or one that has been, with changes.

import { newId, read, readAll, send } from "./api.js";
import { count, h, setText, visible } from "./dom.js";
import { makeDataset } from "./dataset.js";
import { doing, written } from "./parts.js";
import { makePlanner, planSection } from "./planner.js";
import { AS_RELEASED } from "./presets.js";
import { choiceSection, makeTarget } from "./target.js";
import { bytes } from "./units.js";

const SIZE = /^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*$/,
  UNITS = { "": 1, b: 1, kib: 2 ** 10, mib: 2 ** 20, gib: 2 ** 30, tib: 2 ** 40, kb: 1e3, mb: 1e6, gb: 1e9, tb: 1e12 };

// Methods by their presets, as fields of `method`; the rest of a method are its defaults.
export const PRESETS = {
  nlft: {
    title: "NLFT",
    note: "scores answers under what the standard answer and judgments say, and repairs wrong ones",
    method: { name: "nlft" },
  },
  released: {
    title: "NLFT, as released",
    note: "the weights of the method's released code, for comparison",
    method: { name: "nlft", ...AS_RELEASED },
  },
  sft: { title: "SFT", note: "imitates the standard answers", method: { name: "sft" } },
  dft: { title: "DFT", note: "imitates them the less, the less likely they are", method: { name: "dft" } },
  cut: { title: "CUT", note: "makes tokens unlikely that a judgment tells against", method: { name: "cut" } },
  reft: { title: "ReFT", note: "warm-up on the standard answers, then PPO on sampled ones", method: { name: "reft" } },
};

// Fields of the job document that have a control of their own; an empty one is left to its default.
export const FIELDS = [
  ["schedule.epochs", "Epochs", "3"],
  ["schedule.updates", "Updates", "by epochs"],
  ["schedule.batch", "Batch", "8"],
  ["schedule.learning_rate", "Learning rate", "0.0002"],
  ["lora.rank", "LoRA rank", "16"],
  ["sampling.outputs", "Outputs sampled per question", "4"],
  ["evaluation.questions", "Held-out questions at most", "300"],
  ["evaluation.max_new_tokens", "Longest output in tokens", "256"],
  ["seed", "Seed", "42"],
];
const VERIFIERS = ["numeric", "exact", "choice", "none"];

export function parseSize(text) {
  const [, number, unit] = SIZE.exec(text) ?? [];
  return number === undefined || !Object.hasOwn(UNITS, unit.toLowerCase()) ? null : Math.trunc(Number(number) * UNITS[unit.toLowerCase()]);
}

// Puts a value into a document by its dotted name. Throws where the name leads through what has no fields.
export function place(document, name, value) {
  const parents = name.split("."),
    last = parents.pop();
  for (const parent of parents) {
    if (!Object.hasOwn(document, parent)) document[parent] = {};
    document = document[parent];
    if (typeof document !== "object" || document === null) throw new Error(`${parent} in ${name} has no fields`);
  }
  document[last] = value;
}

// Reads `field=value` lines as `--set` does: JSON, or plain words.
export function settings(text) {
  return text
    .split("\n")
    .map((line) => line.trim())
    .filter(Boolean)
    .map((line) => {
      const [, name, value] = /^([a-z_0-9]+(?:\.[a-z_0-9]+)*)=(.*)$/.exec(line) ?? [];
      if (name === undefined) throw new Error(`${line} is not of the form field=value, such as schedule.warmup=0.2`);
      try {
        return [name, JSON.parse(value)];
      } catch {
        return [name, value];
      }
    });
}

export function submitPage(page, session, { query }) {
  const state = { nodes: [], base: null, asked: {} };
  const told = h("p", { class: "told", role: "alert" }),
    field = (label, control, hint = null) =>
      h("label", { class: `field${control.tagName === "SELECT" ? " wide" : ""}` }, h("span", {}, label), control, hint);
  const target = makeTarget(field, () => (models(), changed()));
  const node = h("select", { required: true, onchange: () => (models(), changed()) }),
    model = h("select", { required: true, onchange: () => changed() }),
    budget = h("input", { required: true, spellcheck: "false", autocomplete: "off", placeholder: "3GiB", oninput: () => changed() }),
    method = h("select", { onchange: () => changed() }),
    methodNote = h("small", {}),
    verifier = h("select", { onchange: () => changed() }, ...VERIFIERS.map((name) => h("option", { value: name }, name))),
    priority = h(
      "select",
      {},
      ...Array.from({ length: 10 }, (_, n) => h("option", { value: n, selected: n === 4 }, n === 0 ? "0, last" : n === 9 ? "9, first" : n)),
    ),
    more = h("textarea", { rows: 3, spellcheck: "false", placeholder: "schedule.warmup=0.2", oninput: () => changed() }),
    inputs = FIELDS.map(([name, label, fallback]) => [
      name,
      label,
      h("input", { inputmode: "decimal", autocomplete: "off", placeholder: fallback, oninput: () => changed() }),
    ]),
    checks = h("ul", { class: "checks", "aria-label": "What the coordinator can tell" }),
    preview = h("pre", {}),
    planned = h("div", { class: "slot", "aria-live": "polite" }),
    button = h("button", { class: "primary" }, "Submit");
  const data = makeDataset({ label: "Dataset", changed: () => changed() }),
    questions = makeDataset({ label: "Evaluation questions", none: "held out of the dataset", changed: () => changed() });
  const title = h("h1", {}, "New job"),
    nodeField = field("Node", node);
  page.append(
    title,
    h(
      "form",
      { class: "stack", novalidate: true, onsubmit: submit },
      h(
        "section",
        { class: "sheet form" },
        h("h2", {}, "Where"),
        h(
          "div",
          { class: "fields" },
          field("For", target.kind),
          nodeField,
          field("Model", model),
          field("Memory budget", budget),
          ...target.elements,
        ),
        checks,
      ),
      h("section", { class: "sheet form" }, h("h2", {}, "On what"), data.element, questions.element),
      h(
        "section",
        { class: "sheet form" },
        h("h2", {}, "How"),
        h(
          "div",
          { class: "fields" },
          field("Method", method, methodNote),
          field("Verifier", verifier),
          field("Priority", priority),
          ...inputs.map(([, label, input]) => field(label, input)),
        ),
        h(
          "details",
          { class: "more" },
          h("summary", {}, "Further fields"),
          field("One field=value a line, by their names in the job document", more),
        ),
        h("details", {}, h("summary", {}, "Job document"), preview),
      ),
      planned,
      told,
      h("div", { class: "buttons" }, button),
    ),
  );
  if (!session.may("submit")) {
    button.disabled = true;
    setText(told, "Your token has the scope read; submitting takes submit.");
  }

  function document() {
    const made = structuredClone(state.base ?? {}),
      size = parseSize(budget.value);
    made.model = model.value;
    made.dataset = { ...made.dataset, sha256: data.value() };
    if (questions.value() === null) delete made.dataset.evaluation_sha256;
    else made.dataset.evaluation_sha256 = questions.value();
    if (size === null) throw new Error(`${budget.value || "nothing"} is no size of a budget; write it like 6GiB or 900MiB`);
    made.budget_bytes = size;
    if (method.value !== "") made.method = { ...PRESETS[method.value].method };
    if (verifier.value !== "") place(made, "evaluation.verifier", verifier.value);
    for (const [name, label, input] of inputs) {
      const text = input.value.trim();
      input.setAttribute("aria-invalid", String(text !== "" && !Number.isFinite(Number(text))));
      if (text !== "" && !Number.isFinite(Number(text))) throw new Error(`${label}: ${text} is no number`);
      if (text !== "") place(made, name, Number(text));
      else if (state.base) place(made, name, name === "schedule.updates" ? null : Number(input.placeholder));
    }
    for (const [name, value] of settings(more.value)) place(made, name, value);
    return made;
  }
  const planner = makePlanner(planned, () => {
    if (data.value() === null || !model.value) return null;
    const job = document();
    if (target.kind.value === "many")
      return { title: "Rollout", path: "/rollouts?dry_run=true", document: rollout(job), show: choiceSection };
    if (target.kind.value === "best" || chosen()?.state !== "ready") return null;
    return { title: "Plan", path: "/plans", document: { node: node.value, job }, show: (answer) => planSection(answer, job.budget_bytes) };
  });
  const rollout = (job) => target.rollout(job, Number(priority.value));
  const chosen = () => (target.kind.value === "node" ? state.nodes.find((one) => one.id === node.value) : undefined);

  // What can be told before the node is asked, by what it has said of itself.
  function check() {
    const { info, heartbeat, state: at } = chosen() ?? {},
      size = parseSize(budget.value),
      file = data.view();
    if (at === undefined) return [];
    const said = [
      [
        at === "ready",
        at === "ready"
          ? "the node is ready"
          : at === "draining"
            ? "the node takes no new jobs"
            : `the node is ${at}; it gets the job when it is there`,
      ],
    ];
    if (info) {
      const { budget_bytes: lent, dataset_bytes: most, queue } = info.limits;
      if (size !== null)
        said.push([size <= lent, size <= lent ? `it lends up to ${bytes(lent)}` : `it lends ${bytes(lent)}, the budget is ${bytes(size)}`]);
      if (file?.size_bytes)
        said.push([
          file.size_bytes <= most,
          file.size_bytes <= most
            ? "the dataset is small enough for it"
            : `it takes datasets of up to ${bytes(most)}, this has ${bytes(file.size_bytes)}`,
        ]);
      if (heartbeat)
        said.push([
          heartbeat.queue < queue,
          heartbeat.job || heartbeat.queue
            ? `${count(heartbeat.queue + (heartbeat.job ? 1 : 0))} before this one, of ${count(queue)} that may wait`
            : "nothing is before this job",
        ]);
      if (model.value && info.models[model.value] === null) said.push([false, "the model's files are not there"]);
    }
    return said;
  }
  function changed() {
    target.arrange();
    nodeField.hidden = target.kind.value !== "node";
    setText(button, target.kind.value === "many" ? "Begin the rollout" : "Submit");
    setText(methodNote, PRESETS[method.value]?.note ?? "");
    checks.replaceChildren(
      ...check().map(([well, text]) =>
        h(
          "li",
          { class: well === null ? "open" : well ? "well" : "ill" },
          h("i", { "aria-hidden": "true" }, well === null ? "○" : well ? "●" : "▲"),
          text,
        ),
      ),
    );
    try {
      setText(preview, written(JSON.stringify(document(), null, 2)));
    } catch (error) {
      setText(preview, written(error.message));
    }
    planner.ask();
  }
  function models() {
    const { info } = chosen() ?? {},
      before = model.value || state.base?.model;
    // Of many nodes a model is there where one of them has it.
    const known = {};
    for (const one of info ? [{ info }] : state.nodes)
      for (const [name, there] of Object.entries(one.info?.models ?? {})) known[name] = known[name] ?? there;
    model.replaceChildren(
      ...Object.entries(known).map(([name, there]) =>
        h("option", { value: name, selected: name === before, disabled: there === null }, there === null ? `${name} (not there)` : name),
      ),
    );
    if (info && (budget.value === "" || budget.dataset.given === "limit")) {
      budget.value = bytes(info.limits.budget_bytes).replace(" ", "");
      if (parseSize(budget.value) > info.limits.budget_bytes) budget.value = String(info.limits.budget_bytes);
      budget.dataset.given = "limit";
    }
  }
  budget.addEventListener("input", () => delete budget.dataset.given);

  function submit(event) {
    event.preventDefault();
    doing(button, told, async () => {
      data.select.setAttribute("aria-invalid", String(data.value() === null));
      const kind = target.kind.value;
      if (kind === "node" && !node.value) throw new Error("choose a node");
      if (!model.value) throw new Error("choose a model; there is none");
      if (data.value() === null) throw new Error("choose a dataset, or upload one");
      if (kind === "many") {
        const { rollout: made } = await send("POST", "/rollouts", rollout(document()));
        location.hash = `#/rollouts/${made.id}`;
        return;
      }
      const to = kind === "node" ? { node: node.value } : { selector: target.selector() };
      const body = { ...to, job: document(), priority: Number(priority.value) },
        text = JSON.stringify(body);
      // Whose answer was lost, and is submitted again as it was, is the same job.
      if (state.asked.text !== text) state.asked = { text, id: newId() };
      const job = await send("POST", "/jobs", { ...body, id: state.asked.id });
      location.hash = `#/jobs/${job.id}`;
    });
  }

  // A job that has been, with changes: all its fields are kept but those that are changed here.
  function follow(job) {
    const { job: base } = job.order;
    state.base = base;
    title.replaceChildren("New job, as ", h("a", { href: `#/jobs/${encodeURIComponent(job.id)}`, class: "id" }, job.id), " with changes");
    for (const [name, , input] of inputs) {
      const value = name.split(".").reduce((part, key) => part?.[key], base);
      input.value = value === null ? "" : String(value);
    }
    budget.value = bytes(base.budget_bytes).replace(" ", "");
    if (parseSize(budget.value) !== base.budget_bytes) budget.value = String(base.budget_bytes);
    priority.value = String(job.order.priority);
    if (!VERIFIERS.includes(base.evaluation.verifier)) verifier.append(h("option", { value: "" }, "as in the job"));
    verifier.value = VERIFIERS.includes(base.evaluation.verifier) ? base.evaluation.verifier : "";
    data.set(base.dataset.sha256);
    if (base.dataset.evaluation_sha256) questions.set(base.dataset.evaluation_sha256);
  }
  async function begin() {
    const from = query.get("from");
    const [nodes, job] = await Promise.all([readAll("/nodes"), from ? read(`/jobs/${encodeURIComponent(from)}`) : null]);
    state.nodes = nodes;
    const wanted = query.get("node") ?? job?.node ?? nodes.find((one) => one.state === "ready")?.id;
    node.replaceChildren(
      ...nodes.map((one) =>
        h(
          "option",
          { value: one.id, selected: one.id === wanted },
          `${one.id}, ${one.state}${one.info ? `, ${visible(one.info.device)}` : ""}`,
        ),
      ),
    );
    if (!nodes.length) setText(told, "No node has been seen yet.");
    method.replaceChildren(
      ...(job ? [h("option", { value: "" }, `as in the job (${job.order.job.method.name})`)] : []),
      ...Object.entries(PRESETS).map(([name, preset]) => h("option", { value: name }, preset.title)),
    );
    if (job) follow(job);
    models();
    changed();
  }
  begin().catch((error) => setText(told, error.message));
}
