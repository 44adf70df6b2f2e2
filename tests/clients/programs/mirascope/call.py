import os
import sys

from mirascope import llm

scene, prompt = sys.argv[1:]
llm.register_provider("anthropic", api_key=os.environ["GATEWAY_TOKEN"], base_url=os.environ["GATEWAY_URL"])


@llm.tool
def weather(city: str = "here") -> str:
    """Tell the weather of a city."""
    return "sunny"


@llm.call("anthropic/claude-haiku-4-5", tools=[weather] if scene == "tools" else [])
def answer() -> str:
    return prompt


if scene == "stream":
    print("".join(answer.stream().text_stream()))
else:
    response = answer()
    while response.tool_calls:
        response = response.resume(response.execute_tools())
    print(response.text())
