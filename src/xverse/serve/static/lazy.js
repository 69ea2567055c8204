// Code and formulas. Their libraries are loaded when they are first needed; until then, and for what they
// cannot read, the source is shown as it is.

import { copy, h, iconButton, toast } from "./dom.js";
import { t } from "./language.js";

let highlighter = null;
let typesetter = null;

function highlighting() {
  highlighter ??= import("./vendor/highlight.min.js").then(({ default: library }) => library).catch(() => null);
  return highlighter;
}

function typesetting() {
  if (!typesetter) {
    document.head.append(h("link", { rel: "stylesheet", href: new URL("vendor/katex.min.css", import.meta.url).href }));
    typesetter = import("./vendor/katex.min.js").then(() => globalThis.katex).catch(() => null);
  }
  return typesetter;
}

export function codeBlock(source, info) {
  const code = h("code", { dir: "ltr" }, source);
  const name = info.trim().split(/\s+/)[0].toLowerCase();
  if (name) highlight(code, source, name);
  const button = iconButton("copy", t("copy"), async () => toast(t((await copy(source)) ? "copied" : "notCopied"), null, 2));
  return h("div", { class: "code" },
    h("div", { class: "code-head" }, h("span", {}, info.trim()), button),
    h("pre", { tabindex: "0", dir: "ltr" }, code));
}

const MOST_HIGHLIGHTED = 50_000; // characters; more would make every update slow

async function highlight(code, source, name) {
  const library = await highlighting();
  if (!library?.getLanguage(name) || source.length > MOST_HIGHLIGHTED) return;
  const result = library.highlight(source, { language: name, ignoreIllegals: true });
  const tree = result._emitter.rootNode; // as elements, where `value` would be HTML
  code.replaceChildren(...tree.children.map(coloured));
}

function coloured(node) {
  if (typeof node === "string") return node;
  const scope = String(node.scope ?? "").split(".")[0].replace(/[^\w-]/g, "");
  return h("span", { class: `hl-${scope}` }, ...node.children.map(coloured));
}

export function formula(source, whole, display) {
  const element = h(display ? "div" : "span", { class: display ? "formula display" : "formula", dir: "ltr" }, whole);
  if (display) element.tabIndex = 0;
  typeset(element, source, display);
  return element;
}

// What hides a part of a formula: comments, phantoms, definitions.
const HIDES = /(?:^|[^\\])(?:\\\\)*%|\\(?:[hv]?phantom|[gex]?def|(?:re|provide)?newcommand|(?:future)?let)(?![a-zA-Z])/;

async function typeset(element, source, display) {
  if (HIDES.test(source)) return;
  const library = await typesetting();
  const trust = () => { throw new Error("links and pictures in formulas are not drawn"); };
  const options = { displayMode: display, throwOnError: true, trust, strict: "ignore", maxExpand: 200, maxSize: 20 };
  try {
    const drawn = document.createElement("span");
    library.render(source, drawn, options);
    element.replaceChildren(...drawn.childNodes);
  } catch { /* the source stays */ }
}
