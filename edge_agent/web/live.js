// The Saliency Map of a job of the coordinator: as it stands while its trainer works, and that of its result once it has ended.

import { Refused, listen, read, send, token } from "./api.js";
import { count, h, plural, setText, visible } from "./dom.js";
import { mount } from "./saliency.js";

const AGAIN_MS = 30000; // between two looks for newer scores, where the job takes any
const HELD_MS = 500; // between two looks whether a hand is still on the map
const id = decoded(location.hash.slice(1)),
  path = `/jobs/${encodeURIComponent(id)}`,
  jobPage = `/#/jobs/${encodeURIComponent(id)}`;
const root = document.getElementById("map");
const standing = h("span", { class: "stands" }),
  told = h("span", { class: "told", role: "status" }),
  newer = h("button", { hidden: true, onclick: () => request() }, "Newer scores"),
  tools = h("div", { class: "live" }, h("a", { href: jobPage }, "‹ Job"), newer, standing, told);
let job = null,
  progress = null,
  may = false,
  shown = null,
  waiting = 0;

const open = () => job !== null && job.phase !== "ended";
const trains = () => job?.phase === "running" || job?.phase === "paused";
// Whether somebody's hand is on what another map would take the place of.
const held = () => root.querySelector(":active, :focus:is(input:not([type=radio]), select, textarea), dialog") !== null;

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

// Says something: in the middle of the page as long as it has no map.
function say(text) {
  setText(told, text);
  if (shown === null) root.replaceChildren(h("div", { class: "waiting" }, h("h1", {}, "Saliency Map"), tools));
}

// Asks the trainer for the map as it stands; an event says when it has come.
async function request() {
  newer.disabled = true;
  try {
    await send("POST", `${path}/saliency`);
    say(shown === null ? "The trainer writes the map before its next update, once all answers are scored." : "");
  } catch (error) {
    say(error.message);
  }
  newer.disabled = false;
}

async function load() {
  clearTimeout(waiting);
  if (held()) {
    waiting = setTimeout(load, HELD_MS);
    return;
  }
  try {
    const saliency = await read(`${path}/artifacts/saliency.json`),
      before = shown;
    shown = mount(root, { saliency, job: job.order.job }, { tools, kept: before?.kept(), send: may ? sendOptions : null });
    before?.end();
    globalThis.saliencyMap = shown;
    say("");
  } catch (error) {
    if (error.status === 404) say("This job has left no Saliency Map: jobs of the method nlft that succeed do.");
    else if (error instanceof Refused) say(error.message);
    else if (error instanceof TypeError && error.message.includes("fetch")) waiting = setTimeout(load, AGAIN_MS / 10);
    else say(`The map that the node has written cannot be shown: ${error.message}`);
  }
  tell();
}

// Has the job go on with those options that are other ones than it has; returns what to tell of it. Throws Refused.
async function sendOptions(options) {
  const own = job.options?.method ?? job.order.job.method,
    changed = Object.entries(options).filter(([name, value]) => name !== "name" && own[name] !== value);
  if (!changed.length) return "The job has these options already.";
  job = await send("POST", `${path}/options`, { method: Object.fromEntries(changed) });
  tell();
  return `Sent as number ${count(job.options.number)}: the trainer goes on with them at its next update.`;
}

// Where the job stands, and what has become of options that were sent.
function tell() {
  const words = [open() && progress?.stage ? progress.stage : job.phase];
  if (open() && progress?.total) words.push(`${count(progress.done)} of ${count(progress.total)}`);
  const { options, options_state: state } = job;
  if (options) {
    words.push(
      `options: ${count(options.number)} sent, ${state?.taken ? `${count(state.taken)} taken after ${plural(state.update ?? 0, "update")}` : "none taken yet"}`,
    );
    if (state?.refused && state.number === options.number) words.push(`refused: ${visible(state.refused)}`);
  }
  setText(standing, words.join(" · "));
  newer.hidden = !open() || shown === null;
  shown?.sends(may && open());
}

function start() {
  const stop = listen(
    `${path}/events`,
    (kind, data) => {
      if (kind === "job") {
        job = data;
        if (job.phase === "ended") {
          stop();
          load();
        } else if (shown === null) {
          if (trains()) request();
          else say(`The job is ${job.phase}; its map is made when it trains.`);
        }
        tell();
      } else if (kind === "progress") {
        progress = data.event;
        if (job) tell();
      } else if (kind === "saliency") load();
    },
    (live) => (live || !open() ? null : setText(standing, "no connection")),
    (error) => say(error.message),
  );
  setInterval(() => {
    if (shown !== null && trains() && job.order.job.method.references !== "once" && !document.hidden && !held()) request();
  }, AGAIN_MS);
}

const theme = localStorage.getItem("edge-agent-theme");
if (theme) document.documentElement.dataset.theme = theme;
addEventListener("hashchange", () => location.reload());
document.addEventListener("signedout", () => location.replace(jobPage));
if (token.get() === null) location.replace(jobPage);
else {
  say("…");
  read("/me").then(
    ({ scope }) => {
      may = scope !== "read";
      start();
    },
    (error) => say(error.message),
  );
}
