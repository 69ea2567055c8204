// The openai package of npm: turns, streaming, tools with runTools, structured output with zod.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { QUESTION, URL, assert, run } from "./cases.mjs";

const client = new OpenAI({ baseURL: URL, apiKey: "none", maxRetries: 0 });
const Wall = z.object({ colour: z.enum(["red", "blue"]) });
const model = "nano";

await run({
  async turns() {
    const messages = [{ role: "user", content: QUESTION }];
    for (let turn = 0; turn < 3; turn++) {
      const reply = await client.chat.completions.create({ model, messages, max_tokens: 20 });
      messages.push(reply.choices[0].message, { role: "user", content: "And yours?" });
    }
  },
  async streaming() {
    const stream = client.chat.completions.stream({
      model, messages: [{ role: "user", content: QUESTION }], max_tokens: 200, temperature: 0, stream_options: { include_usage: true },
    });
    let text = "";
    stream.on("content", (piece) => { text += piece; });
    const whole = await stream.finalChatCompletion();
    assert(text === whole.choices[0].message.content, "the pieces differ");
  },
  async tools() {
    let calls = 0;
    const runner = client.chat.completions.runTools({
      model, max_tokens: 60, messages: [{ role: "user", content: "Paint it red." }],
      tool_choice: { type: "function", function: { name: "paint" } },
      tools: [{ type: "function", function: {
        name: "paint", description: "Paints", parse: JSON.parse, function: () => { calls++; return ""; },
        parameters: { type: "object", properties: { colour: { enum: ["red", "blue"] } }, required: ["colour"] },
      } }],
    });
    await runner.done();
    assert(calls === 1, `called ${calls} times`);
  },
  async structured() {
    const reply = await client.chat.completions.parse({
      model, messages: [{ role: "user", content: QUESTION }], max_tokens: 100,
      response_format: zodResponseFormat(Wall, "wall"),
    });
    assert(reply.choices[0].message.parsed.colour, "nothing was parsed");
  },
});
