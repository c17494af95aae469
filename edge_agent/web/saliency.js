// The Saliency Map: answers as coloured tokens beside the options that their weights come from.

import { JOINED, SALIENT, prepare, results, weigh } from "./weights.js";
import { FIELDS, makeControl, makeDistribution } from "./options.js";
import { count, h, number, percent, plural, probability, ratio, setText, signed, visible } from "./dom.js";

const LEVELS = 8, FULL = 2;  // a weight of 2 has the strongest colour
const ROW = 50;  // pixels of a line of the list, as in saliency.css
const NEAR = 1e-9;  // weights closer than this are the same
const DULL = /^(0|0 %|1\.0+)$/;  // says that nothing has changed
const CELL = 66, HEADING = 74;  // pixels of a column of the table of tokens, and of its headings
const MODES = {
  weight: { label: "weight", low: "made unlikely", high: "imitated" },
  change: { label: "change", low: "lower than compared", high: "higher" },
  standard: { label: "c/b", low: "c below b", high: "c above b" },
  judge: { label: "j/b", low: "j above b", high: "j below b" },
};

// Builds the map inside `root`. `data` has the document `saliency`, the job document or null, and the `presets` by name.
// Returns what tests and other pages may use of it.
export function mount(root, data) {
  const { saliency, job, presets } = data;
  const table = prepare(saliency);
  const choices = { corrected: presets.corrected, released: presets.released, job: saliency.options };
  const state = {
    options: { ...saliency.options }, compared: "job", step: 0, record: 0, token: 0, mode: "weight",
    sort: "flagged", down: true, filter: "all", search: "",
  };
  const now = results(table), then = results(table);
  const differs = new Uint8Array(table.tokens), changed = new Int32Array(table.records.length);
  const trained = (r) => state.options.standard_answers || !table.records[r].standard_answer;
  const view = { table, state, now, then, differs, changed, trained, choices, job };

  const list = makeList(view, (r, opened) => { select(r); if (opened) tabs.open("answer"); });
  const answer = makeAnswer(view);
  const panel = makeOptions(view, {
    set(name, value, done) { state.options = { ...state.options, [name]: value }; later(done); },
    preset(name) { state.options = { ...choices[name] }; later(true); },
    compare(name) { state.compared = name; compare(); later(true); },
    use() { showDocument(root, view); },
  });
  const stepper = makeStepper(table, (step) => { state.step = step; compare(); panel.plot(); later(true); });
  const tabs = makeTabs(root);
  root.classList.add("saliency");
  root.replaceChildren(
    h("header", { class: "bar" },
      h("h1", {}, "Saliency Map"), facts(data, table), stepper.element, makeTheme()),
    tabs.element, list.element, answer.element, panel.element);

  let waiting = 0, resting = false;
  function later(done) {
    resting ||= done;
    waiting ||= requestAnimationFrame(() => { waiting = 0; recompute(resting); resting = false; });
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

  root.ownerDocument.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !root.isConnected || event.target.closest("dialog, input[type=text], input[type=search]")) return;
    const action = { j: () => list.move(1), k: () => list.move(-1), "[": () => stepper.move(-1), "]": () => stepper.move(1) }[event.key];
    if (action) { action(); event.preventDefault(); }
  });
  compare();
  panel.plot();
  recompute(true);
  if (table.records.length) select(list.first());
  return { ...view, select, recompute: () => recompute(true), options: () => state.options };
}

function facts({ saliency, job }, table) {
  const answers = plural(table.records.length, "answer"), left = saliency.left_out;
  const parts = [
    job ? visible(job.model.split("/").filter(Boolean).at(-1) ?? job.model) : null,
    left ? `the first ${answers} of ${count(table.records.length + left)}, for their size` : answers, plural(table.tokens, "token"),
  ];
  return h("p", { class: "facts" }, ...parts.filter((text) => text !== null).map((text) => h("span", {}, text)));
}

function makeTheme() {
  const themes = ["auto", "light", "dark"], button = h("button", { class: "quiet theme" });
  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
    setText(button, { auto: "◐", light: "○", dark: "●" }[theme]);
    button.setAttribute("aria-label", `Theme: ${theme}`);
    button.title = `Theme: ${theme}`;
    document.dispatchEvent(new Event("themechange"));
  };
  button.addEventListener("click", () => show(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % 3]));
  show("auto");
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

