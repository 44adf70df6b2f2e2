"""Run one worker of `gateway serve`, by the settings that its supervisor put into its environment (proxy/supervisor.py)."""

import os

from gateway_addon.cli.serve import serve_here
from gateway_addon.proxy.settings import WORKER, Settings
from gateway_addon.proxy.supervisor import inherited
from gateway_addon.upstreams.credentials import conceal


def main() -> None:
    conceal()
    settings = Settings.read(os.environ.pop(WORKER))
    with inherited(settings) as listener:
        serve_here(settings, listener)


if __name__ == "__main__":
    main()
