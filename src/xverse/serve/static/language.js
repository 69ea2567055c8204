// The language of the page: the texts of texts.js, put into the elements that name them.

import { icon } from "./dom.js";
import { read, write } from "./store.js";
import { TEXTS } from "./texts.js";

const changed = [];
let language = choose();

function choose() {
  const saved = read("language");
  if (saved in TEXTS) return saved;
  for (const name of navigator.languages ?? []) {
    const short = name.toLowerCase().split("-")[0];
    if (short in TEXTS) return short;
  }
  return "en";
}

export const current = () => language;

/** The text `key` with {name} replaced by values; numbers are written with separators. */
export function t(key, values = {}) {
  const written = (value) => (typeof value === "number" ? value.toLocaleString(language) : String(value));
  return TEXTS[language][key].replace(/\{(\w+)\}/g, (whole, name) => (name in values ? written(values[name]) : whole));
}

export const examples = () => TEXTS[language].examples;

/** Call `listener` now and whenever the language changes. */
export function onLanguage(listener) {
  changed.push(listener);
  listener();
}

export function toggle() {
  language = language === "zh" ? "en" : "zh";
  write("language", language);
  translate();
}

/** Fill `data-text`, `data-label`, `data-placeholder` and `data-icon` of the whole page. */
export function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-text], [data-label], [data-placeholder]")) {
    const { text, label, placeholder, icon: name } = element.dataset;
    if (text) element.replaceChildren(...(name ? [icon(name)] : []), t(text));
    else if (name && !element.firstChild) element.append(icon(name));
    if (label) {
      element.setAttribute("aria-label", t(label));
      if (element.localName === "button") element.title = t(label);
    }
    if (placeholder) element.placeholder = t(placeholder);
  }
  for (const listener of changed) listener();
}
