// Elements and numbers. Text from data becomes text nodes and attribute values only: nothing here parses markup.

const SVG = "http://www.w3.org/2000/svg";

// h("button", { class: "quiet", onclick: f, "aria-label": text }, child, "text", …)
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function count(n) {
  return n.toLocaleString("en");
}

export function plural(n, word) {
  return `${count(n)} ${word}${n === 1 ? "" : "s"}`;
}

export function probability(p) {
  if (Number.isNaN(p)) return "–";
  return p >= 0.001 ? p.toFixed(3) : short(p);
}

export function ratio(r) {
  if (Number.isNaN(r)) return "–";
  if (r >= 1000 || (r < 0.01 && r > 0)) return short(r);
  return r >= 99.5 ? r.toFixed(0) : r >= 9.95 ? r.toFixed(1) : r.toFixed(2);
}

export function number(x, digits = 3) {
  return Number.isFinite(x) ? x.toFixed(digits).replace("-", "−") : x === Infinity ? "∞" : "–";
}

export function percent(share) {
  return Number.isFinite(share) ? `${(100 * share).toFixed(share >= 0.0005 && share < 0.0995 ? 1 : 0)} %` : "–";
}

export function signed(x) {
  return Math.abs(x) < 0.005 ? "0" : (x > 0 ? "+" : "−") + Math.abs(x).toFixed(2);
}

function short(x) {
  return x === 0 ? "0" : Number.isFinite(x) ? x.toExponential(0).replace("e+", "e").replace("e-", "e−") : "∞";
}

// What would not be seen, or would move what stands around it: line ends, tabs, control characters, marks of direction.
export function visible(text) {
  if (text === "") return "◌";
  return text
    .replace(/\r?\n/g, "↵\n")
    .replace(/\t/g, "⇥")
    .replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cs}]/gu, (character) =>
      character === "\n" || character === "\u200d"
        ? character
        : `⟨${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`,
    );
}
