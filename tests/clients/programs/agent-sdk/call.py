import asyncio
import sys
from dataclasses import replace

from claude_agent_sdk import ResultMessage, query

scene, prompt = sys.argv[1:]


async def asked() -> None:
    async for message in query(prompt=prompt, options=replace(options, model="claude-haiku-4-5")):
        if isinstance(message, ResultMessage):
            print(message.result)


asyncio.run(asked())
