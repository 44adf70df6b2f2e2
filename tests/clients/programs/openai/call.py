import os
import sys

from openai import OpenAI

scene, prompt = sys.argv[1:]
client = OpenAI(base_url=f"{os.environ['GATEWAY_URL']}/v1", api_key=os.environ["GATEWAY_TOKEN"])
print(client.chat.completions.create(model="claude-haiku-4-5", messages=[{"role": "user", "content": prompt}]))