function makeStepper(table, changed) {
  const names = ["before training", ...table.epochs.map((epoch) => `epoch ${epoch}`)], title = h("output", {});
  let at = 0;
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
  return { element: h("div", { class: "stepper", role: "group", "aria-label": "Scores of" }, h("span", { class: "label" }, "Scores"), back, title, on), move };
}

// Signed degree of a token, from −1 to 1, in the chosen mode.
function degree({ state, table, now, then }, t) {
  const scores = table.steps[state.step];
  const fold = (logp) => (Number.isNaN(logp) ? 0 : logp / Math.log(16));  // sixteen times as likely is the strongest colour
  if (state.mode === "standard") return fold(scores.standard[t] - scores.base[t]);
  if (state.mode === "judge") return -fold(scores.judge[t] - scores.base[t]);
  const weight = now.likelihood[t] - now.unlikelihood[t];
  return (state.mode === "change" ? weight - (then.likelihood[t] - then.unlikelihood[t]) : weight) / FULL;
}

function level(view, t) {
  const strength = degree(view, t), rounded = Math.min(LEVELS, Math.round(LEVELS * Math.abs(strength)));
  const shown = rounded === 0 && Math.abs(strength) > NEAR ? 1 : rounded;
  return shown === 0 ? 0 : strength > 0 ? shown : -shown;
}

function levelClass(at) {
  return at === 0 ? "" : at > 0 ? `p${at}` : `n${-at}`;
}

// ---------------------------------------------------------------------------------------------------------------- the list of answers

const SORTS = {
  order: { label: "#", of: (view, r) => r },
  flagged: { label: "flagged", of: (view, r) => flaggedShare(view, r) },
  loss: { label: "loss", of: (view, r) => view.now.recordLoss[r] },
  length: { label: "tokens", of: (view, r) => view.table.starts[r + 1] - view.table.starts[r] },
};

// Of an incorrect answer; correct ones have no flagged tokens and come last.
function flaggedShare({ table, now }, r) {
  return table.incorrect[r] ? now.salient[r] / (table.starts[r + 1] - table.starts[r]) : -1;
}

