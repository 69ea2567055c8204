// A reply as elements: Markdown without HTML. markdown-it finds the structure; elements are made one by one
// from the list below, so nothing in a text can become another one. Apart from Markdown's own marks every
// character is shown: HTML, entities, backslashes, comments and link definitions are text.

import { h } from "./dom.js";
import { codeBlock, formula } from "./lazy.js";
import "./vendor/markdown-it.min.js";

const parser = globalThis.markdownit({ html: false, linkify: true, breaks: true });
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
parser.disable(["autolink", "reference", "html_block", "html_inline", "text_join"]);
parser.validateLink = (address) => /^(https?:|mailto:)/i.test(address.trim());
// Addresses and titles stay as they were written: %41, 中 and &amp; too.
parser.normalizeLink = parser.normalizeLinkText = (address) => address;
const { parseLinkDestination, parseLinkTitle } = parser.helpers;
parser.helpers.parseLinkDestination = (text, start, most) => {
  const found = parseLinkDestination(text, start, most);
  return found.ok ? { ...found, str: text.slice(start, found.pos).replace(/^<|>$/g, "") } : found;
};
parser.helpers.parseLinkTitle = (text, start, most) => {
  const found = parseLinkTitle(text, start, most);
  return found.ok ? { ...found, str: text.slice(start + 1, found.pos - 1) } : found;
};

const LONGEST = 4000; // characters of a formula within a line of text

parser.inline.ruler.before("escape", "formula", (state, silent) => {
  if (!/[$\\]/.test(state.src[state.pos])) return false;
  const rest = state.src.slice(state.pos, Math.min(state.posMax, state.pos + LONGEST));
  const found =
    /^\$\$([^]+?)\$\$/.exec(rest) ?? /^\\\(([^]+?)\\\)/.exec(rest) ?? /^\\\[([^]+?)\\\]/.exec(rest) ??
    dollars(rest, state.src[state.pos - 1] ?? "");
  if (!found || !found[1].trim()) return false;
  if (!silent) {
    const token = state.push("formula", "", 0);
    token.content = found[1];
    token.markup = found[0];
    token.meta = { display: found[0].startsWith("$$") || found[0].startsWith("\\[") };
  }
  state.pos += found[0].length;
  return true;
});

/** A formula between single dollars, if it does not look like prices: "$5 or $6", "US$5", "$20 and 30$". */
function dollars(rest, before) {
  const found = /^\$(?![\s$])((?:\\[^\n]|[^\\\n$])*?[^\s\\$])\$(?![\p{L}\p{N}$])/u.exec(rest);
  if (!found || /[\p{L}\p{N}$\\]/u.test(before)) return null;
  const [, source] = found;
  const price = /^\d[\d.,]*\s*(?:\p{L}{2,}|$)/u.test(source) && !/[\\^_=+*/<>{}]/.test(source);
  const prose = /\p{Script=Han}/u.test(source) ? !source.includes("\\") : /[\s,]/.test(source) && !/[\\^_=+*/<>{}|()-]/.test(source);
  return price || prose ? null : found;
}

// A formula between $$ or \[ over several lines is one block: its lines are not lists or headings.
parser.block.ruler.before("fence", "formula", (state, begin, end, silent) => {
  const start = state.bMarks[begin] + state.tShift[begin];
  const first = state.src.slice(start, state.eMarks[begin]);
  const close = first.startsWith("$$") ? "$$" : first.startsWith("\\[") ? "\\]" : null;
  if (!close) return false;
  let source = first;
  let line = begin;
  while (!source.slice(2).trimEnd().endsWith(close) || source.trimEnd().length < 5) {
    line += 1;
    if (line >= end || state.isEmpty(line)) return false;
    source += `\n${state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line])}`;
  }
  const inner = source.trim().slice(2, -2);
  if (!inner.trim() || inner.includes(close)) return false;
  if (silent) return true;
  const token = state.push("formula", "", 0);
  token.content = inner;
  token.markup = source;
  token.meta = { display: true };
  token.map = [begin, line + 1];
  state.line = line + 1;
  return true;
}, { alt: ["paragraph", "blockquote", "list"] });

// 2*3*4 is a product, __init__ a name of Python, and >>> its prompt.
const scan = parser.inline.State.prototype.scanDelims;
parser.inline.State.prototype.scanDelims = function (start, split) {
  const result = scan.call(this, start, split);
  const end = start + result.length;
  const [before, after] = [this.src.slice(Math.max(0, end - 80), end), this.src.slice(start, start + 80)];
  const product = result.length === 1 && this.src[start] === "*" && /[\w)\]]\*$/.test(before) && /^\*[\w(]/.test(after);
  const name = result.length === 2 && (/^__[a-z]\w*__/.test(after) || /__[a-z]\w*__$/.test(before));
  return product || name ? { ...result, can_open: false, can_close: false } : result;
};
/** Put `make(rule)` in place of a block rule. */
function replace(name, make) {
  const { fn, alt } = parser.block.ruler.__rules__.find((rule) => rule.name === name);
  parser.block.ruler.at(name, make(fn), { alt: [...alt] });
}
replace("blockquote", (rule) => (state, begin, end, silent) => {
  const start = state.bMarks[begin] + state.tShift[begin];
  return state.src.startsWith(">>", start) ? false : rule(state, begin, end, silent);
});
// A row with more cells than the head would lose them: the text then stays as written.
replace("table", (rule) => (state, begin, end, silent) => {
  const cells = (line) => {
    const text = state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]);
    return text.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).length;
  };
  for (let line = begin + 2; line < end && !state.isEmpty(line); line += 1) if (cells(line) > cells(begin)) return false;
  return rule(state, begin, end, silent);
});
const DEEP = /^(?:[ \t]*(?:>|[-*+]|\d{1,9}[.)])){30}/m; // more levels than the parser follows
const LONG = 500_000; // characters; beyond, drawing would take seconds

