"""Check an upload, and read the API's object of a file from an answer. Pure."""

import json
import re
from typing import NamedTuple

from gateway_addon.messages import json_object
from gateway_addon.messages.request import Request
from gateway_addon.refusals import Refusal, stated

_ID = re.compile(r"file_[A-Za-z0-9]{1,128}\Z")


class FileObject(NamedTuple):
    """The API's own object of a file."""

    id: str
    content: str


def upload_problem(request: Request) -> Refusal | None:
    """Return why an upload is not sent, else None. The parts are not read: a file spends nothing, and names no object of another app."""
    types = request.header("content-type")
    if len(types) != 1 or not types[0].casefold().startswith("multipart/form-data;"):
        return stated("body", "a file is uploaded as multipart/form-data; let an SDK or an HTTP client library build the request")
    if request.header("content-encoding"):
        return stated("body", "the upload is encoded; send it without content-encoding")
    return None


def file_of(body: bytes) -> FileObject | None:
    """Return the file that an answer shows; None where it shows none."""
    shown = json_object(body)
    if shown is None or not _ID.match(str(shown.get("id"))):
        return None
    return FileObject(str(shown["id"]), json.dumps(shown))