function makeList(view, chosen) {
  const { table, state, now, changed } = view;
  let shown = [], rows = new Map(), colours = null, texts = null;
  const heads = Object.entries(SORTS).map(([name, sort]) => h("button", {
    class: `quiet ${name}`, "data-sort": name, title: `Sort by ${name === "order" ? "order" : sort.label}`,
    onclick: () => {
      state.down = state.sort === name ? !state.down : name !== "order";
      state.sort = name;
      arrange();
      update();
    },
  }, sort.label));
  const filters = ["all", "correct", "incorrect", "changed"].map((name) => h("label", {},
    h("input", { type: "radio", name: "filter", value: name, checked: name === "all", onchange: () => { state.filter = name; arrange(); update(); } }),
    h("span", {}, name)));
  const search = h("input", {
    type: "search", placeholder: "Search", "aria-label": "Search questions and answers",
    oninput: () => { state.search = search.value.toLowerCase(); arrange(); update(); },
  });
  const found = h("p", { class: "found", "aria-live": "polite" });
  const space = h("div", { class: "space", role: "presentation" });
  const scroller = h("div", { class: "rows", role: "listbox", tabindex: 0, "aria-label": "Answers" }, space);
  const element = h("section", { class: "panel list", "aria-label": "Answers" },
    h("div", { class: "tools" }, search, h("fieldset", { class: "segments" }, h("legend", { class: "hidden" }, "Show"), ...filters)),
    h("div", { class: "heads" }, ...heads), scroller, found);

  function arrange() {
    texts ??= table.records.map((record) => `${record.id}\n${record.question}\n${record.tokens.join("")}`.toLowerCase());
    const keep = { all: () => true, correct: (r) => !table.incorrect[r], incorrect: (r) => table.incorrect[r], changed: (r) => changed[r] > 0 }[state.filter];
    shown = table.records.map((_, r) => r).filter((r) => keep(r) && texts[r].includes(state.search));
    const by = SORTS[state.sort].of, turn = state.down ? -1 : 1;
    const keys = table.records.map((_, r) => by(view, r));
    shown.sort((a, b) => (keys[a] === keys[b] ? a - b : turn * (keys[a] - keys[b])));
    for (const head of heads) {
      const own = head.dataset.sort === state.sort;
      head.setAttribute("aria-pressed", String(own));
      head.dataset.turn = own ? (state.down ? "down" : "up") : "";
    }
    space.style.height = `${shown.length * ROW}px`;
    setText(found, shown.length === table.records.length ? plural(shown.length, "answer") : `${count(shown.length)} of ${plural(table.records.length, "answer")}`);
  }

  // Only the lines in sight exist.
  function update() {
    const first = Math.max(0, Math.floor(scroller.scrollTop / ROW) - 2);
    const last = Math.min(shown.length, Math.ceil((scroller.scrollTop + scroller.clientHeight) / ROW) + 2);
    const next = new Map();
    for (let place = first; place < last; place++) {
      const r = shown[place], row = rows.get(r) ?? makeRow(r);
      row.element.style.top = `${place * ROW}px`;
      next.set(r, row);
      if (!row.element.isConnected) space.append(row.element);
      updateRow(row, r);
    }
    for (const [r, row] of rows) if (!next.has(r)) row.element.remove();
    rows = next;
    scroller.setAttribute("aria-activedescendant", rows.has(state.record) ? `answer-${state.record}` : "");
  }

  function makeRow(r) {
    const record = table.records[r], wrong = record.kind === "incorrect";
    const parts = { flagged: h("span", { class: "flagged" }), loss: h("span", { class: "loss" }), strip: h("canvas", { "aria-hidden": "true" }) };
    const element = h("div", { class: "row", role: "option", id: `answer-${r}`, onclick: () => chosen(r, true) },
      h("span", { class: `mark ${record.kind}`, title: record.kind }, wrong ? "✗" : "✓"),
      h("span", { class: "name", title: visible(name(record)) }, visible(record.id), record.standard_answer ? h("small", {}, " std") : null), parts.flagged, parts.loss,
      h("span", { class: "length" }, count(record.tokens.length)), parts.strip);
    return { element, ...parts };
  }

  function updateRow({ element, flagged, loss, strip }, r) {
    element.setAttribute("aria-selected", String(r === state.record));
    element.classList.toggle("changed", changed[r] > 0);
    element.classList.toggle("untrained", !view.trained(r));
    setText(flagged, table.incorrect[r] ? percent(flaggedShare(view, r)) : "");
    setText(loss, number(now.recordLoss[r], 2));
    draw(strip, r);
  }

  function draw(strip, r) {
    colours ??= readColours(element);
    const from = table.starts[r], length = table.starts[r + 1] - from;
    const width = strip.clientWidth, scale = globalThis.devicePixelRatio || 1;
    if (!width) return;
    strip.width = Math.round(width * scale);
    strip.height = Math.round(strip.clientHeight * scale);
    const context = strip.getContext("2d");
    for (let i = 0; i < length; i++) {
      context.fillStyle = colours.get(level(view, from + i));
      const left = Math.floor(i * strip.width / length), right = Math.floor((i + 1) * strip.width / length);
      context.fillRect(left, 0, Math.max(1, right - left), strip.height);
    }
  }

  function reveal(r) {
    const place = shown.indexOf(r);
    if (place >= 0) {
      const top = place * ROW;
      if (top < scroller.scrollTop) scroller.scrollTop = top;
      else if (top + ROW > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = top + ROW - scroller.clientHeight;
    }
    update();
  }

  function move(by) {
    if (!shown.length) return;
    const place = shown.indexOf(state.record);
    chosen(shown[place < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, place + by))]);
  }

  scroller.addEventListener("scroll", update, { passive: true });
  scroller.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(scroller.clientHeight / ROW) - 1);
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    move(Number.isFinite(by) ? by : by < 0 ? -shown.length : shown.length);
  });
  const recolour = () => { colours = null; update(); };
  document.addEventListener("themechange", recolour);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
  new ResizeObserver(update).observe(scroller);
  return { element, arrange, update, reveal, move, first: () => shown[0] ?? 0 };
}

