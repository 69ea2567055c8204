// The list of conversations: search, rename, export, import, delete.

import { create, matches, title } from "./conversation.js";
import { find, h, iconButton, toast } from "./dom.js";
import { onLanguage, t } from "./language.js";
import { remove, restore, save } from "./store.js";
import { asJson, asMarkdown, download, imported } from "./transfer.js";

let page = null; // {all, opened(), open(conversation), isRunning(conversation), stop(conversation)}

export function start(context) {
  page = context;
  find("#search").addEventListener("input", draw);
  find("#import").addEventListener("click", choose);
  find("#export").addEventListener("click", () => download("xverse-conversations.json", asJson(page.all)));
  document.addEventListener("click", closeMenu);
  document.addEventListener("keydown", (event) => event.key === "Escape" && closeMenu());
  onLanguage(draw);
}

export function draw() {
  const query = find("#search").value;
  const shown = page.all.filter((conversation) => !query.trim() || matches(conversation, query));
  shown.sort((one, other) => other.updated - one.updated);
  find("#conversations").replaceChildren(...shown.map(entry));
  find("#none-found").hidden = shown.length > 0;
  find("#none-found").textContent = t(query.trim() ? "noneFound" : "noneYet");
  find("#export").disabled = !page.all.length;
}

function entry(conversation) {
  const name = title(conversation, t("untitled"));
  const open = h("button", { type: "button", class: "open", dir: "auto", title: name, onclick: () => page.open(conversation) }, name);
  if (page.opened() === conversation) open.setAttribute("aria-current", "true");
  const item = h("li", { "data-id": conversation.id }, open);
  if (page.isRunning(conversation)) item.append(h("span", { class: "dot", role: "img", "aria-label": t("running") }));
  const more = iconButton("more", t("more", { title: name }), (event) => { event.stopPropagation(); menu(item, more, conversation); }, { "aria-expanded": "false" });
  item.append(more);
  return item;
}

function closeMenu() {
  document.querySelector(".menu")?.remove();
  document.querySelector("#conversations [aria-expanded=true]")?.setAttribute("aria-expanded", "false");
}

function menu(item, button, conversation) {
  const again = button.getAttribute("aria-expanded") === "true";
  closeMenu();
  if (again) return;
  const name = title(conversation, t("untitled")).replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "conversation";
  const act = (text, run) => h("button", { type: "button", onclick: () => { closeMenu(); run(); } }, t(text));
  button.setAttribute("aria-expanded", "true");
  item.append(h("div", { class: "menu" },
    act("rename", () => rename(item, conversation)),
    act("exportMarkdown", () => download(`${name}.md`, asMarkdown(conversation, t))),
    act("exportJson", () => download(`${name}.json`, asJson([conversation]))),
    act("delete", () => erase(conversation))));
  const box = item.querySelector(".menu");
  box.firstChild.focus();
  box.scrollIntoView({ block: "nearest" });
}

function rename(item, conversation) {
  const box = h("input", { type: "text", dir: "auto", "aria-label": t("title"), maxlength: "200", value: title(conversation, "") });
  let done = false;
  const end = (keep) => {
    if (done) return;
    done = true;
    if (keep) {
      conversation.title = box.value.trim();
      save(conversation);
    }
    draw();
  };
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) end(true);
    if (event.key === "Escape") { event.stopPropagation(); end(false); }
  });
  box.addEventListener("blur", () => end(true));
  item.replaceChildren(box);
  box.select();
}

function erase(conversation) {
  page.stop(conversation);
  const index = page.all.indexOf(conversation);
  page.all.splice(index, 1);
  remove(conversation.id);
  if (page.opened() === conversation) page.open(null);
  else draw();
  const undo = () => {
    restore(conversation.id);
    page.all.push(conversation);
    save(conversation);
    draw();
  };
  toast(t("deleted", { title: title(conversation, t("untitled")) }), { text: t("undo"), run: undo });
}

function choose() {
  const box = h("input", { type: "file", accept: ".json,application/json", multiple: true });
  box.addEventListener("change", async () => {
    let count = 0, left = 0;
    for (const file of box.files) {
      const { found, skipped } = imported(await file.text(), create);
      if (!found.length) {
        toast(t("notImported", { name: file.name }));
        continue;
      }
      for (const conversation of found) {
        page.all.push(conversation);
        await save(conversation);
      }
      count += found.length;
      left += skipped;
    }
    if (left && count) toast(t("importedPartly", { count, left }));
    else if (count) toast(t("imported", { count }), null, 3);
    draw();
  });
  box.click();
}
