"""What mitmproxy's own dependencies deprecate as they are imported is not ours to fix; any other warning is an error."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mitmproxy.tools.web.master  # noqa: F401
