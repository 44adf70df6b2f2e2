import asyncio
import sys

scene, prompt = sys.argv[1:]


async def streamed() -> str:
    async with agent.run_stream(prompt) as run:
        return await run.get_output()


if scene == "tools":

    @agent.tool_plain
    def weather(city: str = "here") -> str:
        """Tell the weather of a city."""
        return "sunny"


print(asyncio.run(streamed()) if scene == "stream" else agent.run_sync(prompt).output)
