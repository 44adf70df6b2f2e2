"""The content view `Claude` of mitmweb: requests and answers of the Messages API as `pretty` reads them.

Promises to look at nothing but what mitmweb has stored of a flow. Knows no policy; what an answer cost it is told.
"""

from collections.abc import Callable
from functools import partial

from mitmproxy import contentviews, http

from gateway_addon.messages import Usage
from gateway_addon.proxy.web import pretty

READABLE = ("application/json", "text/event-stream")


class ClaudeContentview(contentviews.Contentview):
    """`priced` says in a few words what a flow's answer cost."""

    def __init__(self, priced: Callable[[http.HTTPFlow | None, Usage], str]) -> None:
        self._priced = priced

    def prettify(self, data: bytes, metadata: contentviews.Metadata) -> str:
        message, flow = metadata.http_message, metadata.flow
        known = flow if isinstance(flow, http.HTTPFlow) else None
        if isinstance(message, http.Request):
            text = pretty.request(data)
        else:
            text = pretty.answer(data, metadata.content_type or "", partial(self._priced, known))
        return text.replace("\n\n", "\n \n")  # mitmweb shows nothing at all for an empty line

    def render_priority(self, data: bytes, metadata: contentviews.Metadata) -> float:
        """Rank this view ahead of the one for JSON where the path is the Messages API's."""
        flow = metadata.flow
        ours = isinstance(flow, http.HTTPFlow) and flow.request.path.startswith("/v1/messages")
        return 3 if ours and data and (metadata.content_type or "").lower().startswith(READABLE) else -1
