// The conversation in view: messages, the box to write in, and replies as they arrive. Replies go on while
// another conversation is in view.

import { explain, Failure, post, stream } from "./api.js";
import { add, choose, create, path, sent, versions } from "./conversation.js";
import { find, grow, h, toast } from "./dom.js";
import { examples, onLanguage, t } from "./language.js";
import { render } from "./markdown.js";
import { messageView } from "./message.js";
import { sampling, systemOf } from "./settings.js";
import { save } from "./store.js";

const PAUSE = 60; // milliseconds between two drawings of a reply
const STORE_PAUSE = 2000; // between two savings of a reply that goes on
const LEAST_ROOM = 256; // tokens for a reply; the server's rule too

const running = new Map(); // conversation -> AbortController
let current = null;
let page = null; // {settings, changed(conversation)}

export const isRunning = (conversation) => running.has(conversation);
export const opened = () => current;

export function start(context) {
  page = context;
  const box = find("#message");
  const say = () => {
    if (!box.value.trim() || (current && isRunning(current))) return;
    const text = box.value;
    box.value = "";
    grow(box);
    send(text);
  };
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    say();
  });
  box.addEventListener("input", () => { grow(box); controls(); });
  find("#send").addEventListener("click", say);
  find("#stop").addEventListener("click", () => stop());
  follow();
  addEventListener("visibilitychange", () => {
    for (const conversation of running.keys()) if (document.hidden) keep(conversation); // it may be closed
  }, true);
  onLanguage(() => {
    find("#examples").replaceChildren(...examples().map(([skill, prompt]) =>
      h("li", {}, h("button", { type: "button", onclick: () => send(prompt) }, h("strong", {}, skill), h("span", {}, prompt)))));
    draw();
  });
}

/** Keep the end in view while it grows, unless the reader has scrolled up. */
function follow() {
  const scroll = find("#scroll");
  let atEnd = true;
  scroll.addEventListener("scroll", () => { atEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60; });
  new ResizeObserver(() => { if (atEnd && current) scroll.scrollTop = scroll.scrollHeight; }).observe(find("#messages"));
}

export function stop(conversation = current) {
  if (conversation) running.get(conversation)?.abort();
}

/** Show a conversation, or with null an empty page. */
export function show(conversation) {
  current = conversation;
  find("#status").textContent = "";
  draw();
  find("#scroll").scrollTop = conversation ? find("#scroll").scrollHeight : 0;
}

function send(text) {
  current ??= create(systemOf(null));
  add(current, current.leaf, "user", text);
  answer(current);
}

const actions = {
  edit(node, text) {
    add(current, node.parent, "user", text);
    answer(current);
  },
  again(node) {
    current.leaf = node.parent;
    answer(current, node.text ? null : node);
  },
  answer: () => answer(current),
  onward: (node) => answer(current, node, true),
  show(node) {
    choose(current, node);
    keep(current);
    draw();
  },
};

/** The reply to the last message of `conversation`: a new node, or `node` again, or its continuation. */
async function answer(conversation, node = null, onward = false) {
  if (isRunning(conversation)) return;
  const ending = new AbortController();
  running.set(conversation, ending);
  const messages = sent(conversation, onward ? node.id : conversation.leaf);
  if (node && !onward) Object.assign(node, { text: "", state: "running" });
  node ??= add(conversation, conversation.leaf, "assistant", "", "running");
  conversation.leaf = node.id;
  node.state = "running";
  delete node.error;
  page.changed(conversation);
  keep(conversation);
  if (conversation === current) {
    draw();
    find("#scroll").scrollTop = find("#scroll").scrollHeight;
  }
  try {
    await receive(conversation, node, messages, onward, ending.signal);
  } catch (error) {
    if (error.name === "AbortError") node.state = "stopped";
    else {
      node.state = "failed";
      node.error = error instanceof Failure ? { code: error.code, values: error.values } : { code: "", values: { message: String(error) } };
    }
  }
  running.delete(conversation);
  if (node.state !== "done" && node.state !== "cut" && node.text) node.tokens = await counted(conversation, node);
  conversation.updated = Date.now();
  page.changed(conversation);
  await keep(conversation);
  if (conversation === current) {
    find("#announcement").textContent = node.error ? explain(node.error) : t(node.state === "stopped" ? "stopped" : "complete");
    draw();
  }
}

