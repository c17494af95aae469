// The Saliency Map: answers as coloured tokens beside the options that their weights come from.

import { prepare, results, weigh } from "./weights.js";
import { FIELDS } from "./options.js";
import { AS_RELEASED, CORRECTED } from "./presets.js";
import { count, h, plural, setText, visible } from "./dom.js";
import { NEAR } from "./degree.js";
import { makeList } from "./list.js";
import { makeAnswer } from "./answer.js";
import { makeOptions } from "./panel.js";

// Builds the map inside `root`. `data` has the document `saliency`, and the job document or null. Of a job that trains there may be
// `tools` for its bar and `send`, which has the job go on with options; `kept` is what the map showed that this one takes the place of.
// Returns what tests and other pages may use of it.
export function mount(root, data, { tools = null, send = null, kept = null } = {}) {
  const { saliency, job } = data;
  const table = prepare(saliency);
  const choices = { corrected: CORRECTED, released: { ...CORRECTED, ...AS_RELEASED }, job: saliency.options };
  const ended = new AbortController();
  const state = {
    options: { ...saliency.options },
    compared: "job",
    step: 0,
    record: 0,
    token: 0,
    mode: "weight",
    sort: "flagged",
    down: true,
    filter: "all",
    search: "",
    sends: send !== null,
    ...kept?.state,
  };
  const now = results(table),
    then = results(table);
  const differs = new Uint8Array(table.tokens),
    changed = new Int32Array(table.records.length);
  const trained = (r) => state.options.standard_answers || !table.records[r].standard_answer;
  const view = { table, state, now, then, differs, changed, trained, choices, job, send, signal: ended.signal };

  const list = makeList(view, (r, opened) => {
    select(r);
    if (opened) tabs.open("answer");
  });
  const answer = makeAnswer(view);
  const panel = makeOptions(view, {
    set(name, value, done) {
      state.options = { ...state.options, [name]: value };
      later(done);
    },
    preset(name) {
      state.options = { ...choices[name] };
      later(true);
    },
    compare(name) {
      state.compared = name;
      compare();
      later(true);
    },
    use() {
      showDocument(root, view);
    },
  });
  const stepper = makeStepper(table, state.step, (step) => {
    state.step = step;
    compare();
    panel.plot();
    later(true);
  });
  const tabs = makeTabs(root);
  root.classList.add("saliency");
  root.replaceChildren(
    h("header", { class: "bar" }, h("h1", {}, "Saliency Map"), tools, facts(data, table), stepper.element, makeTheme()),
    tabs.element,
    list.element,
    answer.element,
    panel.element,
  );

  let waiting = 0,
    resting = false;
  function later(done) {
    resting ||= done;
    waiting ||= requestAnimationFrame(() => {
      waiting = 0;
      recompute(resting);
      resting = false;
    });
  }
  function compare() {
    weigh(table, state.step, choices[state.compared], then);
  }
  function recompute(rest) {
    weigh(table, state.step, state.options, now);
    for (let r = 0; r < table.records.length; r++) {
      changed[r] = 0;
      for (let t = table.starts[r]; t < table.starts[r + 1]; t++) {
        const far = Math.abs(now.likelihood[t] - then.likelihood[t]) + Math.abs(now.unlikelihood[t] - then.unlikelihood[t]);
        differs[t] = far > NEAR ? 1 : 0;
        changed[r] += differs[t];
      }
    }
    panel.update();
    if (rest) list.arrange();
    list.update();
    answer.update();
  }
  function select(r) {
    state.record = r;
    state.token = 0;
    answer.show();
    list.reveal(r);
  }

  const keys = (event) => {
    if (
      event.ctrlKey ||
      event.metaKey ||
      event.altKey ||
      !root.isConnected ||
      event.target.closest("dialog, input[type=text], input[type=search]")
    )
      return;
    const action = { j: () => list.move(1), k: () => list.move(-1), "[": () => stepper.move(-1), "]": () => stepper.move(1) }[event.key];
    if (action) {
      action();
      event.preventDefault();
    }
  };
  root.ownerDocument.addEventListener("keydown", keys, { signal: ended.signal });
  compare();
  panel.plot();
  recompute(true);
  if (kept && table.records[state.record]) {
    const { token } = state;
    select(state.record);
    answer.point(token);
    tabs.open(kept.panel);
    [answer.element, panel.element].forEach((element, n) => (element.scrollTop = kept.scrolls[n]));
  } else if (table.records.length) select(list.first());
  return {
    ...view,
    select,
    recompute: () => recompute(true),
    options: () => state.options,
    // Whether the job still takes options.
    sends(whether) {
      state.sends = whether;
    },
    // What the map shows, for one that takes its place.
    kept() {
      const scrolls = [answer.element, panel.element].map((element) => element.scrollTop);
      return { state, panel: root.dataset.panel, scrolls };
    },
    end() {
      ended.abort();
    },
  };
}