// Canvases know no classes: the colour of each level as the style sheet has it.
function readColours(parent) {
  const colours = new Map();
  for (let at = -LEVELS; at <= LEVELS; at++) {
    const probe = h("span", { class: `t ${levelClass(at) || "zero"}` });
    parent.append(probe);
    colours.set(at, getComputedStyle(probe).backgroundColor);
    probe.remove();
  }
  return colours;
}

function name(record) {
  return record.standard_answer ? `${record.id} · standard answer` : record.id;
}

// ---------------------------------------------------------------------------------------------------------------- one answer

function makeAnswer(view) {
  const { table, state, now, then, differs } = view;
  const title = h("h2", {}), facts = h("p", { class: "facts" }), warning = h("p", { class: "warning", hidden: true });
  const question = h("div", { class: "text" }), standard = h("div", { class: "text" }), judgment = h("div", { class: "text" });
  const standardPart = part("Standard answer", standard), judgmentPart = part("Judgment", judgment);
  const flow = h("div", { class: "flow", role: "listbox", tabindex: 0, "aria-label": "Tokens of the answer" });
  const details = makeDetails(view), rows = makeTokenTable(view, (i) => point(i));
  const modes = Object.entries(MODES).map(([mode, { label }]) => h("label", {},
    h("input", { type: "radio", name: "mode", value: mode, checked: mode === state.mode, onchange: () => setMode(mode) }), h("span", {}, label)));
  const legend = makeLegend();
  const element = h("main", { class: "panel answer", "aria-label": "Answer" },
    h("div", { class: "title" }, title, facts), warning,
    part("Question", question),
    h("div", { class: "part" },
      h("div", { class: "colours" }, h("h3", {}, "Answer"),
        h("fieldset", { class: "segments" }, h("legend", { class: "hidden" }, "Colour by"), ...modes), legend.element),
      h("div", { class: "beside" }, flow, details.element)),
    h("div", { class: "pair" }, standardPart, judgmentPart),
    h("div", { class: "part" }, h("h3", {}, "Tokens"), rows.element));
  let spans = [];

  function setMode(mode) {
    state.mode = mode;
    legend.show(mode);
    document.dispatchEvent(new Event("themechange"));  // the strips of the list have other colours
    update();
  }

  function show() {
    const record = table.records[state.record];
    setText(title, visible(name(record)));
    setText(question, visible(record.question));
    standardPart.hidden = record.answer === null || record.standard_answer;
    setText(standard, visible(record.answer ?? ""));
    judgmentPart.hidden = record.judgment === null;
    setText(judgment, visible(record.judgment ?? ""));
    spans = record.tokens.map((token, i) => h("span", { class: "t", role: "option", id: `token-${i}`, "data-i": i }, visible(token)));
    flow.replaceChildren(...spans);
    rows.show();
    point(0);
    update();
    element.scrollTop = 0;
  }

  function update() {
    const r = state.record, from = table.starts[r], length = spans.length;
    if (!length) return;
    for (let i = 0; i < length; i++) {
      const t = from + i;
      const classes = ["t", levelClass(level(view, t)), now.role[t] === SALIENT ? "salient" : "", differs[t] ? "differs" : "", i === state.token ? "at" : ""];
      const joined = classes.filter(Boolean).join(" ");
      if (spans[i].className !== joined) spans[i].className = joined;
    }
    const wrong = table.incorrect[r], salient = now.salient[r];
    const words = [wrong ? "incorrect" : "correct", plural(length, "token"),
      wrong ? `${count(salient)} flagged, ${percent(salient / length)}` : `${percent(salient / length)} above τ`,
      `loss ${number(now.recordLoss[r])}`];
    if (view.changed[r]) words.push(`${number(then.recordLoss[r])} as compared, ${plural(view.changed[r], "weight")} differ${view.changed[r] === 1 ? "s" : ""}`);
    setText(facts, words.join(" · "));
    const reasons = [];
    if (!view.trained(r)) reasons.push("Standard answers are not trained on under these options.");
    if (now.unknown[r]) reasons.push("Clusters of this answer reach hidden states whose products were not recorded: they are shown as far as is known.");
    setText(warning, reasons.join(" "));
    warning.hidden = reasons.length === 0;
    details.update();
    rows.update();
  }

  function point(i) {
    spans[state.token]?.classList.remove("at");
    spans[state.token]?.removeAttribute("aria-selected");
    state.token = i;
    spans[i]?.classList.add("at");
    spans[i]?.setAttribute("aria-selected", "true");
    flow.setAttribute("aria-activedescendant", `token-${i}`);
    details.update();
    rows.point(i);
  }

  const under = (event) => event.target.closest?.("[data-i]");
  flow.addEventListener("pointerover", (event) => { const span = under(event); if (span && event.pointerType === "mouse") point(Number(span.dataset.i)); });
  flow.addEventListener("click", (event) => { const span = under(event); if (span) point(Number(span.dataset.i)); });
  flow.addEventListener("keydown", (event) => {
    const last = spans.length - 1;
    const next = { ArrowRight: state.token + 1, ArrowLeft: state.token - 1, Home: 0, End: last, ArrowDown: beneath(1), ArrowUp: beneath(-1) }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    point(Math.min(last, Math.max(0, next)));
    spans[state.token].scrollIntoView({ block: "nearest" });
  });

  // The token of the next line, or of the one before, that is nearest to the one pointed at.
  function beneath(direction) {
    const own = spans[state.token]?.getBoundingClientRect();
    if (!own) return state.token;
    let best = state.token, line = null, nearest = Infinity;
    for (let i = state.token + direction; i >= 0 && i < spans.length; i += direction) {
      const box = spans[i].getBoundingClientRect();
      if (Math.abs(box.top - own.top) < 4) continue;
      line ??= box.top;
      if (Math.abs(box.top - line) > 4) break;
      const far = Math.abs(box.left - own.left);
      if (far < nearest) { nearest = far; best = i; }
    }
    return best;
  }

  legend.show(state.mode);
  return { element, show, update };
}

