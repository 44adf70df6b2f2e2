"""`gateway schema`: the JSON Schema of policy files, from the same table that validates them."""

import json

import click

from gateway_addon.names import PROGRAM
from gateway_addon.policy.keys import APP, GATEWAY
from gateway_addon.policy.kinds import record

_FILES = {"app": ("policies/apps/*.yaml", APP), "gateway": ("policies/gateway.yaml", GATEWAY)}


@click.command(epilog=f"Example: {PROGRAM} schema app > policies/app.schema.json")
@click.argument("file", type=click.Choice(list(_FILES)), default="app")
def schema(file: str) -> None:
    """Print the JSON Schema of an app's policy file, or of gateway.yaml.

    An editor completes and checks with it, where the first line of a policy file is
    `# yaml-language-server: $schema=../app.schema.json`.
    """
    title, keys = _FILES[file]
    described = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **record(dict, keys).schema}
    click.echo(json.dumps(described, indent=2))
