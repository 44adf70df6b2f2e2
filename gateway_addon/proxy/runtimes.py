"""Lead programs through a proxy whose runtimes do not read HTTPS_PROXY: Node before 22.21 and 24.5, and Java.

Promises that what the environment says already stays: options are added to those that are there. Knows nothing of the gateway; writes
one file, a trust store for Java.
"""

import os
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, pkcs12
from cryptography.utils import CryptographyDeprecationWarning

PRELOADED = Path(__file__).with_name("node_proxy.cjs")
STORE_FILE = "gateway-truststore.p12"
STORE_PASSWORD = "changeit"  # Java's own, for a file that holds certificates alone
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


def options(inherited: Mapping[str, str], proxy: str, upstream: str, bundle: Path) -> dict[str, str]:
    """Return the variables by which a program of these runtimes calls the https address `upstream` through `proxy`, trusting `bundle`.

    Java takes no credentials for a proxy from there: the proxy has to know its own child.
    """
    at, to, store = urlsplit(proxy), urlsplit(upstream), _trust_store(bundle)
    java = {
        "https.proxyHost": at.hostname, "https.proxyPort": at.port, "http.nonProxyHosts": "", "javax.net.ssl.trustStore": store,
        "javax.net.ssl.trustStoreType": "PKCS12", "javax.net.ssl.trustStorePassword": STORE_PASSWORD,
    }  # fmt: skip
    added = {
        "NODE_OPTIONS": f'--require "{_escaped(PRELOADED)}"',
        "JAVA_TOOL_OPTIONS": " ".join(f'"-D{name}={value}"' for name, value in java.items()),
    }
    kept = {name: f"{inherited.get(name, '')} {words}".strip() for name, words in added.items()}
    return kept | {"GATEWAY_LOCAL_UPSTREAM": f"{to.hostname}:{to.port or 443}"}


def _escaped(path: Path) -> str:
    """Write a path as Node reads one between quotes."""
    return str(path).replace("\\", "\\\\").replace('"', '\\"')


def _trust_store(bundle: Path) -> Path:
    """Write the certificates of a bundle as Java reads them. Returns the file."""
    named = []
    with warnings.catch_warnings(action="ignore", category=CryptographyDeprecationWarning):  # old roots have odd serial numbers
        for at, each in enumerate(_CERTIFICATE.findall(bundle.read_bytes())):
            with suppress(ValueError):  # one that cannot be read is trusted by nobody
                named.append(pkcs12.PKCS12Certificate(x509.load_pem_x509_certificate(each), f"{at}".encode()))
    store = bundle.with_name(STORE_FILE)
    unfinished = store.with_name(f"{STORE_FILE}.{os.getpid()}")
    unfinished.write_bytes(pkcs12.serialize_java_truststore(named, BestAvailableEncryption(STORE_PASSWORD.encode())))
    unfinished.replace(store)
    return store