const PLAIN = {
  paragraph: "p", blockquote: "blockquote", bullet_list: "ul", ordered_list: "ol", list_item: "li", strong: "strong",
  em: "em", s: "s", table: "table", thead: "thead", tbody: "tbody", tr: "tr", th: "th", td: "td",
};
const BLOCKS = new Set(["p", "blockquote", "ul", "ol", "table"]);

function open(token) {
  const kind = token.type.replace(/_open$/, "");
  if (kind === "heading") return h(`h${Math.min(Number(token.tag[1]) + 2, 6)}`, { dir: "auto" });
  if (kind === "link") {
    const address = token.attrGet("href");
    if (!/^(https?:|mailto:)/i.test(address)) return h("span");
    return h("a", { href: address, rel: "noopener noreferrer", target: "_blank" });
  }
  const name = Object.hasOwn(PLAIN, kind) ? PLAIN[kind] : "span";
  const element = h(name, BLOCKS.has(name) || name === "td" || name === "th" ? { dir: "auto" } : {});
  if (kind === "list_item" && token.info) element.value = Number(token.info);
  const align = /text-align:(left|center|right)/.exec(token.attrGet("style") ?? "");
  if (align) element.classList.add(align[1]);
  return element;
}

/** Where a link leads, unless its text says it. */
function target(link, token) {
  const address = token.attrGet("href");
  const name = token.attrGet("title");
  if (!name && link.textContent === address) return "";
  return h("span", { class: "target", dir: "ltr" }, ` (${address}${name ? ` "${name}"` : ""})`);
}

/** Append the elements of `tokens` to `parent`. */
function build(parent, tokens) {
  const stack = [{ element: parent, token: null }];
  for (const token of tokens) {
    const top = stack.at(-1);
    if (token.nesting === 1) {
      const element = open(token);
      const outer = element.localName === "table" ? h("div", { class: "wide", tabindex: "0", role: "group" }, element) : element;
      if (token.hidden) stack.push({ element: top.element, token }); // the paragraph of a tight list
      else {
        top.element.append(outer);
        stack.push({ element, token });
      }
    } else if (token.nesting === -1) {
      stack.pop();
      if (token.type === "link_close") stack.at(-1).element.append(target(top.element, top.token));
    } else if (token.type === "inline") build(top.element, token.children);
    else top.element.append(leaf(token));
  }
}

function leaf(token) {
  switch (token.type) {
    case "text": return token.content;
    case "text_special": return token.markup; // \* and &lt; as they were written
    case "softbreak": case "hardbreak": return h("br");
    case "code_inline": return h("code", { dir: "ltr" }, token.content);
    case "fence": return codeBlock(token.content.replace(/\n$/, ""), token.info);
    case "code_block": return codeBlock(token.content.replace(/\n$/, ""), "");
    case "formula": return formula(token.content, token.markup, token.meta.display);
    case "hr": return h("hr");
    case "plain": return h("p", { dir: "auto" }, token.content);
    case "image": { // not fetched: its text and address
      const link = h("a", { href: token.attrGet("src"), rel: "noopener noreferrer", target: "_blank" }, token.content || "🖼");
      const safe = parser.validateLink(token.attrGet("src"));
      const plain = { attrGet: (name) => token.attrGet(name === "href" ? "src" : name) };
      return safe ? h("span", {}, link, target(link, plain)) : token.content;
    }
    default: return token.content;
  }
}

/** Show `text` in `element`. Blocks that did not change since the last call keep their elements. */
export function render(element, text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const plain = text.length > LONG || DEEP.test(text);
  const tokens = plain ? [{ type: "plain", nesting: 0, content: text, map: null }] : parser.parse(text, {});
  const blocks = [];
  for (let begin = 0; begin < tokens.length;) {
    let depth = 0;
    let end = begin;
    do depth += tokens[end].nesting; while (end++ < tokens.length - 1 && depth > 0);
    const [first, last] = tokens[begin].map ?? [0, lines.length];
    blocks.push({ key: `${tokens[begin].type}\n${lines.slice(first, last).join("\n")}`, tokens: tokens.slice(begin, end) });
    begin = end;
  }
  const old = element.xverseBlocks ?? [];
  let same = 0;
  while (same < Math.min(old.length, blocks.length) && old[same].key === blocks[same].key) same += 1;
  for (const { node } of old.slice(same)) node.remove();
  element.xverseBlocks = blocks.map((block, index) => {
    if (index < same) return old[index];
    const holder = document.createDocumentFragment();
    build(holder, block.tokens);
    const node = holder.firstElementChild ?? h("span");
    element.append(node);
    return { key: block.key, node };
  });
}
