// One job: where it stands, what it measures while it runs, and what it has come to.

import { download, listen, read, send } from "./api.js";
import { makeLine } from "./chart.js";
import { count, h, number, plural, setText, svg, visible } from "./dom.js";
import { jobLink, shortId } from "./jobs.js";
import { confirmed, doing, facts, framed, jobMark, memoryBar, notice, row, section, table, written } from "./parts.js";
import { accuracySection, costSection, developmentChart, examplesSection, lossPoints, stagesSection } from "./report.js";
import { bytes, moment, rate, reading, seconds } from "./units.js";

const MOST_SAMPLES = 2000;

export function jobPage(place, session, { parts: [id] }) {
  const state = { job: null, progress: null, history: [], result: null, problem: null };
  const samples = [];
  const title = h("h1", {}, "Job ", h("span", { class: "id" }, visible(id))),
    told = h("p", { class: "told", role: "alert" }),
    slots = Object.fromEntries(
      ["head", "now", "curves", "accuracy", "stages", "examples", "run", "said", "files", "document"].map((n) => [
        n,
        h("div", { class: "slot" }),
      ]),
    );
  const curves = makeCurves();
  place.append(title, told, ...Object.values(slots));

  const drawAll = framed(() => {
    const { job, result } = state;
    if (job === null) {
      slots.head.replaceChildren(state.problem ? notice(state.problem, "wrong") : h("p", { class: "hint" }, "…"));
      return;
    }
    fill(slots.head, head(job, state, session, told));
    fill(slots.said, saidSection(state.history));
    fill(slots.files, filesSection(job, told));
    fill(
      slots.accuracy,
      accuracySection(result?.accuracy ?? job.result?.accuracy, result?.accepted ?? job.result?.accepted, result?.acceptance),
    );
    fill(slots.examples, examplesSection(result?.examples));
    fill(slots.run, result ? costSection(result) : null);
    if (!slots.document.firstChild) fill(slots.document, documentSection(job));
    drawNow();
  });
  const drawNow = framed(() => {
    const { job, progress, result } = state,
      open = job !== null && job.phase !== "ended";
    slots.head.querySelector(".timeline")?.replaceChildren(...timeline(job, state.history));
    fill(slots.now, open && progress ? nowSection(progress, samples) : null);
    if (result?.stages.length) fill(slots.stages, stagesSection(result.stages, result.budget_bytes));
    else if (progress) {
      const { finished, event } = progress;
      fill(slots.stages, stagesSection(finished, job.order.job.budget_bytes, open ? (event.stage ?? null) : null));
    }
    if (curves.set(samples, state) && !slots.curves.firstChild) slots.curves.append(curves.element);
  });

  async function lookUp() {
    try {
      state.history = await read(`/jobs/${encodeURIComponent(id)}/history`);
      if (state.job?.phase === "ended" && state.result === null && state.job.result?.artifacts.some((a) => a.name === "result.json"))
        state.result = await read(`/jobs/${encodeURIComponent(id)}/artifacts/result.json`);
    } catch (error) {
      setText(told, error.message);
    }
    drawAll();
  }
  const stop = listen(
    `/jobs/${encodeURIComponent(id)}/events`,
    (kind, data) => {
      if (kind === "job") {
        state.job = data;
        if (data.phase === "ended") {
          stop();
          session.standing(null);
        }
        lookUp();
      } else if (kind === "progress") {
        state.progress = data;
        keep(samples, data);
        drawNow();
      }
    },
    session.standing,
    (error) => {
      state.problem = error.message;
      drawAll();
    },
  );
  read(`/jobs/${encodeURIComponent(id)}/progress`).then(
    (earlier) => {
      samples.unshift(...earlier.filter(({ time }) => !samples.length || time < samples[0].time));
      drawNow();
    },
    () => {}, // the stream says what is wrong
  );
  drawAll();
  return stop;
}

function fill(slot, content) {
  slot.replaceChildren(...(content === null ? [] : [content].flat()));
}

// Keeps what a progress says of this moment, in the form in which the coordinator tells of earlier ones, thinned where it becomes much.
function keep(samples, { event, resources }) {
  if (samples.length && samples.at(-1).time >= event.time) return;
  samples.push({
    time: event.time,
    stage: event.stage ?? null,
    done: event.done ?? null,
    loss: event.loss ?? null,
    tokens_per_s: event.tokens_per_s ?? null,
    memory_bytes: event.memory_bytes ?? resources.trainer_bytes,
    power_w: resources.power_w.value,
  });
  if (samples.length > MOST_SAMPLES) for (let n = samples.length - 2; n > 0; n -= 2) samples.splice(n, 1);
}

