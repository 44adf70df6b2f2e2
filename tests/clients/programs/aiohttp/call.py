import asyncio
import json
import os
import sys

import aiohttp

scene, prompt = sys.argv[1:]
ask = {"model": "claude-haiku-4-5", "max_tokens": 16_000, "messages": [{"role": "user", "content": prompt}], "stream": scene == "stream"}
url, headers = f"{os.environ['GATEWAY_URL']}/v1/messages", {"x-api-key": os.environ["GATEWAY_TOKEN"], "anthropic-version": "2023-06-01"}


async def asked() -> None:
    async with aiohttp.ClientSession() as session, session.post(url, json=ask, headers=headers) as answer:
        if answer.status != 200:
            sys.exit(await answer.text())
        if scene != "stream":
            return print((await answer.json())["content"][0]["text"])
        events = [json.loads(line.removeprefix(b"data: ")) async for line in answer.content if line.startswith(b"data: ")]
        print("".join(event["delta"].get("text", "") for event in events if event["type"] == "content_block_delta"))


asyncio.run(asked())
