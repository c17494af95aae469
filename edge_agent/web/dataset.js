// Choosing a dataset: one that is here, or a file that is uploaded and looked into.

import { ask, read, readAll } from "./api.js";
import { count, h, plural, setText, visible } from "./dom.js";
import { facts, notice, row, table } from "./parts.js";
import { bytes, moment } from "./units.js";

const FORMS = {
  native: "native records",
  gsm8k: "GSM8K (question and worked answer)",
  chat: "chats of one exchange",
  alpaca: "Alpaca (instruction, input, output)",
};
const MOST_BYTES = 256 * 2 ** 20;
const LENGTHS = ["question", "answer", "output", "judgment"];

// A choice of datasets with what is in the chosen one beside it. `required`: one must be chosen. `changed` hears of each choice.
export function makeDataset({ label, none = null, changed }) {
  const select = h("select", { "aria-label": `${label}: one that is here`, onchange: () => choose(select.value) }),
    file = h("input", {
      type: "file",
      "aria-label": `${label}: a file`,
      accept: ".jsonl,.json",
      onchange: () => upload(file.files[0]),
    }),
    told = h("p", { class: "hint", role: "status" }),
    shown = h("div", { class: "found" });
  const known = new Map();
  let value = null;

  function list() {
    const views = [...known.values()].sort((a, b) => b.uploaded - a.uploaded);
    select.replaceChildren(
      h("option", { value: "" }, none ?? "choose one, or upload a file"),
      ...views.map((view) =>
        h(
          "option",
          { value: view.sha256, selected: view.sha256 === value },
          `${visible(view.name)}, ${plural(view.found?.records ?? 0, "record")}, ${moment(view.uploaded)}`,
        ),
      ),
    );
  }
  function choose(sha256) {
    value = sha256 || null;
    const view = known.get(value);
    select.setAttribute("aria-invalid", "false");
    shown.replaceChildren(...(view?.found ? checked(view.found, view.size_bytes) : []));
    changed();
  }
  async function upload(given) {
    if (!given) return;
    if (given.size > MOST_BYTES) {
      shown.replaceChildren(notice(`${given.name} has ${bytes(given.size)}; a dataset has at most ${bytes(MOST_BYTES)}`, "wrong"));
      return;
    }
    shown.replaceChildren();
    file.disabled = true;
    try {
      setText(told, `${visible(given.name)}: reading ${bytes(given.size)}…`);
      const content = await given.arrayBuffer(),
        sha256 = hexadecimal(await crypto.subtle.digest("SHA-256", content));
      setText(told, `${visible(given.name)}: sending and checking…`);
      const name = given.name.replace(/[/\p{Cc}]/gu, "_").slice(-200);
      const answer = await ask("PUT", `/datasets/${sha256}?name=${encodeURIComponent(name)}`, { body: content });
      const view = await answer.json();
      known.set(view.sha256, view);
      value = view.sha256;
      setText(told, "");
      list();
      choose(value);
    } catch (error) {
      value = null;
      list();
      changed();
      setText(told, "");
      const why = error.found ? `${plural(error.found.wrong, "wrong line")}, so it is not kept` : error.message;
      shown.replaceChildren(notice(`${given.name}: ${why}`, "wrong"), ...(error.found ? checked(error.found, given.size) : []));
    } finally {
      file.disabled = false;
      file.value = "";
    }
  }
  readAll("/datasets").then(
    (views) => {
      for (const view of views) known.set(view.sha256, view);
      list();
      if (value !== null) choose(value);
    },
    (error) => setText(told, error.message),
  );
  list();
  return {
    element: h(
      "fieldset",
      { class: "dataset" },
      h("legend", {}, label),
      h("div", { class: "tools" }, select, h("span", { class: "hint" }, "or"), file),
      told,
      shown,
    ),
    select,
    value: () => value,
    // The dataset as it is known: null where none is chosen.
    view: () => known.get(value) ?? null,
    // Chooses the dataset of another job, which need not be among those that are listed.
    async set(sha256) {
      value = sha256;
      if (!known.has(sha256)) {
        const view = await read(`/datasets/${sha256}`).catch(() => ({ sha256, name: `${sha256.slice(0, 12)}…`, uploaded: 0, found: null }));
        known.set(sha256, view);
      }
      list();
      choose(sha256);
    },
  };
}

function spread(found) {
  return found === null
    ? null
    : found.min === found.max
      ? count(found.min)
      : `${count(found.min)} to ${count(found.max)}, median ${count(found.median)}`;
}

function hexadecimal(digest) {
  return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// What `edge-agent dataset check` says of a file.
function checked(found, size) {
  const { outputs } = found,
    named = (finding) =>
      finding.count
        ? `${count(finding.count)}: ${finding.records.slice(0, 3).map(visible).join(", ")}${finding.count > 3 ? ", …" : ""}`
        : null;
  const some = (n) => (n ? count(n) : null);
  const parts = [
    facts(
      ["Form", FORMS[found.form] ?? "no known form"],
      ["Size", bytes(size)],
      ["Records", count(found.records)],
      ["Questions", count(found.questions)],
      ["With answer", some(found.with_answer)],
      ["With output", some(found.with_output)],
      ["With judgment", some(found.with_judgment)],
      ["With instruction", some(found.with_instruction)],
      ...LENGTHS.map((name) => [`Characters of ${name}s`, spread(found.characters[name])]),
      ["Duplicates", some(found.duplicates)],
      ["Near-duplicates", some(found.near_duplicates)],
      ["Correct outputs", found.with_output ? count(outputs.correct) : null],
      ["Wrong outputs", found.with_output ? count(outputs.incorrect) : null],
      ["Answers not comparable", named(outputs.not_comparable)],
      ["Judged, but correct", named(outputs.judged_but_correct)],
      ["Wrong, but not judged", named(outputs.wrong_but_unjudged)],
    ),
  ];
  if (found.wrong_lines.length) {
    const columns = [
      ["Where", "name"],
      ["What is wrong", "text"],
    ];
    const rows = found.wrong_lines.map(({ where, problem }) => row(columns, [visible(where), visible(problem)]));
    parts.push(
      h("h3", {}, found.wrong > rows.length ? `The first ${count(rows.length)} wrong lines` : "Wrong lines"),
      table("Wrong lines", columns, rows).element,
    );
  }
  return parts;
}
