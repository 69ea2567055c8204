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
 * {"messages": […]}. They get new names, so that nothing stored is overwritten. `skipped` counts what cannot be
 * read: conversations, and messages without text. */
export function imported(text, create) {
  let value;
  try { value = JSON.parse(text); } catch { return { found: [], skipped: 0 }; }
  if (value?.format === FORMAT && Array.isArray(value.conversations)) {
    const sound = value.conversations.map(normal).filter(Boolean);
    return { found: sound.map((each) => ({ ...each, id: identifier() })), skipped: value.conversations.length - sound.length };
  }
  const lists = Array.isArray(value) && value.some((each) => Array.isArray(each?.messages)) ? value : [value];
  const read = lists.map((each) => fromMessages(Array.isArray(each) ? each : each?.messages, create));
  return { found: read.map((each) => each.conversation).filter(Boolean), skipped: read.reduce((sum, each) => sum + each.skipped, 0) };
}

function fromMessages(messages, create) {
  if (!Array.isArray(messages)) return { conversation: null, skipped: 1 };
  const conversation = create();
  let skipped = 0;
  for (const message of messages) {
    const text = textOf(message?.content);
    if (text === null) skipped += 1;
    else if (message.role === "system" || message.role === "developer") conversation.system += text;
    else if (message.role === "user" || message.role === "assistant") add(conversation, conversation.leaf, message.role, text);
    else skipped += 1;
  }
  return { conversation: conversation.leaf ? conversation : null, skipped };
}

/** The text of a message, which may be in parts; null if there is none. */
function textOf(content) {
  if (typeof content === "string") return content;
  if (!Array.isArray(content)) return null;
  const texts = content.map((part) => (typeof part === "string" ? part : part?.text)).filter((text) => typeof text === "string");
  return texts.length ? texts.join("") : null;
}

export function download(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
  const link = h("a", { href: address, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