// State, facts, and what can be done.
function head(job, state, session, told) {
  const { order } = job,
    { job: document } = order,
    ended = job.phase === "ended",
    path = `/jobs/${encodeURIComponent(job.id)}`;
  const cancel = h(
    "button",
    {
      class: "danger",
      hidden: ended || !session.may("submit"),
      disabled: job.cancel,
      onclick: async () => {
        if (await confirmed("End this job? What it has not handed in yet is lost.", "Cancel the job"))
          await doing(cancel, told, () => send("POST", `${path}/cancel`));
      },
    },
    job.cancel ? "Canceling…" : "Cancel",
  );
  const retry = h(
    "button",
    {
      hidden: !ended || !session.may("submit"),
      onclick: () =>
        doing(retry, told, async () => {
          location.hash = `#/jobs/${(await send("POST", `${path}/retry`)).id}`;
        }),
    },
    "Retry",
  );
  const again = h(
    "a",
    { class: "button", hidden: !session.may("submit"), href: `#/new?from=${encodeURIComponent(job.id)}` },
    "Rerun with changes",
  );
  const map = h("a", { class: "button", hidden: !hasMap(job), href: `/saliency#${encodeURIComponent(job.id)}` }, "Saliency Map");
  return [
    h("div", { class: "headline" }, jobMark(job), h("div", { class: "buttons" }, map, cancel, retry, again)),
    whyNotice(job),
    h(
      "section",
      { class: "sheet", "aria-label": "The job" },
      facts(
        ["Node", h("a", { href: `#/nodes/${encodeURIComponent(job.node)}` }, visible(job.node))],
        ["Model", visible(document.model)],
        ["Method", document.method.name],
        ["Budget", bytes(document.budget_bytes)],
        ["Learning rate", String(document.schedule.learning_rate)],
        [
          "Length",
          document.schedule.updates === null ? plural(document.schedule.epochs, "epoch") : plural(document.schedule.updates, "update"),
        ],
        [
          "Dataset",
          h("span", { title: document.dataset.sha256 }, `${document.dataset.sha256.slice(0, 12)}…, ${bytes(order.dataset.size_bytes)}`),
        ],
        ["Created", moment(job.created)],
        ["New options", newOptions(job)],
        ["Attempt", job.attempt > 1 ? count(job.attempt) : null],
        ["Retry of", job.retry_of ? jobLink(job.retry_of) : null],
        ["Rollout", job.rollout ? h("a", { href: `#/rollouts/${encodeURIComponent(job.rollout)}` }, shortId(job.rollout)) : null],
      ),
      h("div", { class: "timeline" }),
    ),
  ].filter((part) => part !== null);
}

// Whether its trainer can write a Saliency Map, or it has left one.
function hasMap({ phase, order, result }) {
  if (phase === "ended") return Boolean(result?.artifacts.some(({ name }) => name === "saliency.json"));
  return order.job.method.name === "nlft" && (phase === "running" || phase === "paused");
}

// What the job was sent to go on with while it runs, and what has become of it.
function newOptions({ options, options_state: state }) {
  if (!options) return null;
  const taken = state?.taken ? `${count(state.taken)} taken after ${plural(state.update ?? 0, "update")}` : "none taken yet";
  const refused = state?.refused && state.number === options.number ? `; refused: ${visible(state.refused)}` : "";
  return `${count(options.number)} sent, ${taken}${refused}`;
}

// What the node said last, where the report below does not say it.
function whyNotice({ outcome, reason, text, result }) {
  if (!reason && !text) return null;
  if (outcome === "succeeded" && result?.accepted !== false) return null;
  return notice([reason, text].filter(Boolean).join(": "), outcome ? "wrong" : "");
}

const WORK = new Set(["running", "finalizing", "staging"]);

// How long the job was in each phase: a strip, and the same in words.
function timeline(job, history) {
  const steps = [{ phase: "created", time: job.created }];
  for (const message of history)
    if (!message.late && message.phase !== steps.at(-1).phase) steps.push({ phase: message.phase, time: message.time });
  if (job.phase === "ended" && steps.at(-1).phase !== "ended") steps.push({ phase: "ended", time: job.changed });
  const end = job.phase === "ended" ? steps.at(-1).time : Date.now() / 1000,
    whole = Math.max(end - steps[0].time, 0.001);
  const parts = steps.map(({ phase, time }, n) => ({ phase, time, lasted: Math.max(0, (steps[n + 1]?.time ?? end) - time) }));
  let from = 0;
  const strip = parts.map(({ phase, lasted }) => {
    const width = (100 * lasted) / whole,
      rect = svg("rect", { class: WORK.has(phase) ? phase : "wait", x: `${from}%`, width: `${width}%`, height: "100%" });
    from += width;
    return rect;
  });
  return [
    svg("svg", { height: 8, "aria-hidden": "true" }, ...strip),
    h(
      "ol",
      {},
      ...parts.map(({ phase, time, lasted }, n) =>
        h(
          "li",
          { class: WORK.has(phase) ? phase : "wait" },
          h("b", {}, phase),
          ` ${moment(time)}`,
          h("small", {}, (n === parts.length - 1 && job.phase === "ended") || lasted < 0.05 ? "" : ` for ${seconds(lasted)}`),
        ),
      ),
    ),
  ];
}

