import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [scene, prompt] = process.argv.slice(2);
const model = anthropic("claude-haiku-4-5");

if (scene === "stream") {
  let text = "";
  for await (const part of streamText({ model, prompt, onError: ({ error }) => { throw error; } }).textStream) text += part;
  console.log(text);
} else if (scene === "tools") {
  const inputSchema = z.object({ city: z.string().optional() });
  const weather = tool({ description: "Tells the weather.", inputSchema, execute: () => "sunny" });
  console.log((await generateText({ model, prompt, tools: { weather }, stopWhen: stepCountIs(3) })).text);
} else {
  console.log((await generateText({ model, prompt })).text);
}
