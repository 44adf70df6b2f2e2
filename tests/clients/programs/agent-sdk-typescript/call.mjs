import { query } from "@anthropic-ai/claude-agent-sdk";

const [, prompt] = process.argv.slice(2);
const env = { ...process.env, ANTHROPIC_BASE_URL: process.env.GATEWAY_URL, ANTHROPIC_AUTH_TOKEN: process.env.GATEWAY_TOKEN };
for await (const message of query({ prompt, options: { model: "claude-haiku-4-5", env } })) {
  if (message.type === "result") console.log(message.result ?? message.errors);
}
