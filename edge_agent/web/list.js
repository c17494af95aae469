// The list of all answers: a line each, of which only those in sight exist.

import { count, h, number, percent, plural, setText, visible } from "./dom.js";
import { LEVELS, answerName, flaggedShare, level, levelClass } from "./degree.js";

const ROW = 50; // pixels of a line, as in saliency.css

const SORTS = {
  order: { label: "#", of: (view, r) => r },
  flagged: { label: "flagged", of: (view, r) => flaggedShare(view, r) },
  loss: { label: "loss", of: (view, r) => view.now.recordLoss[r] },
  length: { label: "tokens", of: (view, r) => view.table.starts[r + 1] - view.table.starts[r] },
};

export function makeList(view, chosen) {
  const { table, state, now, changed } = view;
  let shown = [],
    rows = new Map(),
    colours = null,
    texts = null;
  const heads = Object.entries(SORTS).map(([name, sort]) =>
    h(
      "button",
      {
        class: `quiet ${name}`,
        "data-sort": name,
        title: `Sort by ${name === "order" ? "order" : sort.label}`,
        onclick: () => {
          state.down = state.sort === name ? !state.down : name !== "order";
          state.sort = name;
          arrange();
          update();
        },
      },
      sort.label,
    ),
  );
  const filters = ["all", "correct", "incorrect", "changed"].map((name) =>
    h(
      "label",
      {},
      h("input", {
        type: "radio",
        name: "filter",
        value: name,
        checked: name === state.filter,
        onchange: () => {
          state.filter = name;
          arrange();
          update();
        },
      }),
      h("span", {}, name),
    ),
  );
  const search = h("input", {
    type: "search",
    placeholder: "Search",
    "aria-label": "Search questions and answers",
    value: state.search,
    oninput: () => {
      state.search = search.value.toLowerCase();
      arrange();
      update();
    },
  });
  const found = h("p", { class: "found", "aria-live": "polite" });
  const space = h("div", { class: "space", role: "presentation" });
  const scroller = h("div", { class: "rows", role: "listbox", tabindex: 0, "aria-label": "Answers" }, space);
  const element = h(
    "section",
    { class: "panel list", "aria-label": "Answers" },
    h("div", { class: "tools" }, search, h("fieldset", { class: "segments" }, h("legend", { class: "hidden" }, "Show"), ...filters)),
    h("div", { class: "heads" }, ...heads),
    scroller,
    found,
  );

  function arrange() {
    texts ??= table.records.map((record) => `${record.id}\n${record.question}\n${record.tokens.join("")}`.toLowerCase());
    const keep = {
      all: () => true,
      correct: (r) => !table.incorrect[r],
      incorrect: (r) => table.incorrect[r],
      changed: (r) => changed[r] > 0,
    }[state.filter];
    shown = table.records.map((_, r) => r).filter((r) => keep(r) && texts[r].includes(state.search));
    const by = SORTS[state.sort].of,
      turn = state.down ? -1 : 1;
    const keys = table.records.map((_, r) => by(view, r));
    shown.sort((a, b) => (keys[a] === keys[b] ? a - b : turn * (keys[a] - keys[b])));
    for (const head of heads) {
      const own = head.dataset.sort === state.sort;
      head.setAttribute("aria-pressed", String(own));
      head.dataset.turn = own ? (state.down ? "down" : "up") : "";
    }
    space.style.height = `${shown.length * ROW}px`;
    setText(
      found,
      shown.length === table.records.length
        ? plural(shown.length, "answer")
        : `${count(shown.length)} of ${plural(table.records.length, "answer")}`,
    );
  }

  // Only the lines in sight exist.
  function update() {
    const first = Math.max(0, Math.floor(scroller.scrollTop / ROW) - 2);
    const last = Math.min(shown.length, Math.ceil((scroller.scrollTop + scroller.clientHeight) / ROW) + 2);
    const next = new Map();
    for (let place = first; place < last; place++) {
      const r = shown[place],
        row = rows.get(r) ?? makeRow(r);
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
    const record = table.records[r],
      wrong = record.kind === "incorrect";
    const parts = {
      flagged: h("span", { class: "flagged" }),
      loss: h("span", { class: "loss" }),
      strip: h("canvas", { "aria-hidden": "true" }),
    };
    const element = h(
      "div",
      { class: "row", role: "option", id: `answer-${r}`, onclick: () => chosen(r, true) },
      h("span", { class: `mark ${record.kind}`, title: record.kind }, wrong ? "✗" : "✓"),
      h(
        "span",
        { class: "name", title: visible(answerName(record)) },
        visible(record.id),
        record.standard_answer ? h("small", {}, " std") : null,
      ),
      parts.flagged,
      parts.loss,
      h("span", { class: "length" }, count(record.tokens.length)),
      parts.strip,
    );
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
    const from = table.starts[r],
      length = table.starts[r + 1] - from;
    const width = strip.clientWidth,
      scale = globalThis.devicePixelRatio || 1;
    if (!width) return;
    strip.width = Math.round(width * scale);
    strip.height = Math.round(strip.clientHeight * scale);
    const context = strip.getContext("2d");
    for (let i = 0; i < length; i++) {
      context.fillStyle = colours.get(level(view, from + i));
      const left = Math.floor((i * strip.width) / length),
        right = Math.floor(((i + 1) * strip.width) / length);
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
  const recolour = () => {
    colours = null;
    update();
  };
  document.addEventListener("themechange", recolour, { signal: view.signal });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour, { signal: view.signal });
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
