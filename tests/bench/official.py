"""The Claude apps gateway (`claude gateway`): its configuration, and what it wants to find before it starts.

An app of ours has an allow-list and caps by day and month; it gets the same, so that it too asks its ledger before each call and books after it.
"""

import base64
import hashlib
import hmac
import http.client
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "support"))

from postgresql import Postgres, binaries

ADMIN = "bench-admin-key-0123456789abcdef-0123456789"
SECRET = "bench-session-secret-0123456789abcdef-0123456789"
CONFIG = """
listen: {{host: 127.0.0.1, port: {port}, public_url: "http://127.0.0.1:{port}"}}
oidc: {{issuer: "{issuer}", client_id: bench, client_secret: bench, allowed_email_domains: [example.com]}}
session: {{jwt_secret: "{secret}"}}
store: {{postgres_url: "{store}"}}
upstreams: [{{provider: anthropic, base_url: "{upstream}", auth: {{api_key: bench-key}}}}]
models: [{{id: claude-sonnet-4-5, upstream_model: {{anthropic: claude-sonnet-4-5}}}}]
managed: {{policies: [{{match: {{}}, cli: {{availableModels: [claude-sonnet-4-5]}}}}]}}
admin: {{write_keys: [{{id: bench, key: "{admin}"}}]}}
"""


def possible() -> bool:
    return binaries() is not None


def variables(folder: Path) -> dict[str, str]:
    """Settings of whoever runs the benchmark are none of its business."""
    return {"HOME": str(folder), "CLAUDE_GATEWAY_ALLOW_LOOPBACK": "1", "DISABLE_AUTOUPDATER": "1"}


@contextmanager
def surroundings(folder: Path, port: int, upstream: str) -> Iterator[int]:
    """Run the file `official.yaml`, an identity provider and a database until the block ends; yield the database server's process."""
    server = Postgres(binaries(), fsync=True)
    try:
        with _provider() as issuer:
            text = CONFIG.format(port=port, issuer=issuer, secret=SECRET, store=server.database(), upstream=upstream, admin=ADMIN)
            (folder / "official.yaml").write_text(text)
            yield server.pid
    finally:
        server.remove()


@contextmanager
def _provider() -> Iterator[str]:
    """Serve an OpenID provider's description: it is read at the start, and nobody signs in (`credential`)."""

    class Provider(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Provider) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        said = {f"{name}_endpoint": f"{url}/{name}" for name in ("authorization", "token")} | {"issuer": url, "jwks_uri": f"{url}/jwks"}
        said |= {"response_types_supported": ["code"], "subject_types_supported": ["public"], "id_token_signing_alg_values_supported": ["RS256"]}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield url
        finally:
            server.shutdown()


def credential(port: int) -> str:
    """The session that signing in by a browser would end in: the gateway knows it by its own secret's signature alone."""
    now, who = int(time.time()), {"sub": "bench", "email": "bench@example.com", "groups": ["bench"]}
    claims = who | {"aud": "claude-gateway", "iss": f"http://127.0.0.1:{port}", "iat": now, "exp": now + 8 * 3600}
    signed = b".".join(_base64(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
    return f"authorization: Bearer {(signed + b'.' + _base64(hmac.digest(SECRET.encode(), signed, hashlib.sha256))).decode()}"


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def cap(port: int) -> None:
    """Give everybody the caps of the gateway's own app; they are not in its file."""
    for period in ("daily", "monthly"):
        limit = {"scope": {"type": "organization"}, "amount": "100000000", "period": period}
        headers = {"x-api-key": ADMIN, "content-type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("POST", "/v1/organizations/spend_limits", json.dumps(limit), headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        connection.close()