// A token by itself, where a blank could not be seen.
function marked(token) {
  return visible(token).replace(/^ +$/, (blanks) => "␣".repeat(blanks.length));
}

function part(title, ...children) {
  return h("section", { class: "part" }, h("h3", {}, title), ...children);
}

function makeLegend() {
  const low = h("span", {}), high = h("span", {});
  const swatches = [];
  for (let at = -LEVELS; at <= LEVELS; at += 2) swatches.push(h("span", { class: `t ${levelClass(at) || "zero"}` }));
  const element = h("div", { class: "legend" }, low, h("span", { class: "ramp", "aria-hidden": "true" }, ...swatches), high);
  return { element, show(mode) { setText(low, MODES[mode].low); setText(high, MODES[mode].high); } };
}

// What is known of the token pointed at, and why it has its weight.
function makeDetails(view) {
  const { table, state, now, then } = view;
  const text = h("p", { class: "token" }), role = h("p", { class: "role" });
  const line = (label, title) => {
    const value = h("td", {}), bar = h("span", { class: "fill" }), bound = h("span", { class: "bound" });
    const cells = h("tr", {}, h("th", { scope: "row", title }, label), value, h("td", { class: "gauge" }, h("span", { class: "rail" }, bar, bound)));
    return { cells, value, bar, bound };
  };
  const plain = (label, title) => {
    const value = h("td", {}), note = h("td", { class: "note" });
    return { cells: h("tr", {}, h("th", { scope: "row", title }, label), value, note), value, note };
  };
  const base = line("b", "P after the question"), standard = line("c", "P with the standard answer"), judge = line("j", "P with the judgment");
  const overBase = plain("j/b"), overStandard = plain("j/c"), standardOverBase = plain("c/b");
  const weight = plain("weight"), loss = plain("loss", "Share of the loss of this answer");
  const element = h("section", { class: "details", "aria-label": "Token", "aria-live": "polite" }, text, role,
    h("table", {}, h("tbody", {}, base.cells, standard.cells, judge.cells),
      h("tbody", {}, overBase.cells, overStandard.cells, standardOverBase.cells), h("tbody", {}, weight.cells, loss.cells)));

  function update() {
    const record = table.records[state.record];
    if (!record) return;
    const t = table.starts[state.record] + state.token, scores = table.steps[state.step], o = state.options, wrong = table.incorrect[state.record];
    const b = Math.exp(scores.base[t]), c = Math.exp(scores.standard[t]), j = Math.exp(scores.judge[t]);
    setText(text, marked(record.tokens[state.token] ?? ""));
    setText(role, `${state.token + 1} of ${count(record.tokens.length)} · ${roleName(now.role[t], wrong)}`);
    for (const [row, p] of [[base, b], [standard, c], [judge, j]]) {
      setText(row.value, probability(p));
      row.bar.style.width = `${100 * (p || 0)}%`;
      row.cells.hidden = Number.isNaN(p);
    }
    const against = (row, value, bound) => {
      setText(row.value, ratio(value));
      setText(row.note, bound === null ? "" : value > bound ? `✓ above ${bound}` : `not above ${bound}`);
      row.cells.hidden = Number.isNaN(value);
    };
    against(overBase, j / b, o.judge_base_ratio);
    against(overStandard, j / c, o.judge_standard_ratio);
    against(standardOverBase, c / b, null);
    for (const [row, p, bound, decides] of [[standard, c, o.correct_threshold, !wrong], [judge, j, o.judge_minimum, wrong]]) {
      row.cells.classList.toggle("passes", Boolean(decides) && p > bound);
      row.bound.hidden = !decides;
      row.bound.style.left = `${100 * bound}%`;
    }
    base.bound.hidden = true;
    element.classList.toggle("wrong", Boolean(wrong));
    const own = now.likelihood[t] - now.unlikelihood[t], other = then.likelihood[t] - then.unlikelihood[t];
    setText(weight.value, signed(own));
    setText(weight.note, Math.abs(own - other) > NEAR ? `${signed(other)} as compared` : own < 0 ? "unlikelihood" : own > 0 ? "likelihood" : "not trained");
    const length = record.tokens.length, total = now.recordLoss[state.record] * length;
    setText(loss.value, total > 0 ? percent(now.loss[t] / total) : "0 %");
    setText(loss.note, number(now.loss[t] / length));
  }
  return { element, update };
}

