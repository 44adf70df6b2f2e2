"""Show which key or token is meant without showing it. Pure."""

import hashlib
import re

API_KEY = re.compile(r"(?<![A-Za-z0-9])(sk-ant-(?:[a-z]+[0-9]{2}-)?)([A-Za-z0-9_-]{16,})")
GATEWAY_TOKEN = re.compile(r"(?<![A-Za-z0-9_])(gwt_)[0-9A-Za-z]{16,64}")


def fingerprint(secret: str) -> str:
    """Return what may be shown of a key or token: its public prefix and the first 12 hex digits of its SHA-256."""
    match = API_KEY.match(secret) or GATEWAY_TOKEN.match(secret)
    return f"{match[1] if match else ''}…{hashlib.sha256(secret.encode()).hexdigest()[:12]}"
