// Vercel's AI SDK: turns, streaming, a tool without output, objects. With its provider for OpenAI, whose default is the
// Responses API, where that is installed, else with the one for compatible servers.
import { generateText, stepCountIs, streamText, tool, Output } from "ai";
import { z } from "zod";
import { QUESTION, URL, assert, run } from "./cases.mjs";

const options = { name: "xverse", baseURL: URL, apiKey: "none", supportsStructuredOutputs: true };
const openai = await import("@ai-sdk/openai").catch(() => null);
const provider = openai
  ? openai.createOpenAI(options)
  : (await import("@ai-sdk/openai-compatible")).createOpenAICompatible(options);
const model = provider("nano");
const common = { model, maxOutputTokens: 60, maxRetries: 0 };
const Wall = z.object({ colour: z.enum(["red", "blue"]) });

await run({
  async turns() {
    const messages = [{ role: "user", content: QUESTION }];
    for (let turn = 0; turn < 3; turn++) {
      const reply = await generateText({ ...common, system: "", messages });
      messages.push(...reply.response.messages, { role: "user", content: "And yours?" });
    }
  },
  async streaming() {
    const { textStream } = streamText({ ...common, prompt: QUESTION });
    let text = "";
    for await (const piece of textStream) text += piece;
    assert(text, "no text");
  },
  async tools() {
    let calls = 0;
    const paint = tool({ description: "Paints", inputSchema: Wall, execute: async () => { calls++; return ""; } });
    const steps = await generateText({
      ...common, prompt: "Paint it red.", tools: { paint }, stopWhen: stepCountIs(2),
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "auto" }),
    });
    assert(calls >= 1 && steps.steps.length >= 2, `called ${calls} times`);
  },
  async structured() {
    const reply = await generateText({ ...common, prompt: QUESTION, output: Output.object({ schema: Wall }) });
    assert(reply.output.colour, "no object");
  },
});
