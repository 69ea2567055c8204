// A conversation is a tree: editing a message or asking for another reply adds a branch. `leaf` is the last
// node of the branch in view.
//   conversation {id, title, system, created, updated, nodes: {id: node}, leaf}
//   node {id, parent, role, text, state, time, error?, tokens?, from?}
// `state` of a reply: running, done, cut (at the maximum length), stopped, failed (`error` says why). `tokens`:
// of the context after it. `from`: the first node that was sent for it, if the oldest were left out.

const STATES = ["running", "done", "cut", "stopped", "failed"];
export const identifier = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export function create(system = "") {
  const now = Date.now();
  return { id: identifier(), title: "", system, created: now, updated: now, nodes: {}, leaf: null };
}

export function add(conversation, parent, role, text, state = "done") {
  const node = { id: identifier(), parent, role, text, state, time: Date.now() };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  conversation.updated = node.time;
  return node;
}

/** The nodes from the first message to `id`. */
export function path(conversation, id = conversation.leaf) {
  const nodes = [];
  for (let node = conversation.nodes[id]; node; node = conversation.nodes[node.parent]) nodes.unshift(node);
  return nodes;
}

const children = (conversation, id) =>
  Object.values(conversation.nodes).filter((node) => node.parent === id).sort((one, other) => one.time - other.time);

/** All versions of a node, oldest first. */
export const versions = (conversation, node) => children(conversation, node.parent);

/** Show the branch of `node`, to its latest end. */
export function choose(conversation, node) {
  let last = node;
  for (let next = last; next; next = children(conversation, next.id).at(-1)) last = next;
  conversation.leaf = last.id;
}

export function title(conversation, untitled) {
  const first = path(conversation)[0]?.text ?? "";
  return conversation.title || first.slice(0, 200).trim().replace(/\s+/g, " ").slice(0, 60) || untitled;
}

/** Whether every word of `query` occurs in the title or in a message. */
export function matches(conversation, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const texts = [conversation.title, ...Object.values(conversation.nodes).map((node) => node.text)];
  const whole = texts.join("\n").toLowerCase();
  return words.every((word) => whole.includes(word));
}

/** What is sent to answer or continue `id`: [{role, content, node}]. Messages in a row of one role are joined.
 * Left out are empty ones and messages that alone exceed the context. */
export function sent(conversation, id) {
  const messages = [];
  if (conversation.system.trim()) messages.push({ role: "system", content: conversation.system, node: null });
  const nodes = path(conversation, id);
  nodes.forEach((node, index) => {
    const next = nodes[index + 1];
    const refused = node.role === "user" && next?.error?.code === "tooLong" && !next.text;
    if (!node.text.trim() || refused) return;
    const last = messages.at(-1);
    if (last?.role === node.role) last.content += `\n\n${node.text}`;
    else messages.push({ role: node.role, content: node.text, node: node.id });
  });
  return messages;
}

const named = (value) => typeof value === "string" && /^[0-9A-Za-z-]{1,64}$/.test(value);

/** A stored or imported record as a sound conversation; null if it is none. */
export function normal(record) {
  if (!record || typeof record !== "object" || !named(record.id)) return null;
  const text = (value) => (typeof value === "string" ? value : "");
  const number = (value) => (Number.isFinite(value) ? value : 0);
  const nodes = {};
  for (const each of Object.values(record.nodes ?? {})) {
    if (!named(each?.id) || typeof each.text !== "string") continue;
    if (each.role !== "user" && each.role !== "assistant") continue;
    const state = STATES.includes(each.state) ? each.state : "done";
    const node = { id: each.id, parent: null, role: each.role, text: each.text, state, time: number(each.time) };
    if (typeof each.parent === "string") node.parent = each.parent;
    if (state === "running") node.state = "stopped"; // the page was closed
    if (typeof each.error?.code === "string") node.error = each.error;
    if (Number.isFinite(each.tokens)) node.tokens = each.tokens;
    if (typeof each.from === "string") node.from = each.from;
    nodes[node.id] = node;
  }
  for (const node of Object.values(nodes)) { // a tree: every parent exists, and no circle
    const seen = new Set([node.id]);
    for (let at = node; at.parent !== null; at = nodes[at.parent]) {
      if (!Object.hasOwn(nodes, at.parent) || seen.has(at.parent)) at.parent = null;
      if (at.parent === null) break;
      seen.add(at.parent);
    }
  }
  const all = Object.values(nodes);
  if (!all.length) return null;
  const leaf = Object.hasOwn(nodes, record.leaf) ? record.leaf : all.sort((one, other) => one.time - other.time).at(-1).id;
  const { id, created, updated } = record;
  return { id, title: text(record.title), system: text(record.system), created: number(created), updated: number(updated), nodes, leaf };
}
