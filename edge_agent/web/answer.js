// One answer: its tokens in their colours, what is known of the one pointed at, and all of them as rows.

import { JOINED, SALIENT } from "./weights.js";
import { count, h, number, percent, plural, probability, ratio, setText, signed, visible } from "./dom.js";
import { LEVELS, MODES, NEAR, answerName, level, levelClass } from "./degree.js";

const DULL = /^(0|0 %|1\.0+)$/; // says that nothing has changed
const CELL = 66,
  HEADING = 74; // pixels of a column of the table of tokens, and of its headings

export function makeAnswer(view) {
  const { table, state, now, then, differs } = view;
  const title = h("h2", {}),
    facts = h("p", { class: "facts" }),
    warning = h("p", { class: "warning", hidden: true });
  const question = h("div", { class: "text" }),
    standard = h("div", { class: "text" }),
    judgment = h("div", { class: "text" });
  const standardPart = part("Standard answer", standard),
    judgmentPart = part("Judgment", judgment);
  const flow = h("div", { class: "flow", role: "listbox", tabindex: 0, "aria-label": "Tokens of the answer" });
  const details = makeDetails(view),
    rows = makeTokenTable(view, (i) => point(i));
  const modes = Object.entries(MODES).map(([mode, { label }]) =>
    h(
      "label",
      {},
      h("input", { type: "radio", name: "mode", value: mode, checked: mode === state.mode, onchange: () => setMode(mode) }),
      h("span", {}, label),
    ),
  );
  const legend = makeLegend();
  const element = h(
    "main",
    { class: "panel answer", "aria-label": "Answer" },
    h("div", { class: "title" }, title, facts),
    warning,
    part("Question", question),
    h(
      "div",
      { class: "part" },
      h(
        "div",
        { class: "colours" },
        h("h3", {}, "Answer"),
        h("fieldset", { class: "segments" }, h("legend", { class: "hidden" }, "Colour by"), ...modes),
        legend.element,
      ),
      h("div", { class: "beside" }, flow, details.element),
    ),
    h("div", { class: "pair" }, standardPart, judgmentPart),
    h("div", { class: "part" }, h("h3", {}, "Tokens"), rows.element),
  );
  let spans = [];

  function setMode(mode) {
    state.mode = mode;
    legend.show(mode);
    document.dispatchEvent(new Event("themechange")); // the strips of the list have other colours
    update();
  }

  function show() {
    const record = table.records[state.record];
    setText(title, visible(answerName(record)));
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
    const r = state.record,
      from = table.starts[r],
      length = spans.length;
    if (!length) return;
    for (let i = 0; i < length; i++) {
      const t = from + i;
      const classes = [
        "t",
        levelClass(level(view, t)),
        now.role[t] === SALIENT ? "salient" : "",
        differs[t] ? "differs" : "",
        i === state.token ? "at" : "",
      ];
      const joined = classes.filter(Boolean).join(" ");
      if (spans[i].className !== joined) spans[i].className = joined;
    }
    const wrong = table.incorrect[r],
      salient = now.salient[r];
    const words = [
      wrong ? "incorrect" : "correct",
      plural(length, "token"),
      wrong ? `${count(salient)} flagged, ${percent(salient / length)}` : `${percent(salient / length)} above τ`,
      `loss ${number(now.recordLoss[r])}`,
    ];
    if (view.changed[r])
      words.push(
        `${number(then.recordLoss[r])} as compared, ${plural(view.changed[r], "weight")} differ${view.changed[r] === 1 ? "s" : ""}`,
      );
    setText(facts, words.join(" · "));
    const reasons = [];
    if (!view.trained(r)) reasons.push("Standard answers are not trained on under these options.");
    if (now.unknown[r])
      reasons.push("Clusters of this answer reach hidden states whose products were not recorded: they are shown as far as is known.");
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
  flow.addEventListener("pointerover", (event) => {
    const span = under(event);
    if (span && event.pointerType === "mouse") point(Number(span.dataset.i));
  });
  flow.addEventListener("click", (event) => {
    const span = under(event);
    if (span) point(Number(span.dataset.i));
  });
  flow.addEventListener("keydown", (event) => {
    const last = spans.length - 1;
    const next = {
      ArrowRight: state.token + 1,
      ArrowLeft: state.token - 1,
      Home: 0,
      End: last,
      ArrowDown: beneath(1),
      ArrowUp: beneath(-1),
    }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    point(Math.min(last, Math.max(0, next)));
    spans[state.token].scrollIntoView({ block: "nearest" });
  });

  // The token of the next line, or of the one before, that is nearest to the one pointed at.
  function beneath(direction) {
    const own = spans[state.token]?.getBoundingClientRect();
    if (!own) return state.token;
    let best = state.token,
      line = null,
      nearest = Infinity;
    for (let i = state.token + direction; i >= 0 && i < spans.length; i += direction) {
      const box = spans[i].getBoundingClientRect();
      if (Math.abs(box.top - own.top) < 4) continue;
      line ??= box.top;
      if (Math.abs(box.top - line) > 4) break;
      const far = Math.abs(box.left - own.left);
      if (far < nearest) {
        nearest = far;
        best = i;
      }
    }
    return best;
  }

  legend.show(state.mode);
  return { element, show, update, point };
}

// A token by itself, where a blank could not be seen.
function marked(token) {
  return visible(token).replace(/^ +$/, (blanks) => "␣".repeat(blanks.length));
}

function part(title, ...children) {
  return h("section", { class: "part" }, h("h3", {}, title), ...children);
}

function makeLegend() {
  const low = h("span", {}),
    high = h("span", {});
  const swatches = [];
  for (let at = -LEVELS; at <= LEVELS; at += 2) swatches.push(h("span", { class: `t ${levelClass(at) || "zero"}` }));
  const element = h("div", { class: "legend" }, low, h("span", { class: "ramp", "aria-hidden": "true" }, ...swatches), high);
  return {
    element,
    show(mode) {
      setText(low, MODES[mode].low);
      setText(high, MODES[mode].high);
    },
  };
}

// What is known of the token pointed at, and why it has its weight.
function makeDetails(view) {
  const { table, state, now, then } = view;
  const text = h("p", { class: "token" }),
    role = h("p", { class: "role" });
  const line = (label, title) => {
    const value = h("td", {}),
      bar = h("span", { class: "fill" }),
      bound = h("span", { class: "bound" });
    const cells = h(
      "tr",
      {},
      h("th", { scope: "row", title }, label),
      value,
      h("td", { class: "gauge" }, h("span", { class: "rail" }, bar, bound)),
    );
    return { cells, value, bar, bound };
  };
  const plain = (label, title) => {
    const value = h("td", {}),
      note = h("td", { class: "note" });
    return { cells: h("tr", {}, h("th", { scope: "row", title }, label), value, note), value, note };
  };
  const base = line("b", "P after the question"),
    standard = line("c", "P with the standard answer"),
    judge = line("j", "P with the judgment");
  const overBase = plain("j/b"),
    overStandard = plain("j/c"),
    standardOverBase = plain("c/b");
  const weight = plain("weight"),
    loss = plain("loss", "Share of the loss of this answer");
  const element = h(
    "section",
    { class: "details", "aria-label": "Token", "aria-live": "polite" },
    text,
    role,
    h(
      "table",
      {},
      h("tbody", {}, base.cells, standard.cells, judge.cells),
      h("tbody", {}, overBase.cells, overStandard.cells, standardOverBase.cells),
      h("tbody", {}, weight.cells, loss.cells),
    ),
  );

  function update() {
    const record = table.records[state.record];
    if (!record) return;
    const t = table.starts[state.record] + state.token,
      scores = table.steps[state.step],
      o = state.options,
      wrong = table.incorrect[state.record];
    const b = Math.exp(scores.base[t]),
      c = Math.exp(scores.standard[t]),
      j = Math.exp(scores.judge[t]);
    setText(text, marked(record.tokens[state.token] ?? ""));
    setText(role, `${state.token + 1} of ${count(record.tokens.length)} · ${roleName(now.role[t], wrong)}`);
    for (const [row, p] of [
      [base, b],
      [standard, c],
      [judge, j],
    ]) {
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
    for (const [row, p, bound, decides] of [
      [standard, c, o.correct_threshold, !wrong],
      [judge, j, o.judge_minimum, wrong],
    ]) {
      row.cells.classList.toggle("passes", Boolean(decides) && p > bound);
      row.bound.hidden = !decides;
      row.bound.style.left = `${100 * bound}%`;
    }
    base.bound.hidden = true;
    element.classList.toggle("wrong", Boolean(wrong));
    const own = now.likelihood[t] - now.unlikelihood[t],
      other = then.likelihood[t] - then.unlikelihood[t];
    setText(weight.value, signed(own));
    setText(
      weight.note,
      Math.abs(own - other) > NEAR ? `${signed(other)} as compared` : own < 0 ? "unlikelihood" : own > 0 ? "likelihood" : "not trained",
    );
    const length = record.tokens.length,
      total = now.recordLoss[state.record] * length;
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
  let cells = [],
    heads = [],
    columns = 0,
    at = -1,
    visibleNow = false;

  function show() {
    columns = 0;
    at = -1;
    build();
  }

  function build() {
    const record = table.records[state.record],
      wide = Math.max(2, Math.floor((element.clientWidth - HEADING) / CELL));
    if (!record || !element.clientWidth || wide === columns) return;
    columns = wide;
    const lines = LINES.filter((line) => (!line.standard || record.standard) && (!line.judge || record.judge));
    cells = lines.map((line) => ({ line, boxes: [] }));
    heads = [];
    const tables = [];
    for (let start = 0; start < record.tokens.length; start += columns) {
      const some = record.tokens.slice(start, start + columns);
      const top = some.map((token, n) =>
        h("th", { scope: "col", "data-i": start + n }, h("span", { class: "t" }, marked(token).replaceAll("\n", ""))),
      );
      heads.push(...top.map((head) => head.firstChild));
      tables.push(
        h(
          "table",
          {},
          h("thead", {}, h("tr", {}, h("td", {}), ...top)),
          h(
            "tbody",
            {},
            ...cells.map(({ line, boxes }) => {
              const own = some.map((_, n) => h("td", { "data-i": start + n }));
              boxes.push(...own);
              return h("tr", { class: line.strong ? "strong" : null }, h("th", { scope: "row", title: line.title }, line.label), ...own);
            }),
          ),
        ),
      );
    }
    element.replaceChildren(...tables);
    update();
  }

  function update() {
    if (!columns || !visibleNow) return;
    const from = table.starts[state.record],
      scores = table.steps[state.step];
    const total = now.recordLoss[state.record] * heads.length;
    heads.forEach((head, i) => {
      head.className = `t ${levelClass(level(view, from + i))}${view.differs[from + i] ? " differs" : ""}`;
    });
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

  element.addEventListener("click", (event) => {
    const box = event.target.closest("[data-i]");
    if (box) pointed(Number(box.dataset.i));
  });
  new ResizeObserver(() => {
    build();
    point(state.token);
  }).observe(element);
  new IntersectionObserver(
    ([entry]) => {
      visibleNow = entry.isIntersecting;
      update();
    },
    { rootMargin: "200px" },
  ).observe(element);
  return { element, show, update, point };
}
