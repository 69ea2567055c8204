// Puts the page together.

import { settings as fetchSettings, explain } from "./api.js";
import * as chat from "./chat.js";
import { find, h, icon, toast } from "./dom.js";
import * as generation from "./generation.js";
import { onLanguage, t, toggle as toggleLanguage, translate } from "./language.js";
import * as panel from "./settings.js";
import * as sidebar from "./sidebar.js";
import { isRemoved, load, read, save, write } from "./store.js";

const NARROW = 800; // pixels; the style sheet's too
const THEMES = ["auto", "light", "dark"];
const all = []; // every conversation
let mode = "chat";

function open(conversation) {
  chat.show(conversation);
  write("open", conversation?.id ?? "");
  sidebar.draw();
  panel.draw();
  if (innerWidth <= NARROW) showSidebar(false);
  if (mode !== "chat") select("chat");
  if (innerWidth > NARROW) find("#message").focus();
}

/** A conversation has got a message or a reply. */
function changed(conversation) {
  if (!all.includes(conversation) && !isRemoved(conversation.id)) {
    all.push(conversation);
    write("open", conversation.id);
  }
  sidebar.draw();
}

function showSidebar(shown) {
  if (shown) document.documentElement.dataset.sidebar = "shown";
  else delete document.documentElement.dataset.sidebar;
  find("#shade").hidden = !shown || innerWidth > NARROW;
  if (innerWidth > NARROW) write("sidebar", shown ? "shown" : "hidden");
}

function select(chosen) {
  mode = chosen;
  for (const name of ["chat", "generation"]) {
    const tab = find(`#tab-${name}`);
    tab.setAttribute("aria-selected", name === chosen);
    tab.tabIndex = name === chosen ? 0 : -1;
    find(`#${name}`).hidden = name !== chosen;
  }
  find("#meter").classList.toggle("away", chosen !== "chat");
  panel.draw();
}

function tabs() {
  for (const [name, other] of [["chat", "generation"], ["generation", "chat"]]) {
    find(`#tab-${name}`).addEventListener("click", () => select(name));
    find(`#tab-${name}`).addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      select(other);
      find(`#tab-${other}`).focus();
    });
  }
}

function theme() {
  let chosen = THEMES.includes(read("theme")) ? read("theme") : "auto";
  const system = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    const dark = chosen === "dark" || (chosen === "auto" && system.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    find("#theme").replaceChildren(icon(chosen), t("theme", { theme: t(chosen) }));
  };
  system.addEventListener("change", apply);
  find("#theme").addEventListener("click", () => {
    chosen = THEMES[(THEMES.indexOf(chosen) + 1) % THEMES.length];
    write("theme", chosen);
    apply();
  });
  onLanguage(apply);
}

function shortcuts(event) {
  const control = event.ctrlKey || event.metaKey;
  const typing = event.target.closest?.("input, textarea");
  const key = event.key.toLowerCase();
  if (control && event.shiftKey && key === "o") open(null);
  else if (control && key === "k") { showSidebar(true); find("#search").focus(); }
  else if (control && key === ",") panel.toggle();
  else if (!control && !typing && key === "/") find(mode === "chat" ? "#message" : "#text").focus();
  else if (key === "escape" && !event.isComposing) {
    if (innerWidth <= NARROW && !find("#shade").hidden) showSidebar(false);
    else if (find("#settings").contains(event.target)) panel.toggle(false);
    else if (mode === "chat") chat.stop();
    else generation.stop();
    return;
  } else return;
  event.preventDefault();
}

async function facts() {
  for (let wait = 1000; ; wait = Math.min(2 * wait, 15_000)) {
    try {
      return await fetchSettings();
    } catch (error) {
      toast(explain(error), null, wait / 1000);
      await new Promise((done) => setTimeout(done, wait));
    }
  }
}

async function begin() {
  translate();
  onLanguage(() => find("#language").replaceChildren(icon("language"), h("span", { lang: t("switchTo") === "中文" ? "zh-CN" : "en" }, t("switchTo"))));
  theme();
  tabs();
  find("#language").addEventListener("click", toggleLanguage);
  find("#hide").addEventListener("click", () => showSidebar(false));
  find("#show").addEventListener("click", () => showSidebar(document.documentElement.dataset.sidebar !== "shown"));
  find("#shade").addEventListener("click", () => showSidebar(false));
  find("#new").addEventListener("click", () => open(null));
  addEventListener("keydown", shortcuts);
  const [settings, stored] = await Promise.all([facts(), load()]);
  all.push(...stored.all);
  find("#model").textContent = settings.model;
  document.title = settings.model;
  panel.start({ settings, mode: () => mode, conversation: chat.opened, keep: save });
  generation.start({ settings });
  sidebar.start({ all, opened: chat.opened, open, isRunning: chat.isRunning, stop: chat.stop });
  chat.start({ settings, changed });
  select(settings.first);
  const last = all.find((conversation) => conversation.id === read("open"));
  if (last) { chat.show(last); sidebar.draw(); }
  if (!stored.kept) toast(t("notStored"));
  if (stored.skipped) toast(t("skipped", { count: stored.skipped }));
  document.documentElement.dataset.ready = "";
  if (innerWidth > NARROW) find(settings.first === "chat" ? "#message" : "#text").focus();
}

begin();
