"""Files of the simulated API: uploaded as a form, kept in memory, told apart by id. Every holder of the key sees all of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

from .errors import ApiError
from .http import Request
from .paging import limit_of


@dataclass(frozen=True, slots=True)
class File:
    id: str
    filename: str
    mime_type: str
    content: bytes
    created_at: float

    @property
    def object(self) -> dict[str, Any]:
        """Return the file as the API shows it."""
        return {
            "id": self.id,
            "type": "file",
            "filename": self.filename,
            "mime_type": self.mime_type,
            "size_bytes": len(self.content),
            "created_at": datetime.fromtimestamp(self.created_at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "downloadable": True,
            "expires_at": None,
        }


@dataclass(slots=True)
class Files:
    """All files of the workspace, no matter which app uploaded them."""

    clock: Callable[[], float]
    kept: dict[str, File] = field(default_factory=dict)

    def upload(self, id: str, request: Request) -> dict[str, Any]:
        """Keep the form's file. Raises ApiError."""
        head = b"content-type: " + (request.header("content-type") or "").encode("latin-1") + b"\r\n\r\n"
        form = BytesParser(policy=HTTP).parsebytes(head + request.body)
        for part in form.iter_parts() if form.is_multipart() else ():
            if part.get_param("name", header="content-disposition") == "file":
                content = part.get_payload(decode=True)
                assert isinstance(content, bytes)
                self.kept[id] = File(id, part.get_filename() or "unnamed", part.get_content_type(), content, self.clock())
                return self.kept[id].object
        raise ApiError("invalid_request_error", "file: Field required")

    def find(self, id: str) -> File:
        """Return a file. Raises ApiError."""
        if id not in self.kept:
            raise ApiError("not_found_error", f"File {id} not found")
        return self.kept[id]

    def delete(self, id: str) -> dict[str, Any]:
        """Delete a file. Raises ApiError."""
        del self.kept[self.find(id).id]
        return {"id": id, "type": "file_deleted"}

    def page(self, query: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """Return a page of all files, the newest first. Raises ApiError."""
        ids, limit = list(reversed(self.kept)), limit_of(query)
        first = int(query["page"][-1].removeprefix("page_")) if "page" in query else 0
        chosen = ids[first : first + limit]
        return {
            "data": [self.kept[id].object for id in chosen],
            "next_page": f"page_{first + limit}" if first + limit < len(ids) else None,
        }
