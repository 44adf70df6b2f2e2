"""Ask the Claude API for the gateway itself, in a thread: these are no app's calls.

Does I/O: it asks over the network, with the real key, the policy's upstream alone (a redirect is an answer like any other, and not
followed). Promises that a body which broke off is never taken for a whole one, and that the key is in no error.
"""

import http.client
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from gateway_addon.upstreams.egress import STRAIGHT, Egress, connect

TIMEOUT_S = 15


class UpstreamSilent(Exception):
    """The API cannot be asked. The message is a sentence for the log."""


class ApiAnswer:
    """An answer whose status is known; the body is read piece by piece."""

    def __init__(self, response: http.client.HTTPResponse):
        self.status = response.status
        self.encoding = response.getheader("content-encoding")
        self._response = response

    def read(self, size: int) -> bytes:
        """Return the next bytes; none at the end of a whole body. Raises UpstreamSilent where it broke off, or may have."""
        try:
            piece = self._response.read(size)
        except (OSError, http.client.HTTPException) as error:
            raise UpstreamSilent(f"the answer broke off ({type(error).__name__})") from None
        if not piece and not self._response.chunked and self._response.length != 0:
            raise UpstreamSilent("the answer broke off before its announced length")
        return piece


@contextmanager
def ask(upstream: str, path: str, key: Callable[[], str], way: Egress = STRAIGHT) -> Iterator[ApiAnswer]:
    """GET a path of the upstream. Raises UpstreamSilent."""
    headers = {"x-api-key": key(), "anthropic-version": "2023-06-01", "accept-encoding": "identity", "user-agent": "gateway-addon"}
    with closing(connect(upstream, way, TIMEOUT_S)) as connection:
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise UpstreamSilent(f"the Claude API cannot be reached ({type(error).__name__})") from None
        yield ApiAnswer(response)
