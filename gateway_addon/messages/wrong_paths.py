"""Refuse a path that is not served with a sentence that names the right base URL.

Promises a sentence with the right base URL wherever a served path is the end of the one that came: most clients append `/v1/messages`
to their base URL, a few append `/messages` alone, so a base URL that was right for one is wrong for the other. Pure; decides nothing:
the request is refused in any case.
"""

from gateway_addon.messages import request
from gateway_addon.refusals import Refusal, stated

SEGMENTS_MAX = 16
"""More than any path that is served has, with as many too many."""

_OPENAI = ("/chat/completions", "/completions", "/responses", "/embeddings")


def refusal(method: str, target: str, address: str) -> Refusal | None:
    """Return the refusal of a request that is served at another path, None where nothing like it is served.

    `address`: where the client reaches this gateway, as `http://HOST:PORT`; "" where a proxy stands in front and nobody can tell.
    """
    path = target.partition("?")[0]
    shown = f"{method[:20]} {path[:100]}".encode("ascii", "backslashreplace").decode()
    if path.rstrip("/").endswith(_OPENAI):
        return stated(
            "endpoint",
            f"{shown} is not served here; this gateway speaks the Messages API of Claude (POST /v1/messages), not the API of OpenAI: "
            "use a client that speaks it, such as Anthropic's SDK or LiteLLM with anthropic/MODEL",
        )
    found = _served(method, path)
    if found is None:
        return None
    served, appended = found
    if path.startswith("/l/"):
        return stated(
            "endpoint",
            f"{shown} is not served here, since its labels cannot be read: write them once, as /l/client=acme,branch=main{served}, and "
            "characters other than letters, digits and ._~@:+- like %2F",
        )
    base = f"{address}/v1" if address else "the gateway's address followed by /v1"
    if appended == served:
        base = f"{address or "the gateway's address"} ({base} for a client that appends only {served.removeprefix('/v1')})"
    return stated("endpoint", f"{shown} is not served here, {method} {served} is; set the client's base URL to {base}")


def _served(method: str, path: str) -> tuple[str, str] | None:
    """Return the served path with which this one ends, and the part of it that came; None where there is none."""
    segments = [segment for segment in path.split("/") if segment]
    for first in range(min(len(segments), SEGMENTS_MAX)):
        tail = "/" + "/".join(segments[first : first + SEGMENTS_MAX])
        for served in (tail, f"/v1{tail}"):
            if served.startswith("/v1/") and isinstance(request.endpoint_of(method, served), str):
                return served, tail
    return None
