import sys

from pydantic import BaseModel

scene, prompt = sys.argv[1:]


class City(BaseModel, extra="allow"):
    name: str = ""


ask = {"model": "claude-haiku-4-5", "max_tokens": 16_000, "messages": [{"role": "user", "content": prompt}]}
print(client.messages.create(**ask, response_model=City).model_dump_json())
