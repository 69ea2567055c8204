// The tab that continues a text.

import { explain, Failure, post, stream } from "./api.js";
import { copy, find, toast } from "./dom.js";
import { t } from "./language.js";
import { sampling } from "./settings.js";

const INTERVAL = 50; // ms; a long text takes the browser longer to lay out than its next token to arrive

let ending = null;
let before = null; // the text before the last continuation
let page = null;

export function start(context) {
  page = context;
  const text = find("#text");
  find("#go-on").addEventListener("click", go);
  find("#halt").addEventListener("click", stop);
  find("#undo").addEventListener("click", () => {
    [text.value, before] = [before ?? text.value, null];
    controls();
  });
  find("#copy-text").addEventListener("click", async () => toast(t((await copy(text.value)) ? "copied" : "notCopied"), null, 2));
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) go();
  });
}

export function stop() {
  ending?.abort();
}

function controls() {
  find("#go-on").hidden = ending !== null;
  find("#halt").hidden = ending === null;
  find("#undo").disabled = ending !== null || before === null;
  find("#text").readOnly = ending !== null;
}

async function go() {
  const text = find("#text");
  const status = find("#text-status");
  if (ending) return;
  if (!text.value.trim()) {
    status.textContent = t("nothing");
    return;
  }
  ending = new AbortController();
  before = text.value;
  status.textContent = "";
  controls();
  try {
    await receive(text, status, ending.signal);
  } catch (error) {
    if (error.name !== "AbortError") status.textContent = explain(error instanceof Failure ? error : { code: "", values: { message: String(error) } });
  }
  ending = null;
  controls();
}

async function receive(text, status, signal) {
  const { context } = page.settings;
  const body = { ...sampling("generation"), prompt: text.value };
  // A token has at least one byte: only a longer text can exceed the context.
  if (new TextEncoder().encode(text.value).length + body.max_tokens >= context) {
    const { count } = await (await post("tokenize", { text: text.value }, signal)).json();
    if (count >= context) throw new Failure("textTooLong", { tokens: count, context });
    body.max_tokens = Math.min(body.max_tokens, context - count);
  }
  const begin = performance.now();
  let tokens = 0;
  let arrived = "";
  let timer = null;
  const show = () => {
    timer = null;
    const below = text.scrollHeight - text.scrollTop - text.clientHeight;
    text.value += arrived;
    arrived = "";
    if (below < 60) text.scrollTop = text.scrollHeight;
    const rate = (tokens / Math.max((performance.now() - begin) / 1000, 1e-3)).toFixed(1);
    if (tokens) status.textContent = t("speed", { tokens, rate });
  };
  try {
    for await (const piece of stream("v1/completions", body, signal)) {
      arrived += piece.text;
      tokens = piece.usage?.completion_tokens ?? tokens + (piece.text ? 1 : 0);
      timer ??= setTimeout(show, INTERVAL);
    }
  } finally {
    clearTimeout(timer);
    show();
  }
}
