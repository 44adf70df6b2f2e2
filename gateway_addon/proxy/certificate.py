"""Serve the policy's certificate (`tls:`) to apps on other machines; read it again when its files change.

mitmproxy would generate a certificate of its own; the policy's is set for each connection instead. This module reads files.
"""

import os

from OpenSSL import SSL

from gateway_addon.policy import Tls


class TlsUnavailable(Exception):
    """The certificate cannot be used. The message is a sentence for the operator."""


class Certificate:
    """Make server-side TLS contexts from the PEM files of a policy, one for each state of the files."""

    def __init__(self) -> None:
        self._version: tuple[object, ...] | None = None
        self._context: SSL.Context | None = None

    def context(self, tls: Tls) -> SSL.Context:
        """Return the context for the files as they are now. Raises TlsUnavailable."""
        try:
            version = (tls, os.stat(tls.cert).st_mtime_ns, os.stat(tls.key).st_mtime_ns)
            if self._context is None or version != self._version:
                context = SSL.Context(SSL.TLS_SERVER_METHOD)
                context.set_min_proto_version(SSL.TLS1_2_VERSION)
                context.use_certificate_chain_file(tls.cert)
                context.use_privatekey_file(tls.key)
                context.check_privatekey()
                self._context, self._version = context, version
        except OSError as error:
            problem = f"The certificate {tls.cert} or its key {tls.key} cannot be read ({error.strerror}); see tls: in the policy."
            raise TlsUnavailable(problem) from None
        except SSL.Error:
            problem = f"{tls.cert} and {tls.key} are not a certificate chain and its private key in PEM; see tls: in the policy."
            raise TlsUnavailable(problem) from None
        return self._context
