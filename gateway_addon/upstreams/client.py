"""Ask the Claude API what no app asks about: the gateway's own questions, with the real key or the admin key.

Promises that the key goes to the policy's upstream alone (a redirect is an answer like any other) and is in no error.
"""

from contextlib import AbstractContextManager

from gateway_addon import http_client
from gateway_addon.http_client import STRAIGHT, Answer, Credential, Egress

HEADERS = {"anthropic-version": "2023-06-01", "accept-encoding": "identity", "user-agent": "gateway-addon"}
TIMEOUT_S = 15.0


def ask(
    upstream: str, target: str, key: str, way: Egress = STRAIGHT, *, timeout_s: float = TIMEOUT_S
) -> AbstractContextManager[Answer]:
    """Ask for a path of the upstream (GET), in a thread. Entering it, and reading, raises Unanswered."""
    credential = Credential(upstream, "x-api-key", key)
    return http_client.ask(upstream + target, "the Claude API", timeout_s=timeout_s, way=way, headers=HEADERS, credential=credential)
