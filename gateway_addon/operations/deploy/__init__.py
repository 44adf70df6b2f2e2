"""Return the texts that run the gateway as a service: data files beside this module, so that their own tools can read them.

nginx's directives: https://nginx.org/en/docs/http/ngx_http_proxy_module.html; the unit's lines:
https://www.freedesktop.org/software/systemd/man/systemd.exec.html; the compose file's keys:
https://github.com/compose-spec/compose-spec/blob/main/spec.md.
"""

import shlex
from importlib.resources import files


def text(name: str) -> str:
    """Return a file of this package as it is: `nginx.conf`, `alerts.yaml`."""
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def unit(project: str, python: str) -> str:
    """Return a systemd unit that runs the project in a folder by an interpreter; both are absolute paths."""
    project, python = (path.replace("%", "%%") for path in (project, python))  # a % begins a specifier
    at_home = any(path.startswith(("/home/", "/root/")) for path in (project, python))
    values = {"@PROJECT@": project, "@PYTHON@": shlex.quote(python), "@HOME_ACCESS@": "read-only" if at_home else "yes"}
    filled = text("gateway.service")
    for mark, value in values.items():
        filled = filled.replace(mark, value)
    return filled
