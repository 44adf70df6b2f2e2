const [scene, prompt] = process.argv.slice(2);
const stream = scene === "stream";
const answer = await fetch(`${process.env.GATEWAY_URL}/v1/messages`, {
  method: "POST",
  headers: { "content-type": "application/json", "anthropic-version": "2023-06-01", "x-api-key": process.env.GATEWAY_TOKEN },
  body: JSON.stringify({ model: "claude-haiku-4-5", max_tokens: 16_000, stream, messages: [{ role: "user", content: prompt }] }),
});
if (!answer.ok) throw new Error((await answer.json()).error.message);
if (!process.version.startsWith("v24.")) throw new Error(process.version);
let text = "";
if (stream) {
  for (const line of (await answer.text()).split("\n")) {
    if (line.startsWith("data: ")) text += JSON.parse(line.slice(6)).delta?.text ?? "";
  }
} else {
  text = (await answer.json()).content[0].text;
}
console.log(text);