// What the trainer does at this moment.
function nowSection({ event, resources }, samples) {
  const { stage, done, total } = event,
    memory = event.memory_bytes ?? resources.trainer_bytes;
  const counted = done !== undefined && total,
    left = counted ? remaining(samples, stage, done, total) : null;
  return section(
    `Now: ${stage ?? event.event.replace("_", " ")}`,
    counted ? h("progress", { value: done, max: total, "aria-label": `${stage}: ${count(done)} of ${count(total)}` }) : null,
    facts(
      ["Done", counted ? `${count(done)} of ${count(total)}` : null],
      ["Left in this stage", left === null ? null : `about ${seconds(left)}`],
      ["Loss", event.loss === undefined ? null : number(event.loss, 4)],
      ["Tokens/s", event.tokens_per_s === undefined ? null : rate(event.tokens_per_s)],
      [
        "Memory of the budget",
        memory === null
          ? null
          : h(
              "span",
              {},
              memoryBar(memory, event.budget_bytes ?? resources.budget_bytes, { label: "Memory" }),
              h("small", {}, `${bytes(memory)} of ${bytes(event.budget_bytes ?? resources.budget_bytes)}`),
            ),
      ],
      ["Temperature", reading(resources.temperature_c, "°C")],
      ["Power", reading(resources.power_w, "W", 1)],
      ["Utilisation", reading(resources.utilisation_percent, "%")],
    ),
    event.text ? notice(event.text) : null,
  );
}

function remaining(samples, stage, done, total) {
  const own = samples.filter((sample) => sample.stage === stage && sample.done !== null && sample.done <= done);
  if (own.length < 2) return null;
  const first = own[Math.max(0, own.length - 20)],
    last = own.at(-1);
  return last.done > first.done ? ((total - last.done) * (last.time - first.time)) / (last.done - first.done) : null;
}

// Loss over updates; tokens per second, power and memory over time.
function makeCurves() {
  const time = { x: "seconds", showX: seconds, zero: true };
  const loss = makeLine({ title: "Loss", x: "updates", whole: true, showX: count, showY: (y) => number(y) }),
    speed = makeLine({ title: "Tokens/s", showY: rate, ...time }),
    power = makeLine({ title: "Power", showY: (y) => `${number(y, y < 10 ? 1 : 0)} W`, ...time }),
    memory = makeLine({ title: "Memory", showY: bytes, unit: 2 ** 20, ...time });
  const place = h("div", { class: "charts" }),
    note = h("p", { class: "hint" }),
    element = section("Curves", place, note);
  let development = null;
  return {
    element,
    // Returns whether there is anything to show.
    set(samples, { result, job, progress }) {
      const start = samples[0]?.time ?? 0;
      const over = (name, all = samples) =>
        all.filter((sample) => sample[name] !== null).map((sample) => ({ x: sample.time - start, y: sample[name], note: sample.stage }));
      const losses = result?.losses?.length
        ? lossPoints(result.losses)
        : samples
            .filter(({ loss: y, stage }) => y !== null && stage === "train")
            .map(({ done, loss: y }) => ({ x: done, y, note: `update ${count(done)}` }));
      const shown = [];
      const show = (chart, found, level = null) => {
        if (!found.length) return;
        chart.set(found, level);
        shown.push(chart.element);
      };
      show(loss, losses);
      show(speed, over("tokens_per_s"));
      show(power, over("power_w"));
      show(memory, over("memory_bytes"), samples.length ? (job?.order.job.budget_bytes ?? null) : null);
      development ??= developmentChart(result?.development_losses);
      if (development) shown.push(development);
      if (shown.length !== place.children.length) place.replaceChildren(...shown);
      const reason = progress?.resources.power_w.reason;
      const kept = samples.length
        ? "Over time: what the node has told since the coordinator's start."
        : "Over time nothing is known any more; the report has it by stage.";
      setText(note, `${reason ? `No power: ${written(reason)}. ` : ""}${kept}`);
      return shown.length > 0;
    },
  };
}

function saidSection(history) {
  if (!history.length) return null;
  const columns = [
    ["Time", "name"],
    ["Phase", "state"],
    ["Reason", "wide"],
    ["What it said", "text"],
  ];
  const rows = history.map((message) =>
    row(columns, [
      [moment(message.time), message.late ? h("small", {}, "late, changed nothing") : null],
      `${message.phase}${message.outcome ? `, ${message.outcome.replace("_", " ")}` : ""}`,
      message.reason ?? "",
      message.text === null ? "" : written(message.text),
    ]),
  );
  return section("What the node said", table("What the node said", columns, rows).element);
}

function filesSection(job, told) {
  const artifacts = job.result?.artifacts ?? [];
  if (job.phase !== "ended" || !artifacts.length) return null;
  return section(
    "Files",
    h(
      "ul",
      { class: "files" },
      ...artifacts.map(({ name, size_bytes: size, sha256 }) => {
        const button = h("button", { title: `sha256 ${sha256}`, onclick: () => doing(button, told, () => download(job.id, name)) }, name);
        return h("li", {}, button, " ", h("small", {}, bytes(size)));
      }),
    ),
  );
}

function documentSection(job) {
  return h("details", { class: "sheet" }, h("summary", {}, "Job document"), h("pre", {}, written(JSON.stringify(job.order.job, null, 2))));
}