function roleName(role, wrong) {
  if (role === SALIENT) return wrong ? "losing saliency token" : "scoring saliency token";
  return role === JOINED ? "joined by its cluster" : "other token";
}

// Every token with its numbers under it, as many columns as the line has room for.
function makeTokenTable(view, pointed) {
  const { table, state, now } = view;
  const LINES = [
    { label: "b", title: "P after the question", of: (s, t) => probability(Math.exp(s.base[t])) },
    { label: "c", title: "P with the standard answer", of: (s, t) => probability(Math.exp(s.standard[t])), standard: true },
    { label: "j", title: "P with the judgment", of: (s, t) => probability(Math.exp(s.judge[t])), judge: true },
    { label: "c/b", of: (s, t) => ratio(Math.exp(s.standard[t] - s.base[t])), standard: true },
    { label: "j/b", of: (s, t) => ratio(Math.exp(s.judge[t] - s.base[t])), judge: true },
    { label: "j/c", of: (s, t) => ratio(Math.exp(s.judge[t] - s.standard[t])), judge: true, standard: true },
    { label: "weight", of: (s, t) => signed(now.likelihood[t] - now.unlikelihood[t]), strong: true },
    { label: "loss share", of: (s, t, total) => (total > 0 ? percent(now.loss[t] / total) : "0 %") },
  ];
  const element = h("div", { class: "tokens" });
  let cells = [], heads = [], columns = 0, at = -1, visibleNow = false;

  function show() {
    columns = 0;
    at = -1;
    build();
  }

  function build() {
    const record = table.records[state.record], wide = Math.max(2, Math.floor((element.clientWidth - HEADING) / CELL));
    if (!record || !element.clientWidth || wide === columns) return;
    columns = wide;
    const lines = LINES.filter((line) => (!line.standard || record.standard) && (!line.judge || record.judge));
    cells = lines.map((line) => ({ line, boxes: [] }));
    heads = [];
    const tables = [];
    for (let start = 0; start < record.tokens.length; start += columns) {
      const some = record.tokens.slice(start, start + columns);
      const top = some.map((token, n) => h("th", { scope: "col", "data-i": start + n }, h("span", { class: "t" }, marked(token).replaceAll("\n", ""))));
      heads.push(...top.map((head) => head.firstChild));
      tables.push(h("table", {},
        h("thead", {}, h("tr", {}, h("td", {}), ...top)),
        h("tbody", {}, ...cells.map(({ line, boxes }) => {
          const own = some.map((_, n) => h("td", { "data-i": start + n }));
          boxes.push(...own);
          return h("tr", { class: line.strong ? "strong" : null }, h("th", { scope: "row", title: line.title }, line.label), ...own);
        }))));
    }
    element.replaceChildren(...tables);
    update();
  }

  function update() {
    if (!columns || !visibleNow) return;
    const from = table.starts[state.record], scores = table.steps[state.step];
    const total = now.recordLoss[state.record] * heads.length;
    heads.forEach((head, i) => { head.className = `t ${levelClass(level(view, from + i))}${view.differs[from + i] ? " differs" : ""}`; });
    for (const { line, boxes } of cells) {
      boxes.forEach((box, i) => {
        const value = line.of(scores, from + i, total);
        setText(box, value);
        box.classList.toggle("dull", DULL.test(value));
      });
    }
  }

  function point(i) {
    for (const box of [heads[at]?.parentNode, ...cells.map(({ boxes }) => boxes[at])]) box?.classList.remove("at");
    at = i;
    for (const box of [heads[at]?.parentNode, ...cells.map(({ boxes }) => boxes[at])]) box?.classList.add("at");
  }

  element.addEventListener("click", (event) => { const box = event.target.closest("[data-i]"); if (box) pointed(Number(box.dataset.i)); });
  new ResizeObserver(() => { build(); point(state.token); }).observe(element);
  new IntersectionObserver(([entry]) => { visibleNow = entry.isIntersecting; update(); }, { rootMargin: "200px" }).observe(element);
  return { element, show, update, point };
}

