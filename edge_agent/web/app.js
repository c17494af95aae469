// The coordinator's pages: who reads them, which one is open, what stands around it.

import { read, token } from "./api.js";
import { comparePage } from "./compare.js";
import { h, setText, visible } from "./dom.js";
import { jobPage } from "./job.js";
import { jobsPage } from "./jobs.js";
import { nodePage, nodesPage } from "./nodes.js";
import { doing } from "./parts.js";
import { rolloutPage, rolloutsPage } from "./rollouts.js";
import { submitPage } from "./submit.js";

const SCOPES = ["read", "submit", "admin"];
// Each page by the first word of the address after #/: it fills the place that it is given, and returns what ends it.
const PAGES = {
  "": nodesPage,
  nodes: nodePage,
  jobs: (place, session, at) => (at.parts.length ? jobPage : jobsPage)(place, session, at),
  rollouts: (place, session, at) => (at.parts.length ? rolloutPage : rolloutsPage)(place, session, at),
  new: submitPage,
  compare: comparePage,
};
const LINKS = { "#/": "Nodes", "#/jobs": "Jobs", "#/rollouts": "Rollouts", "#/new": "New job" };

let session = null,
  leave = () => {};

const standing = h("output", { class: "standing" });
const place = h("main", { id: "main", tabindex: -1 });

function theme() {
  const themes = ["auto", "light", "dark"],
    button = h("button", { class: "quiet", onclick: () => show(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % 3]) });
  const show = (name) => {
    document.documentElement.dataset.theme = name;
    localStorage.setItem("edge-agent-theme", name);
    setText(button, { auto: "◐", light: "○", dark: "●" }[name]);
    button.setAttribute("aria-label", `Theme: ${name}`);
    button.title = `Theme: ${name}`;
  };
  const kept = localStorage.getItem("edge-agent-theme");
  show(themes.includes(kept) ? kept : "auto");
  return button;
}

// The token is asked for, tried, and kept for this tab alone; it is sent as a header, so no other site can make the browser send it.
function signIn(why = "") {
  leave();
  leave = () => {};
  session = null;
  const field = h("input", {
      type: "password",
      autocomplete: "off",
      spellcheck: "false",
      required: true,
      "aria-describedby": "how",
      id: "token",
    }),
    told = h("p", { class: "told", role: "alert" }, why),
    button = h("button", { class: "primary" }, "Sign in");
  const enter = (event) => {
    event.preventDefault();
    doing(button, told, async () => {
      token.keep(field.value.trim());
      try {
        session = await whoAmI();
      } catch (error) {
        token.forget();
        throw error;
      }
      open();
    });
  };
  document.title = "Sign in · Edge agent";
  document.body.replaceChildren(
    h(
      "main",
      { class: "door" },
      h("h1", {}, "Edge agent"),
      h(
        "form",
        { class: "sheet", onsubmit: enter },
        h("label", { for: "token" }, "Token"),
        field,
        button,
        told,
        h(
          "p",
          { class: "hint", id: "how" },
          "The coordinator's operator makes one with ",
          h("code", {}, "edge-agent tokens new NAME --scope submit"),
          ". With the scope read a page shows everything and changes nothing. It is kept until this tab is closed.",
        ),
      ),
    ),
  );
  field.focus();
}

async function whoAmI() {
  const { name, scope } = await read("/me");
  return {
    name,
    scope,
    may: (needed) => SCOPES.indexOf(scope) >= SCOPES.indexOf(needed),
    // Whether what the page shows is what there is now; null where that does not change any more.
    standing(live) {
      setText(standing, live === null ? "" : live ? "live" : "no connection");
      standing.className = `standing ${live === null ? "" : live ? "live" : "broken"}`;
    },
  };
}

function open() {
  const links = Object.entries(LINKS).map(([href, label]) => h("a", { href, hidden: href === "#/new" && !session.may("submit") }, label));
  document.body.replaceChildren(
    h("a", { class: "skip", href: "#main", onclick: (event) => (event.preventDefault(), place.focus()) }, "Skip to the page"),
    h(
      "header",
      { class: "top" },
      h("a", { class: "brand", href: "#/" }, "Edge agent"),
      h("nav", { "aria-label": "Pages" }, ...links),
      standing,
      theme(),
      h("button", { class: "quiet who", title: `Token ${visible(session.name)}, scope ${session.scope}`, onclick: signOut }, "Sign out"),
    ),
    place,
  );
  follow();
}

function signOut() {
  token.forget();
  signIn();
}

// Opens the page that the address names.
function follow() {
  if (session === null) return;
  leave();
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?"),
    [name, ...parts] = path.split("/").filter(Boolean).map(decoded);
  const page = Object.hasOwn(PAGES, name ?? "") ? PAGES[name ?? ""] : nodesPage;
  for (const link of document.querySelectorAll(".top nav a")) {
    const here = link.getAttribute("href").replace(/^#\/?/, "") === (name === "nodes" ? "" : (name ?? ""));
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  setText(standing, "");
  standing.className = "standing";
  place.replaceChildren();
  place.className = name ?? "nodes";
  leave = page(place, session, { parts, query: new URLSearchParams(query) }) ?? (() => {});
  document.title = `${place.querySelector("h1")?.textContent ?? "Edge agent"} · Edge agent`;
  scrollTo(0, 0);
  place.focus({ preventScroll: true });
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

addEventListener("hashchange", follow);
document.addEventListener("signedout", () => {
  if (session === null) return;
  token.forget();
  signIn("The token is not good any more: it has expired or was revoked.");
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, dialog"))
    return;
  const field = document.querySelector("input[type=search]");
  if (field) {
    field.focus();
    event.preventDefault();
  }
});

theme();
if (token.get() === null) signIn();
else
  whoAmI().then(
    (known) => {
      session = known;
      open();
    },
    (error) => signIn(error.status === 401 ? "" : error.message),
  );
