// The coordinator's API: the token of this tab, requests, and events.

const KEY = "edge-agent-token";
const LONGEST_PAUSE_S = 30;
// A stream says something every five seconds; after so long without a word the connection is dead.
const SILENT_MS = 20000;

// What the API answers where it does not do what was asked.
export class Refused extends Error {
  constructor(status, problem) {
    super(problem.detail ?? `the coordinator answered ${status}`);
    this.status = status;
    this.code = problem.code;
    this.found = problem.found;
  }
}

export const token = {
  get: () => sessionStorage.getItem(KEY),
  keep: (text) => sessionStorage.setItem(KEY, text),
  forget: () => sessionStorage.removeItem(KEY),
};

// Asks, and returns the answer. Throws Refused; where the token is not good any more the page hears of it, too.
export async function ask(method, path, { body, headers = {}, signal } = {}) {
  const answer = await fetch(`/v1${path}`, { method, body, signal, headers: { Authorization: `Bearer ${token.get()}`, ...headers } });
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({}));
  if (answer.status === 401) document.dispatchEvent(new Event("signedout"));
  throw new Refused(answer.status, problem);
}

export async function read(path) {
  return (await ask("GET", path)).json();
}

export async function send(method, path, document) {
  const body = document === undefined ? undefined : JSON.stringify(document);
  return (await ask(method, path, { body, headers: body === undefined ? {} : { "Content-Type": "application/json" } })).json();
}

// An id for what is handed in: a ULID in lower case, as the coordinator makes them.
export function newId() {
  const letters = "0123456789abcdefghjkmnpqrstvwxyz";
  let left = Date.now(),
    time = "";
  for (let n = 0; n < 10; n++) {
    time = letters[left % 32] + time;
    left = Math.floor(left / 32);
  }
  return time + Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => letters[byte % 32]).join("");
}

// All items of a list, page by page.
export async function readAll(path) {
  const items = [],
    joint = path.includes("?") ? "&" : "?";
  let page = { next: "" };
  do {
    const after = page.next === "" ? "" : `&after=${encodeURIComponent(page.next)}`;
    page = await read(`${path}${joint}limit=1000${after}`);
    items.push(...page.items);
  } while (page.next !== null);
  return items;
}

// Hears a stream of server-sent events until the returned function is called: `hear(kind, data)`, `standing(whether)` when the
// connection comes and goes, and `refused(error)` where there is no such stream. EventSource could not send the token. Where the tab is not looked at nothing is held open: a browser
// has few connections to one server. What is missed is asked for by the last id.
export function listen(path, hear, standing = () => {}, refused = () => {}) {
  let last = null,
    stopped = false,
    connection = null;
  const wake = () => (document.hidden ? connection?.abort() : null);
  document.addEventListener("visibilitychange", wake);
  async function once() {
    connection = new AbortController();
    let silent = 0;
    const alive = () => {
      clearTimeout(silent);
      silent = setTimeout(() => connection.abort(), SILENT_MS);
    };
    try {
      alive();
      const answer = await ask("GET", path, { signal: connection.signal, headers: last ? { "Last-Event-ID": last } : {} });
      standing(true);
      for await (const event of parsed(answer.body, alive)) {
        if (stopped) return;
        last = event.id ?? last;
        hear(event.event, JSON.parse(event.data));
      }
    } finally {
      clearTimeout(silent);
    }
  }
  async function run() {
    let pause = 1;
    while (!stopped) {
      const began = Date.now();
      try {
        await once();
      } catch (error) {
        if (error instanceof Refused && error.status < 500 && error.status !== 429) {
          refused(error);
          return;
        }
      }
      if (stopped) return;
      if (document.hidden) await seen();
      else {
        standing(false);
        pause = Date.now() - began > 10000 ? 1 : Math.min(LONGEST_PAUSE_S, 2 * pause);
        await new Promise((done) => setTimeout(done, 1000 * pause * (0.5 + Math.random() / 2)));
      }
    }
  }
  run();
  return () => {
    stopped = true;
    document.removeEventListener("visibilitychange", wake);
    connection?.abort();
  };
}

function seen() {
  return new Promise((done) => {
    const look = () => {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", look);
      done();
    };
    document.addEventListener("visibilitychange", look);
    look();
  });
}

// The events of a stream: fields by their names, as the standard of server-sent events has them. Comments are left out.
async function* parsed(body, alive) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "",
    event = {};
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    alive();
    const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (event.data !== undefined) yield event;
        event = {};
      } else if (!line.startsWith(":")) {
        const at = line.indexOf(":"),
          name = at < 0 ? line : line.slice(0, at),
          text = at < 0 ? "" : line.slice(at + 1).replace(/^ /, "");
        event[name] = name === "data" && event.data !== undefined ? `${event.data}\n${text}` : text;
      }
    }
  }
}

// Saves a file of a job as a browser does: through its own memory, since a link could not send the token.
export async function download(job, name) {
  const answer = await ask("GET", `/jobs/${encodeURIComponent(job)}/artifacts/${name}`);
  const url = URL.createObjectURL(await answer.blob()),
    link = document.createElement("a");
  link.href = url;
  link.download = `${job}-${name}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}
