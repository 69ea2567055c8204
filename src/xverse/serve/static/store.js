// What the browser keeps: conversations in IndexedDB, one record each; small settings in localStorage.
// Servers under different paths of one host have separate data.

import { normal } from "./conversation.js";

const NAME = `xverse ${location.pathname}`;
let database = null;
const removed = new Set(); // a reply may still end in one of them

export function read(key) {
  try { return localStorage.getItem(`xverse.${key}`); } catch { return null; }
}

export function write(key, value) {
  try { localStorage.setItem(`xverse.${key}`, value); } catch { /* the setting lasts as long as the page */ }
}

/** A stored object; {} if there is none or it is damaged. */
export function readObject(key) {
  try {
    const value = JSON.parse(read(key));
    return value && typeof value === "object" && !Array.isArray(value) ? value : {};
  } catch {
    return {};
  }
}

function request(make) {
  return new Promise((done, failed) => {
    const asked = make();
    asked.onsuccess = () => done(asked.result);
    asked.onerror = () => failed(asked.error);
    asked.onblocked = () => failed(new Error("blocked"));
  });
}

async function open() {
  const begin = () => {
    const asked = indexedDB.open(NAME, 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore("conversations", { keyPath: "id" });
    return asked;
  };
  const opened = await request(begin);
  opened.onversionchange = () => opened.close();
  opened.onclose = () => { database = null; };
  opened.transaction("conversations").abort(); // throws if the table is missing
  return opened;
}

/** All conversations, latest first; `kept`: whether the browser stores them; `skipped`: unreadable ones. */
export async function load() {
  try {
    try {
      database = await open();
    } catch (error) {
      if (error.name === "SecurityError" || error.name === "InvalidStateError") throw error;
      await request(() => indexedDB.deleteDatabase(NAME)); // damaged
      database = await open();
    }
    const records = await request(() => table("readonly").getAll());
    const all = records.map(normal).filter(Boolean).sort((one, other) => other.updated - one.updated);
    return { all, kept: true, skipped: records.length - all.length };
  } catch {
    database = null;
    return { all: [], kept: false, skipped: 0 };
  }
}

const table = (mode) => database.transaction("conversations", mode).objectStore("conversations");

/** Store a conversation. Messages that another window added to it are kept. False: the storage is full. */
export async function save(conversation) {
  if (!database || removed.has(conversation.id)) return true;
  try {
    const stored = normal(await request(() => table("readonly").get(conversation.id)));
    for (const [id, node] of Object.entries(stored?.nodes ?? {})) conversation.nodes[id] ??= node;
    await request(() => table("readwrite").put(conversation));
    return true;
  } catch (error) {
    return error?.name !== "QuotaExceededError";
  }
}

export const isRemoved = (id) => removed.has(id);

export const restore = (id) => removed.delete(id);

export async function remove(id) {
  removed.add(id);
  try { if (database) await request(() => table("readwrite").delete(id)); } catch { /* it is gone from view */ }
}
