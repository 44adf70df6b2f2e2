import sys

scene, prompt = sys.argv[1:]
print(dspy.settings.lm(prompt)[0])
