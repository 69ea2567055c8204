// Conversations as files, and back.

import { add, identifier, normal, path, title } from "./conversation.js";
import { h } from "./dom.js";

const FORMAT = "xverse-conversations";

export function asJson(conversations) {
  return `${JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1)}\n`;
}

/** The branch in view. */
export function asMarkdown(conversation, t) {
  const parts = [`# ${title(conversation, t("untitled"))}`];
  if (conversation.system.trim()) parts.push(`## ${t("system")}`, conversation.system);
  for (const node of path(conversation)) parts.push(node.role === "user" ? `## ${t("you")}` : "## XVERSE", node.text);
  return `${parts.join("\n\n")}\n`;
}

/** The conversations in a file: this page's own export, or a list of {role, content} messages, also as
 * {"messages": […]}. They get new names, so that nothing stored is overwritten. */
export function imported(text, create) {
  let value;
  try { value = JSON.parse(text); } catch { return []; }
  if (value?.format === FORMAT && Array.isArray(value.conversations)) {
    return value.conversations.map(normal).filter(Boolean).map((each) => ({ ...each, id: identifier() }));
  }
  const lists = Array.isArray(value) && value.every((each) => Array.isArray(each?.messages)) ? value : [value];
  return lists.map((each) => fromMessages(Array.isArray(each) ? each : each?.messages, create)).filter(Boolean);
}

function fromMessages(messages, create) {
  if (!Array.isArray(messages)) return null;
  const conversation = create();
  for (const message of messages) {
    if (typeof message?.content !== "string") continue;
    if (message.role === "system") conversation.system += message.content;
    else if (message.role === "user" || message.role === "assistant") add(conversation, conversation.leaf, message.role, message.content);
  }
  return conversation.leaf ? conversation : null;
}

export function download(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
  const link = h("a", { href: address, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
