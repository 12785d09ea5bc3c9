// The Vercel AI SDK with @ai-sdk/openai-compatible: streams, objects, tools. Run in a folder that has node_modules.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import path from "node:path";

const folder = path.resolve(process.argv[2]);
const load = async (name) => import(pathToFileURL(createRequire(path.join(folder, "x.js")).resolve(name)));
const { generateText, streamText, generateObject, tool, stepCountIs } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { z } = await load("zod");

const provider = createOpenAICompatible({
  name: "nanobraid",
  baseURL: `${process.env.NANOBRAID_URL}/v1`,
  apiKey: "unused",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider("smollm2-135m");
const common = { model, temperature: 0, maxRetries: 0 };
const prompt = "Name the capital of France.";

const checks = {
  async stream() {
    const whole = await generateText({ ...common, prompt, maxOutputTokens: 20 });
    assert.match(whole.text, /Paris/);
    const result = streamText({ ...common, prompt, maxOutputTokens: 20 });
    const parts = [];
    for await (const part of result.fullStream) parts.push(part);
    const deltas = parts.filter((part) => part.type === "text-delta");
    assert.equal(deltas.map((part) => part.text).join(""), whole.text);
    assert.ok(deltas.length > 3);
    assert.equal((await result.usage).outputTokens, whole.usage.outputTokens);
    assert.ok(whole.usage.outputTokens > 0);
  },
  async object() {
    const schema = z.object({ name: z.string().max(20), country: z.enum(["France", "Italy"]) });
    const { object } = await generateObject({ ...common, prompt, schema, maxOutputTokens: 100 });
    assert.deepEqual(Object.keys(object).sort(), ["country", "name"]);
  },
  async tools() {
    const seen = [];
    const weather = tool({
      description: "The weather in a city.",
      inputSchema: z.object({ city: z.string().max(20), unit: z.enum(["celsius", "fahrenheit"]) }),
      execute: async (input) => (seen.push(input), "21 degrees"),
    });
    const options = { ...common, prompt: "What is the weather in Paris?", tools: { weather }, maxOutputTokens: 150 };
    options.providerOptions = { nanobraid: { parallel_tool_calls: false } }; // a small model does not know when to stop
    const result = await generateText({ ...options, toolChoice: "required", stopWhen: stepCountIs(1) });
    assert.equal(result.toolCalls[0].toolName, "weather");
    assert.equal(result.finishReason, "tool-calls");
    assert.ok(seen.length >= 1 && ["celsius", "fahrenheit"].includes(seen[0].unit));
    const streamed = streamText({ ...options, toolChoice: "required", stopWhen: stepCountIs(1) });
    const calls = [];
    for await (const part of streamed.fullStream) if (part.type === "tool-call") calls.push(part);
    assert.equal(calls[0].toolName, "weather");
    // The result goes back in a second step, in which the model may answer or call again.
    const twoSteps = await generateText({
      ...options,
      stopWhen: stepCountIs(2),
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
    });
    assert.equal(twoSteps.steps.length, 2);
    assert.ok(twoSteps.text.length > 0);
  },
  async errors() {
    await assert.rejects(
      generateText({ ...common, model: provider("no-such-model"), prompt }),
      (error) => error.statusCode === 404 && /no-such-model/.test(error.message),
    );
  },
};

const failed = [];
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
  } catch (error) {
    failed.push(name);
    console.error(`--- ${name}`, error);
  }
}
const version = (name) => JSON.parse(readFileSync(path.join(folder, "node_modules", name, "package.json"))).version;
const result = failed.length ? `FAILED: ${failed.join(", ")}` : `${Object.keys(checks).length} checks passed`;
console.log(`ai ${version("ai")}, @ai-sdk/openai-compatible ${version("@ai-sdk/openai-compatible")}: ${result}`);
process.exit(failed.length ? 1 : 0);
