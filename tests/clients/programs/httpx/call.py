import json
import os
import sys

import httpx

scene, prompt = sys.argv[1:]
ask = {"model": "claude-haiku-4-5", "max_tokens": 16_000, "messages": [{"role": "user", "content": prompt}], "stream": scene == "stream"}
url, headers = f"{os.environ['GATEWAY_URL']}/v1/messages", {"x-api-key": os.environ["GATEWAY_TOKEN"], "anthropic-version": "2023-06-01"}
with httpx.Client(timeout=60) as client, client.stream("POST", url, json=ask, headers=headers) as answer:
    if answer.status_code != 200:
        sys.exit(answer.read().decode())
    if scene == "stream":
        lines = answer.read().split(b"\n")  # `iter_lines` breaks at separators within a text, too
        events = [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: ")]
        print("".join(event["delta"].get("text", "") for event in events if event["type"] == "content_block_delta"))
    else:
        print(json.loads(answer.read())["content"][0]["text"])