async function receive(conversation, node, messages, onward, signal) {
  const body = await prepared(node, messages, onward, signal);
  const begin = performance.now();
  let tokens = 0;
  let drawn = 0;
  let stored = begin;
  for await (const { text, reason, usage } of stream("v1/chat/completions", body, signal)) {
    node.text += text;
    if (text) tokens += 1;
    if (reason) node.state = reason === "length" ? "cut" : "done";
    if (usage) {
      tokens = usage.completion_tokens;
      node.tokens = usage.total_tokens;
    }
    const now = performance.now();
    const shown = conversation === current;
    if (shown && (now - drawn > PAUSE || usage)) {
      drawReply(node);
      const rate = (tokens / Math.max((now - begin) / 1000, 1e-3)).toFixed(1);
      if (tokens) find("#status").textContent = t("speed", { tokens, rate });
      drawn = performance.now() + 3 * (performance.now() - now); // slow drawing is done less often
    }
    if (now - stored > STORE_PAUSE) {
      keep(conversation);
      stored = now;
    }
  }
}

/** The request. A conversation that might exceed the context is first fitted by the server. */
async function prepared(node, messages, onward, signal) {
  const values = sampling("chat");
  const wire = messages.map(({ role, content }) => ({ role, content }));
  const bytes = messages.reduce((sum, { content }) => sum + new TextEncoder().encode(content).length + 32, 0);
  delete node.from;
  if (!onward && bytes + Math.max(LEAST_ROOM, values.max_tokens ?? 0) < page.settings.context) {
    return { ...values, messages: wire };
  }
  const fitted = await (await post("page/fit", { messages: wire, max_tokens: values.max_tokens }, signal)).json();
  if (fitted.too_long !== undefined) {
    throw new Failure(onward ? "tooLongToContinue" : "tooLong", { tokens: fitted.too_long, most: fitted.most });
  }
  const system = wire[0].role === "system" ? 1 : 0;
  if (fitted.first > system) node.from = messages[fitted.first].node;
  const body = { ...values, max_tokens: fitted.max_tokens };
  return { ...body, messages: [...wire.slice(0, system), ...wire.slice(fitted.first)], continue_final_message: onward };
}

/** Tokens of the context after a reply that did not end by itself, which comes without usage. */
async function counted(conversation, node) {
  const messages = sent(conversation, node.id).map(({ role, content }) => ({ role, content }));
  const fitted = await post("page/fit", { messages }).then((response) => response.json()).catch(() => ({}));
  return fitted.tokens;
}

let warned = false;

async function keep(conversation) {
  if (!(await save(conversation)) && !warned) {
    warned = true;
    toast(t("full"));
  }
}

// ---- drawing ----

function draw() {
  if (!page) return;
  const nodes = current ? path(current) : [];
  const busy = current !== null && isRunning(current);
  const holder = find("#messages");
  const from = nodes.findLast((node) => node.role === "assistant")?.from;
  holder.replaceChildren(...nodes.flatMap((node, index) => {
    const last = index === nodes.length - 1;
    const view = messageView(node, { versions: versions(current, node), last, busy, model: page.settings.model, actions });
    return node.id === from ? [h("p", { class: "left-out", role: "note" }, t("leftOut")), view] : [view];
  }));
  find("#empty").hidden = nodes.length > 0;
  controls();
  meter(nodes);
}

function controls() {
  const busy = current !== null && isRunning(current);
  find("#send").hidden = busy;
  find("#stop").hidden = !busy;
  find("#send").disabled = !find("#message").value.trim();
}

function drawReply(node) {
  const view = find(`#messages [data-node="${node.id}"]`);
  if (!view) return;
  render(view.querySelector(".content"), node.text);
  if (node.text) view.querySelector(".waiting")?.remove();
}

function meter(nodes) {
  const used = nodes.findLast((node) => node.tokens)?.tokens ?? 0;
  const { context } = page.settings;
  const bar = find("#meter");
  bar.hidden = !used;
  bar.setAttribute("aria-valuemax", context);
  bar.setAttribute("aria-valuenow", Math.min(used, context));
  bar.title = t("meter", { used, context });
  bar.setAttribute("aria-valuetext", bar.title);
  bar.querySelector("i").style.setProperty("--used", `${Math.min(100, (100 * used) / context)}%`);
  bar.querySelector("span").textContent = `${used.toLocaleString()} / ${context.toLocaleString()}`;
}
