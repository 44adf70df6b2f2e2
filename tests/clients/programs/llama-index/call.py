import sys

scene, prompt = sys.argv[1:]
print("".join(part.delta or "" for part in llm.stream_complete(prompt)) if scene == "stream" else llm.complete(prompt).text)