// ---------------------------------------------------------------------------------------------------------------- options

const PRESETS = { corrected: "Corrected", released: "Released", job: "This job" };

function makeOptions(view, actions) {
  const { table, state, now, then, choices } = view;
  const controls = new Map(FIELDS.map((field) => [field.name, makeControl(field, (value, done) => actions.set(field.name, value, done))]));
  const groups = Map.groupBy(FIELDS, (field) => field.group);
  const figures = ["flagged", "loss", "differ"].map(() => ({ value: h("dd", {}), note: h("dd", { class: "note" }) }));
  const presets = Object.entries(PRESETS).map(([name, label]) => h("button", { "data-preset": name, onclick: () => actions.preset(name) }, label));
  const compared = h("select", { "aria-label": "Compare with", onchange: () => actions.compare(compared.value) },
    ...Object.entries(PRESETS).map(([name, label]) => h("option", { value: name, selected: name === state.compared }, label.toLowerCase())));
  const losses = makeDistribution("Loss of the answers; the line: as compared");
  const notes = { Clusters: h("p", { class: "hint" }), "When training": h("p", { class: "hint" }, "What has no effect on this page is for the next run.") };
  const element = h("aside", { class: "panel options", "aria-label": "Options" },
    h("div", { class: "totals" },
      h("dl", {}, ...["Flagged of incorrect", "Mean loss", "Weights that differ"].map((label, n) =>
        h("div", {}, h("dt", {}, label), figures[n].value, figures[n].note)))),
    h("div", { class: "presets" }, h("div", { class: "buttons", role: "group", "aria-label": "Presets" }, ...presets),
      h("label", { class: "compare" }, "compare with", compared)),
    ...[...groups].map(([group, fields]) => h("section", { class: "group" }, h("h3", {}, group),
      notes[group] ?? null, ...fields.map((field) => controls.get(field.name).element))),
    h("section", { class: "group" }, h("h3", {}, "All answers"), losses.element),
    h("div", { class: "use" }, h("button", { class: "primary", onclick: actions.use }, "Use these options")));

  function plot() {
    for (const field of FIELDS) if (field.plot && field.plot !== "flagged") controls.get(field.name).plot(distribution(table, state.step, field.plot));
  }

  function update() {
    const records = table.records.map((_, r) => r), own = records.filter(view.trained);
    const others = records.filter((r) => choices[state.compared].standard_answers || !table.records[r].standard_answer);
    const wrong = records.filter((r) => table.incorrect[r]);
    const flagged = (out) => total(wrong, (r) => out.salient[r]) / total(wrong, (r) => table.starts[r + 1] - table.starts[r]);
    const mean = (out, of) => total(of, (r) => out.recordLoss[r]) / of.length;
    const different = total(records, (r) => view.changed[r]);
    const shown = [
      [percent(flagged(now)), `vs ${percent(flagged(then))}`],
      [number(mean(now, own)), `vs ${number(mean(then, others))}`],
      [count(different), `in ${plural(total(records, (r) => (view.changed[r] ? 1 : 0)), "answer")}`],
    ];
    shown.forEach(([value, note], n) => { setText(figures[n].value, value); setText(figures[n].note, note); });
    const partly = total(records, (r) => now.unknown[r]);
    setText(notes.Clusters, `By the hidden states before training, also for later scores.${partly ? ` ${plural(partly, "answer")}: not all is known.` : ""}`);
    for (const field of FIELDS) {
      const control = controls.get(field.name), value = state.options[field.name];
      control.show(value);
      control.element.classList.toggle("differs", value !== choices[state.compared][field.name]);
    }
    controls.get("imitate_flagged_share").plot(wrong.map((r) => flaggedShare(view, r)));
    losses.draw(own.map((r) => now.recordLoss[r]), others.map((r) => then.recordLoss[r]));
    for (const button of presets) button.setAttribute("aria-pressed", String(FIELDS.every(({ name }) => choices[button.dataset.preset][name] === state.options[name])));
  }
  return { element, plot, update };
}

