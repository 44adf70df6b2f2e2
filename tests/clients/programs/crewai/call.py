import sys

scene, prompt = sys.argv[1:]
print(llm.call(prompt))
