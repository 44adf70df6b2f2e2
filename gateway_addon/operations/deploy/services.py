"""Texts that run the gateway as a service: a systemd unit and a Containerfile, unprivileged and with a read-only root. Pure.

What each line is for: https://www.freedesktop.org/software/systemd/man/systemd.exec.html
"""

import shlex

UNIT = """\
# The gateway as a service. Once:
#   useradd --system --home-dir /var/lib/gateway gateway
#   install -d /etc/gateway && cp -r policies /etc/gateway/
#   install -m 600 /dev/stdin /etc/gateway/key          # paste the real API key, then Ctrl-D
#   in /etc/gateway/policies/gateway.yaml, where systemd shows the key to the service alone:
#     key: {{file: /run/credentials/gateway.service/key}}
#   {python} -m gateway_addon init --systemd > /etc/systemd/system/gateway.service
#   systemctl daemon-reload && systemctl enable --now gateway
# Commands on its ledger run as its user:
#   sudo -u gateway env GATEWAY_LEDGER=sqlite:////var/lib/gateway/gateway.db GATEWAY_POLICIES=/etc/gateway/policies \\
#     {python} -m gateway_addon token issue APP
[Unit]
Description=Gateway in front of the Claude API
Wants=network-online.target
After=network-online.target

[Service]
User=gateway
Group=gateway
WorkingDirectory={root}
Environment=GATEWAY_POLICIES=/etc/gateway/policies
Environment=GATEWAY_LEDGER=sqlite:////var/lib/gateway/gateway.db
Environment=GATEWAY_LISTEN=127.0.0.1:8080
LoadCredential=key:/etc/gateway/key
StateDirectory=gateway
StateDirectoryMode=0700
ExecStartPre={python} -m gateway_addon init --yes
ExecStart={python} -O -u -m gateway_addon serve --log json
Restart=on-failure
RestartSec=2
# A stop lets calls in flight end: `timeouts.drain` in gateway.yaml (60 s unless set), and some more.
KillMode=mixed
TimeoutStopSec=90

# Nothing of the machine can be written but the ledger's folder, and little of it can be seen.
ProtectSystem=strict
ProtectHome={home}
PrivateTmp=yes
PrivateDevices=yes
PrivateUsers=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProcSubset=pid
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RemoveIPC=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
UMask=0077

[Install]
WantedBy=multi-user.target
"""

CONTAINERFILE = """\
# The gateway as a container. In the project's folder:
#   gateway init --container > Containerfile && podman build -t gateway .
#   podman run --rm --read-only --tmpfs /tmp --cap-drop all --security-opt no-new-privileges \\
#     -p 127.0.0.1:8080:8080 -v ./policies:/etc/gateway/policies:ro -v gateway:/var/lib/gateway -e ANTHROPIC_API_KEY gateway
# Commands on its ledger: podman exec NAME python -m gateway_addon token issue APP
# (--insecure-listen, because the container's own network ends at the published port: publish it on 127.0.0.1, or give it `tls:`.)
FROM docker.io/library/python:3.13-slim
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/gateway gateway
WORKDIR /opt/gateway
COPY requirements.lock ./
RUN pip install --no-cache-dir --require-hashes -r requirements.lock
# What else it needs, such as the driver of a ledger on PostgreSQL: --build-arg PACKAGES='psycopg[binary] psycopg-pool'
ARG PACKAGES=""
RUN test -z "$PACKAGES" || pip install --no-cache-dir $PACKAGES
COPY gateway_addon ./gateway_addon
# Nothing can be written in there later: without its bytecode, of both kinds, each start would compile everything anew.
RUN python -m compileall -q -j 0 -o 0 -o 1 gateway_addon "$(python -c 'import os; print(os.path.dirname(os.__file__))')" \\
    || echo "not all could be compiled: the gateway runs, and takes longer to start"
ENV PYTHONPATH=/opt/gateway PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \\
    GATEWAY_POLICIES=/etc/gateway/policies GATEWAY_LEDGER=sqlite:////var/lib/gateway/gateway.db GATEWAY_LISTEN=0.0.0.0:8080
USER 10001
VOLUME /var/lib/gateway
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/gateway/healthz', timeout=2)"]
CMD ["sh", "-c", "python -m gateway_addon init --yes && exec python -O -m gateway_addon serve --insecure-listen --log json"]
"""


def systemd(root: str, python: str) -> str:
    """A unit that runs the project in the folder `root` by the interpreter `python`, both absolute paths."""
    root, python = (path.replace("%", "%%") for path in (root, python))  # a % begins a specifier
    at_home = any(path.startswith(("/home/", "/root/")) for path in (root, python))
    return UNIT.format(root=root, python=shlex.quote(python), home="read-only" if at_home else "yes")