function total(records, of) {
  return records.reduce((sum, r) => sum + of(r), 0);
}

// What a threshold decides on, over all answers that it decides on.
function distribution(table, step, plot) {
  const { base, standard, judge } = table.steps[step], values = [];
  table.records.forEach((_, r) => {
    const from = table.starts[r], to = table.starts[r + 1], wrong = table.incorrect[r];
    if (plot === "distance") { values.push(...neighbours(table.products[r], to - from)); return; }
    if ((plot === "standard") === Boolean(wrong)) return;
    for (let t = from; t < to; t++) {
      values.push(Math.exp({ standard: standard[t], judge: judge[t], overBase: judge[t] - base[t], overStandard: judge[t] - standard[t] }[plot]));
    }
  });
  return values;
}

function neighbours(products, length) {
  if (products === null || products.width < 2) return [];
  const { values, width } = products;
  return Array.from({ length: length - 1 }, (_, n) => 1 - values[(n + 1) * width + 1] / Math.sqrt(values[n * width] * values[(n + 1) * width]));
}

// ---------------------------------------------------------------------------------------------------------------- the job document

// The document of a job with these options: the job of this page where it is known, else its method alone.
export function jobDocument(job, options) {
  const method = { name: "nlft", ...options };
  return JSON.stringify(job ? { ...job, method } : { method }, null, 2);
}

function showDocument(root, { job, state, choices }) {
  const text = h("textarea", { readonly: true, rows: 16, "aria-label": "Job document", spellcheck: "false" });
  const commands = h("textarea", { readonly: true, rows: 3, "aria-label": "Options of the command line", spellcheck: "false" });
  const told = h("p", { role: "status" });
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
  commands.value = set.map(({ name }) => `--set method.${name}=${JSON.stringify(state.options[name])}`.replaceAll('"', "")).join(" ") || "(the defaults)";
  const dialog = h("dialog", { "aria-label": "Use these options", onclose: () => dialog.remove() },
    h("h2", {}, "Use these options"),
    h("p", {}, job ? "This page's job with these options, as job.json:" : "The method of a job with these options:"), text,
    h("p", {}, "The same for edge-agent train and submit:"), commands,
    h("div", { class: "buttons" }, told,
      h("button", { onclick: () => copy(commands) }, "Copy the options"), h("button", { class: "primary", autofocus: true, onclick: () => copy(text) }, "Copy the document"),
      h("button", { onclick: () => dialog.close() }, "Close")));
  root.append(dialog);
  dialog.showModal();
  copy(text);
}
