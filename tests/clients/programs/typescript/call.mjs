import { betaTool } from "@anthropic-ai/sdk/helpers/beta/json-schema";

const [scene, prompt] = process.argv.slice(2);
const ask = { model: "claude-haiku-4-5", max_tokens: 16_000, messages: [{ role: "user", content: prompt }] };

if (scene === "stream") {
  console.log(await client.messages.stream(ask).finalText());
} else if (scene === "tools") {
  const inputSchema = { type: "object", properties: { city: { type: "string" } } };
  const weather = betaTool({ name: "weather", description: "Tells the weather.", inputSchema, run: () => "sunny" });
  const last = await client.beta.messages.toolRunner({ ...ask, tools: [weather] });
  console.log(last.content.at(-1).text);
} else if (scene === "structured") {
  const schema = { type: "object", properties: { name: { type: "string" } }, required: ["name"], additionalProperties: false };
  console.log((await client.messages.create({ ...ask, output_config: { format: { type: "json_schema", schema } } })).content[0].text);
} else if (scene === "batch") {
  const { id } = await client.messages.batches.create({ requests: [{ custom_id: "one", params: ask }] });
  while ((await client.messages.batches.retrieve(id)).processing_status !== "ended");
  for await (const { result } of await client.messages.batches.results(id)) console.log(result.message.content[0].text);
} else {
  console.log((await client.messages.create(ask)).content[0].text);
}
