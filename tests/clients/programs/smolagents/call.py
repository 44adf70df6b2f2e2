import sys

scene, prompt = sys.argv[1:]
print(model.generate([{"role": "user", "content": [{"type": "text", "text": prompt}]}]).content)
