"""Say what is wrong with a request's head that two parsers could read differently. Pure.

Promises a sentence that names the thing and the way out, for what mitmproxy lets through or refuses without a word.
"""

import re
from collections.abc import Sequence

NOT_WELL_FORMED = "The request is not well-formed HTTP/1.1, so it was not judged. Use an HTTP client library to build it."

_UNCLEAN = re.compile("[\r\n\0]")


def problem(version: str, headers: Sequence[tuple[str, str]]) -> str | None:
    """Return why a head is not judged, None where nothing is wrong with it. Names are in lower case; `version` is as in HTTP/1.1."""
    for name, value in headers:
        if _UNCLEAN.search(value):
            shown = name[:80].encode("ascii", "backslashreplace").decode()
            return f"The value of the header {shown} has a line break or a NUL in it. Send it in one line, as plain text."
    if not version.startswith("HTTP/1."):
        return f"The request speaks {version[:20]} in clear, and the gateway HTTP/1.1 there. Use that, or https with ALPN."
    encodings = [value.strip().lower() for name, value in headers if name == "transfer-encoding"]
    if not encodings:
        return None
    if any(name == "content-length" for name, _ in headers):
        return "The request has a Content-Length and a Transfer-Encoding, and two parsers could end it differently. Send one of them."
    if version == "HTTP/1.0":
        return "The request is HTTP/1.0, which knows no Transfer-Encoding. Send a Content-Length, or speak HTTP/1.1."
    if encodings != ["chunked"]:
        shown = ", ".join(encodings)[:80].encode("ascii", "backslashreplace").decode()
        return f"The request's Transfer-Encoding is {shown!r}, and the gateway takes chunked alone. Send the body unencoded."
    return None
