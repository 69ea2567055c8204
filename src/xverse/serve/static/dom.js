// Elements. No text is ever parsed as HTML: strings become text nodes.

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  sidebar: "M4 5h16v14H4zM9.5 5v14",
  plus: "M12 5v14M5 12h14",
  import: "M12 15V4M8 8l4-4 4 4M5 15v4h14v-4",
  export: "M12 4v11M8 11l4 4 4-4M5 15v4h14v-4",
  language: "M12 3a9 9 0 100 18 9 9 0 000-18zM3 12h18M12 3c3 3 3 15 0 18M12 3c-3 3-3 15 0 18",
  auto: "M12 4a8 8 0 100 16zM12 4a8 8 0 010 16",
  light: "M12 8a4 4 0 100 8 4 4 0 000-8zM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.4 1.4M17.6 17.6L19 19M5 19l1.4-1.4M17.6 6.4L19 5",
  dark: "M20 14A8.5 8.5 0 0110 4a8.5 8.5 0 1010 10z",
  sliders: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.5v5M9 14.5v5",
  send: "M12 19V6M6 11.5L12 5.5l6 6",
  stop: "M7.5 7.5h9v9h-9z",
  close: "M6 6l12 12M18 6L6 18",
  more: "M6 12h.01M12 12h.01M18 12h.01",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  edit: "M4 20l1-4L16.5 4.5l3 3L8 19zM14.5 6.5l3 3",
  again: "M5 12a7 7 0 0112-5l2 2M19 4v5h-5M19 12a7 7 0 01-12 5l-2-2M5 20v-5h5",
  onward: "M5 6l7 6-7 6zM15 6v12M19 6v12",
  left: "M14.5 6l-6 6 6 6",
  right: "M9.5 6l6 6-6 6",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
};

/** An element with attributes; `on…` functions become listeners, children strings or nodes. */
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button with an icon and an accessible name. */
export function iconButton(name, label, onclick, more = {}) {
  return h("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick, ...more }, icon(name));
}

export const find = (selector) => document.querySelector(selector);

/** A short message at the bottom, with one action if given. */
export function toast(text, action = null, seconds = 8) {
  const box = h("div", { class: "toast" }, h("span", { dir: "auto" }, text));
  const remove = () => box.remove();
  if (action) {
    box.append(h("button", { type: "button", class: "quiet", onclick: () => { remove(); action.run(); } }, action.text));
  }
  find("#toasts").replaceChildren(box);
  setTimeout(remove, seconds * 1000);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // not available without TLS, except on the local machine
    const area = h("textarea", { class: "offscreen", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** Make a text area as high as its text, up to the maximum of its style. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}