function facts({ saliency, job }, table) {
  const answers = plural(table.records.length, "answer"),
    left = saliency.left_out;
  const parts = [
    job ? visible(job.model.split("/").filter(Boolean).at(-1) ?? job.model) : null,
    left ? `the first ${answers} of ${count(table.records.length + left)}, for their size` : answers,
    plural(table.tokens, "token"),
  ];
  return h("p", { class: "facts" }, ...parts.filter((text) => text !== null).map((text) => h("span", {}, text)));
}

function makeTheme() {
  const themes = ["auto", "light", "dark"],
    button = h("button", { class: "quiet theme" });
  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
    setText(button, { auto: "◐", light: "○", dark: "●" }[theme]);
    button.setAttribute("aria-label", `Theme: ${theme}`);
    button.title = `Theme: ${theme}`;
    document.dispatchEvent(new Event("themechange"));
  };
  button.addEventListener("click", () => show(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % 3]));
  show(document.documentElement.dataset.theme ?? "auto");
  return button;
}

function makeTabs(root) {
  const names = { answer: "Answer", list: "All answers", options: "Options" };
  const buttons = Object.entries(names).map(([name, label]) => h("button", { "data-panel": name, onclick: () => open(name) }, label));
  function open(name) {
    root.dataset.panel = name;
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.panel === name));
  }
  open("answer");
  return { element: h("nav", { class: "tabs", "aria-label": "Parts of the page" }, ...buttons), open };
}

function makeStepper(table, at, changed) {
  const names = ["before training", ...table.epochs.map((epoch) => `epoch ${epoch}`)],
    title = h("output", {});
  const back = h("button", { class: "quiet", "aria-label": "Earlier scores", onclick: () => move(-1) }, "‹");
  const on = h("button", { class: "quiet", "aria-label": "Later scores", onclick: () => move(1) }, "›");
  function show() {
    setText(title, names.length > 1 ? `${names[at]} · ${at + 1} of ${names.length}` : names[at]);
    back.disabled = at === 0;
    on.disabled = at === names.length - 1;
  }
  function move(by) {
    const next = Math.min(names.length - 1, Math.max(0, at + by));
    if (next === at) return;
    at = next;
    show();
    changed(at);
  }
  show();
  return {
    element: h(
      "div",
      { class: "stepper", role: "group", "aria-label": "Scores of" },
      h("span", { class: "label" }, "Scores"),
      back,
      title,
      on,
    ),
    move,
  };
}

// The document of a job with these options: the job of this page where it is known, else its method alone.
export function jobDocument(job, options) {
  const method = { name: "nlft", ...options };
  return JSON.stringify(job ? { ...job, method } : { method }, null, 2);
}

function showDocument(root, { job, state, choices, send }) {
  const text = h("textarea", { readonly: true, rows: 16, "aria-label": "Job document", spellcheck: "false" });
  const commands = h("textarea", { readonly: true, rows: 3, "aria-label": "Options of the command line", spellcheck: "false" });
  const told = h("p", { role: "status" });
  const toJob = h(
    "button",
    {
      class: "primary",
      hidden: !send || !state.sends,
      onclick: async () => {
        toJob.disabled = true;
        setText(told, await send(state.options).catch((error) => error.message));
        toJob.disabled = false;
      },
    },
    "Send to the running job",
  );
  const copy = async (area) => {
    try {
      await navigator.clipboard.writeText(area.value);
      setText(told, "Copied.");
    } catch {
      area.focus();
      area.select();
      setText(told, "Selected: copy it with your keyboard.");
    }
  };
  text.value = jobDocument(job, state.options);
  const set = FIELDS.filter(({ name }) => state.options[name] !== choices.corrected[name]);
  commands.value =
    set.map(({ name }) => `--set method.${name}=${JSON.stringify(state.options[name])}`.replaceAll('"', "")).join(" ") || "(the defaults)";
  const dialog = h(
    "dialog",
    { "aria-label": "Use these options", onclose: () => dialog.remove() },
    h("h2", {}, "Use these options"),
    h("p", {}, job ? "This page's job with these options, as job.json:" : "The method of a job with these options:"),
    text,
    h("p", {}, "The same for edge-agent train and submit:"),
    commands,
    h(
      "div",
      { class: "buttons" },
      told,
      h("button", { onclick: () => copy(commands) }, "Copy the options"),
      h("button", { class: toJob.hidden ? "primary" : null, autofocus: true, onclick: () => copy(text) }, "Copy the document"),
      toJob,
      h("button", { onclick: () => dialog.close() }, "Close"),
    ),
  );
  root.append(dialog);
  dialog.showModal();
  if (toJob.hidden) copy(text);
}
