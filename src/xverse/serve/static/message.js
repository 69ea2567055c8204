// One message: its text, what can be done with it, and what went wrong.

import { explain } from "./api.js";
import { copy, grow, h, iconButton, toast } from "./dom.js";
import { t } from "./language.js";
import { render } from "./markdown.js";

/** The element of a node. `actions`: {edit, again, onward, show}; `versions`: all versions of the node. */
export function messageView(node, { versions, last, busy, model, actions }) {
  const mine = node.role === "user";
  const content = h("div", { class: "content", dir: "auto" });
  const name = mine ? t("you") : model;
  const view = h("article", { class: node.role, "aria-label": name, "data-node": node.id }, content);
  if (mine) content.textContent = node.text;
  else render(content, node.text);
  if (node.state === "running") {
    view.append(node.text ? "" : h("p", { class: "note waiting" }, t("thinking")));
    return view;
  }
  const note = noteOf(node);
  if (note) view.append(h("p", { class: node.error ? "note error" : "note", dir: "auto" }, note));
  const row = h("div", { class: "actions" });
  const index = versions.indexOf(node);
  if (versions.length > 1) {
    const move = (step) => () => actions.show(versions[index + step]);
    row.append(
      iconButton("left", t("previous"), move(-1), { disabled: busy || index === 0 }),
      h("span", { class: "muted" }, h("span", { class: "offscreen" }, t("version", { at: index + 1, count: versions.length })),
        h("span", { "aria-hidden": "true" }, `${index + 1}/${versions.length}`)),
      iconButton("right", t("next"), move(1), { disabled: busy || index === versions.length - 1 }));
  }
  const copied = async () => toast(t((await copy(node.text)) ? "copied" : "notCopied"), null, 2);
  if (node.text) row.append(iconButton("copy", t("copy"), copied));
  if (mine) row.append(iconButton("edit", t("edit"), () => editor(view, node, actions), { disabled: busy }));
  else if (node.error && !node.text) {
    if (node.error.code !== "tooLong") row.append(h("button", { type: "button", onclick: () => actions.again(node), disabled: busy }, t("retry")));
  } else row.append(iconButton("again", t("again"), () => actions.again(node), { disabled: busy }));
  const ended = node.state === "stopped" || node.state === "cut" || (node.error && node.text);
  if (!mine && last && ended && node.text) {
    row.append(h("button", { type: "button", onclick: () => actions.onward(node), disabled: busy }, t("goOn")));
  }
  if (mine && last) row.append(h("button", { type: "button", onclick: () => actions.answer(node), disabled: busy }, t("retry")));
  view.append(row);
  return view;
}

function noteOf(node) {
  if (node.error) return explain(node.error);
  if (node.state === "stopped") return t("stopped");
  if (node.state === "cut") return t("cut");
  return node.role === "assistant" && !node.text ? t("emptyReply") : "";
}

/** The message as a text area; sending it makes a new branch. */
function editor(view, node, actions) {
  const area = h("textarea", { "aria-label": t("edit"), dir: "auto", class: "editor" });
  area.value = node.text;
  const before = [...view.childNodes];
  const close = () => view.replaceChildren(...before);
  const send = () => area.value.trim() && actions.edit(node, area.value);
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); close(); }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
  });
  area.addEventListener("input", () => grow(area));
  view.replaceChildren(area, h("div", { class: "actions" },
    h("button", { type: "button", class: "primary", onclick: send }, t("save")),
    h("button", { type: "button", onclick: close }, t("cancel"))));
  grow(area);
  area.focus();
}
