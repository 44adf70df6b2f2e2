import sys

from anthropic import beta_tool
from pydantic import BaseModel

scene, prompt = sys.argv[1:]
ask = {"model": "claude-haiku-4-5", "max_tokens": 16_000, "messages": [{"role": "user", "content": prompt}]}


class City(BaseModel, extra="allow"):
    name: str = ""


@beta_tool
def weather(city: str = "here") -> str:
    """Tell the weather of a city."""
    return "sunny"


match scene:
    case "stream":
        with client.messages.stream(**ask) as stream:
            print(stream.get_final_text())
    case "tools":
        *_, last = client.beta.messages.tool_runner(**ask, tools=[weather])
        print(last.content[-1].text)
    case "structured":
        config = {"format": {"type": "json_schema", "schema": City.model_json_schema()}}
        print(client.messages.create(**ask, output_config=config).content[0].text)
    case "batch":
        batch = client.messages.batches.create(requests=[{"custom_id": "one", "params": ask}])
        while client.messages.batches.retrieve(batch.id).processing_status != "ended":
            pass
        [result] = client.messages.batches.results(batch.id)
        print(result.result.message.content[0].text)
    case _:
        print(client.messages.create(**ask).content[0].text)
