// The settings panel: the system prompt of the conversation, and the sampling parameters that the server lists.
// Only values that differ from the server's are stored, so a server with other defaults is followed.

import { find, grow, h } from "./dom.js";
import { current as language, onLanguage, t } from "./language.js";
import { readObject, write } from "./store.js";

const stored = { chat: {}, generation: {}, ...readObject("settings") };
let page = null; // {settings, mode(), conversation(), keep(conversation)}

export function start(context) {
  page = context;
  for (const mode of ["chat", "generation"]) {
    if (typeof stored[mode] !== "object" || stored[mode] === null) stored[mode] = {};
    for (const param of context.settings.params) {
      if (param.name in stored[mode] && problem(param, stored[mode][param.name])) delete stored[mode][param.name];
    }
  }
  find("#open-settings").addEventListener("click", () => toggle());
  find("#close-settings").addEventListener("click", () => toggle(false));
  onLanguage(draw);
}

export function toggle(shown = find("#settings").hidden) {
  find("#settings").hidden = !shown;
  find("#open-settings").setAttribute("aria-expanded", shown);
  if (shown) {
    draw();
    find("#controls textarea, #controls input")?.focus();
  } else find("#open-settings").focus();
}

/** The values to send. Text generation sends all of its own; a chat those that differ from the server's. */
export function sampling(mode) {
  const values = mode === "chat" ? {} : Object.fromEntries(page.settings.params.map((param) => [param.name, initial(param, mode)]));
  for (const [name, value] of Object.entries({ ...values, ...stored[mode] })) {
    if (value === null || (Array.isArray(value) && !value.length)) delete values[name];
    else if (page.settings.params.some((param) => param.name === name)) values[name] = value;
  }
  return values;
}

/** The system prompt of a conversation; that of the next one without. */
export const systemOf = (conversation) => conversation?.system ?? (typeof stored.system === "string" ? stored.system : "");

function keep() {
  write("settings", JSON.stringify(stored));
}

const initial = (param, mode) => param[mode];

/** What is wrong with a value, or "". */
function problem(param, value) {
  if (param.kind === "str") return Array.isArray(value) && value.length <= 16 && value.every((each) => typeof each === "string") ? "" : t("oneEach");
  if (value === null) return "";
  const high = param.high ?? Infinity;
  const fits = Number.isFinite(value) && value >= param.low && value <= high && !(param.above && value === param.low);
  if (fits && (param.kind !== "int" || Number.isInteger(value))) return "";
  const range = param.high === null ? t("atLeast", { low: param.low }) : t("range", { low: param.low, high: param.high });
  return t("wrongValue", { name: param.texts[language()][0], value: String(value), range });
}

export function draw() {
  if (!page || find("#settings").hidden) return;
  const mode = page.mode();
  const parts = [];
  if (mode === "chat") parts.push(systemControl());
  parts.push(h("h3", {}, t(mode === "chat" ? "samplingChat" : "samplingGeneration")));
  parts.push(...page.settings.params.map((param) => control(param, mode)));
  const reset = () => { stored[mode] = {}; keep(); draw(); };
  parts.push(h("button", { type: "button", onclick: reset }, t("reset")));
  parts.push(h("h3", {}, t("shortcuts")), shortcuts());
  find("#controls").replaceChildren(...parts);
  for (const area of find("#controls").querySelectorAll("textarea")) grow(area);
}

function systemControl() {
  const area = h("textarea", { id: "system", rows: "3", dir: "auto", placeholder: t("systemHint") });
  const conversation = page.conversation();
  area.value = systemOf(conversation);
  area.addEventListener("input", () => {
    grow(area);
    stored.system = area.value;
    keep();
    if (conversation) {
      conversation.system = area.value;
      page.keep(conversation);
    }
  });
  return h("div", { class: "control" }, h("label", { for: "system" }, t("system")), area);
}

function control(param, mode) {
  const [label, help] = param.texts[language()];
  const id = `param-${param.name}`;
  const error = h("p", { class: "error", role: "alert" });
  const value = param.name in stored[mode] ? stored[mode][param.name] : initial(param, mode);
  const change = (next, others) => {
    error.textContent = problem(param, next);
    if (error.textContent) return;
    if (JSON.stringify(next) === JSON.stringify(initial(param, mode))) delete stored[mode][param.name];
    else stored[mode][param.name] = next;
    keep();
    for (const other of others) if (document.activeElement !== other) other.value = next ?? "";
  };
  const about = h("p", { class: "muted", id: `${id}-help` }, help);
  if (param.kind === "str") {
    const area = h("textarea", { id, rows: "1", dir: "auto", "aria-describedby": `${id}-help` });
    area.value = (value ?? []).join("\n");
    area.addEventListener("input", () => { grow(area); change(area.value.split("\n").filter(Boolean), []); });
    return h("div", { class: "control" }, h("label", { for: id }, label), area, about, error);
  }
  const number = h("input", { id, type: "number", step: param.kind === "int" ? "1" : "any", "aria-describedby": `${id}-help`, value: value ?? "" });
  const others = [number];
  const typed = (input) => () => change(input.value === "" ? (param.name === "seed" ? null : NaN) : Number(input.value), others);
  number.addEventListener("input", typed(number));
  const row = [h("label", { for: id }, label), number];
  if (param.slider.length) {
    const [min, max, step] = param.slider;
    const slider = h("input", { type: "range", min, max, step, "aria-label": label, value });
    slider.addEventListener("input", typed(slider));
    others.push(slider);
    row.push(slider);
  }
  return h("div", { class: "control number" }, ...row, about, error);
}

function shortcuts() {
  const control = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘" : "Ctrl";
  const keys = [
    [`${control}+Shift+O`, "shortcutNew"], [`${control}+K`, "shortcutSearch"], [`${control}+,`, "shortcutSettings"],
    ["/", "shortcutFocus"], ["Esc", "shortcutStop"],
  ];
  return h("dl", { class: "keys" }, ...keys.flatMap(([key, name]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, t(name))]));
}
