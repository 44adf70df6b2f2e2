import sys

from langchain.agents import create_agent

scene, prompt = sys.argv[1:]


def weather(city: str = "here") -> str:
    """Tell the weather of a city."""
    return "sunny"


match scene:
    case "stream":
        print("".join(chunk.text for chunk in model.stream(prompt)))
    case "tools":
        print(create_agent(model, tools=[weather]).invoke({"messages": [("user", prompt)]})["messages"][-1].text)
    case _:
        print(model.invoke(prompt).text)
