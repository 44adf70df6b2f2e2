"""The API's error envelope, and which status belongs to which type (platform documentation, "Errors")."""

import json

STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
TYPES = {status: kind for kind, status in STATUS.items()}
MESSAGES = {429: "This request would exceed your organization's rate limit", 500: "Internal server error", 529: "Overloaded"}


class ApiError(Exception):
    """An answer that is an error. `code` is the machine's word for it, in `error.details`."""

    def __init__(self, kind: str, message: str, *, code: str | None = None, status: int | None = None, retry_after_s: int | None = None):
        super().__init__(message)
        self.kind, self.message, self.code = kind, message, code
        self.status = status or STATUS.get(kind, 500)
        self.retry_after_s = retry_after_s

    @classmethod
    def of_status(cls, status: int, retry_after_s: int | None, kind: str | None = None) -> "ApiError":
        """Return the error that the API sends with `status`."""
        kind = kind or TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return cls(kind, MESSAGES.get(status, f"The simulated API was asked for {status}"), status=status, retry_after_s=retry_after_s)

    @property
    def headers(self) -> list[tuple[str, str]]:
        """Return the header that most of the recorded refusals carry: advice on sending the request again."""
        retry = [("x-should-retry", "true" if self.status in (409, 429) or self.status >= 500 else "false")]
        return [*retry, ("retry-after", str(self.retry_after_s))] if self.retry_after_s is not None else retry

    def body(self, request_id: str) -> bytes:
        error: dict[str, object] = {"type": self.kind, "message": self.message}
        if self.code is not None:
            error["details"] = {"error_code": self.code}
        return json.dumps({"type": "error", "error": error, "request_id": request_id}).encode()
