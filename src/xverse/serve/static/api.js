// Requests to the server. All addresses are relative, so that the page works under any path.

import { t } from "./language.js";

/** `code` says what happened, in the API's words or: offline, interrupted, tooLong. */
export class Failure extends Error {
  constructor(code, values = {}) {
    super(code);
    this.code = code;
    this.values = values;
  }
}

const TEXTS = {
  offline: "offline", interrupted: "interrupted", tooLong: "tooLong", tooLongToContinue: "tooLongToContinue",
  textTooLong: "textTooLong", emptyReply: "emptyReply", queue_full: "busy", shutting_down: "draining", timeout: "timeout",
  invalid_api_key: "key", body_too_large: "bodyTooLarge", generation_failed: "failed", internal_error: "failed",
};

/** A failure in the page's language; `error` is {code, values}. */
export function explain(error) {
  const values = error.values && typeof error.values === "object" ? error.values : {};
  return Object.hasOwn(TEXTS, error.code) ? t(TEXTS[error.code], values) : t("refused", { message: values.message ?? error.code });
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("offline");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  if (!body.error && response.status >= 502) throw new Failure("offline"); // a proxy without its server
  const seconds = Number(response.headers.get("Retry-After")) || 1;
  const message = body.error?.message ?? `HTTP ${response.status}`;
  throw new Failure(body.error?.code ?? (response.status === 413 ? "body_too_large" : ""), { seconds, message });
}

export async function settings() {
  return (await ask("page/settings", {})).json();
}

export async function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

/** The events of a streamed reply: {text} for each piece, and {reason} and {usage} at the end. */
export async function* stream(path, body, signal) {
  const whole = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await post(path, whole, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("interrupted");
    }
    if (piece.done) throw new Failure("interrupted");
    const events = (rest + piece.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const value = JSON.parse(data);
      if (value.error) throw new Failure(value.error.code ?? "", { message: value.error.message, seconds: 1 });
      const [choice] = value.choices;
      const text = choice?.delta?.content ?? choice?.text ?? "";
      yield { text, reason: choice?.finish_reason ?? null, usage: value.usage ?? null };
    }
  }
}
