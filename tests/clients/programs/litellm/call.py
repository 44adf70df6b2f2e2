import sys

scene, prompt = sys.argv[1:]
messages = [{"role": "user", "content": prompt}]
if scene == "stream":
    parts = litellm.completion(**gateway, messages=messages, stream=True)
    print("".join(part.choices[0].delta.content or "" for part in parts))
else:
    print(litellm.completion(**gateway, messages=messages).choices[0].message.content)
