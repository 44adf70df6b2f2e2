"""One certificate authority for a whole session, as mitmproxy makes one in each new folder: a key of it takes a while to find."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from mitmproxy.certs import CertStore


@cache
def _made() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="authority-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    CertStore.create_store(folder, "mitmproxy", 2048)
    return folder


def ready_authority(folder: Path) -> Path:
    """Put the session's authority into a folder that is to be mitmproxy's; returns the folder."""
    shutil.copytree(_made(), folder)
    return folder
