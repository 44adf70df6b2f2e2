"""`gateway explain`: what would happen to a request, or to an identity token, rule by rule, before anything is sent."""

import ipaddress
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from gateway_addon.cli.common import FINE, PROBLEM, json_option, ledger_option, policies_option, says_errors, stop
from gateway_addon.identity.trust import Issuer
from gateway_addon.ledger import reservations
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.messages.request import Request
from gateway_addon.names import PROGRAM
from gateway_addon.operations import explain as explanation
from gateway_addon.operations import explain_identity, issuer_keys
from gateway_addon.operations.changes import unknown
from gateway_addon.policy import GatewayPolicy, PolicyError, load
from gateway_addon.upstreams.egress import egress

if TYPE_CHECKING:
    from gateway_addon.identity.key_set import KeySet


@click.command(epilog=f"Example: {PROGRAM} explain request.json --app reviews")
@click.argument("request_file", metavar="[REQUEST.json]", type=click.File("rb"), required=False)
@click.option("--app", "app_name", help="Whose policy judges the request.")
@click.option("--identity", metavar="FILE", type=click.File("r"), help="Explain the identity token in FILE instead (-: stdin).")
@click.option("--beta", "betas", multiple=True, help="A value of anthropic-beta sent with it.")
@click.option("--header", "more", metavar="'NAME: VALUE'", multiple=True, help="A header sent with it: a session, an agent, a label.")
@click.option("--token", "token_id", type=int, metavar="NUMBER", help=f"Judge it as sent with this token ({PROGRAM} token list).")
@click.option("--from", "address", metavar="ADDRESS", help="Judge it as sent from this IP address.")
@json_option
@policies_option
@ledger_option
@says_errors(PolicyError, ValueError)
def explain(
    request_file: Any, app_name: str | None, identity: Any, betas: tuple[str, ...], more: tuple[str, ...], token_id: int | None,
    address: str | None, as_json: bool, policies: Path, ledger: str,
) -> None:  # fmt: skip
    """Say what would happen to the body in REQUEST.json (`-`: standard input), sent to /v1/messages by an app: every rule's
    verdict, what the call is quoted at, and which caps it fits.

    Exits 1 where the gateway would refuse the request at this moment, and says so with its code and sentence. Without --token a token
    in force is assumed, and without --from an address from which the app may call. What a rule that is only observed would refuse is
    said, and passes.

    With --identity: whose workload an identity token is, and of every rule why it matches or does not. The issuer is asked for its keys.
    """
    policy = load(policies)
    if identity is not None:
        _explain_identity(identity, request_file or app_name, policy, ledger, as_json=as_json)
    if request_file is None or app_name is None:
        stop("Name a request and an app (REQUEST.json --app APP), or an identity token (--identity FILE).")
    if app_name not in policy.apps:
        stop(unknown(app_name, "app", policy.apps))
    if address is not None:
        ipaddress.ip_address(address)  # raises ValueError with a sentence
    named = tuple((name.strip().lower(), value.strip()) for name, _, value in (header.partition(":") for header in more))
    headers = (*(("anthropic-beta", beta) for beta in betas), *named)
    request = Request("POST", "/v1/messages", headers, request_file.read())
    find_token = None if token_id is None else partial(reservations.token, token_id=token_id, app=app_name)
    found = explanation.explain(
        policy, policy.apps[app_name], request, sqlite_files.ledger_path(ledger), time.time(), find_token, address
    )  # fmt: skip
    click.echo(json.dumps(found, indent=2) if as_json else explanation.written(found))
    sys.exit(PROBLEM if found["refused"] else FINE)


def _explain_identity(identity: Any, beside: object, policy: GatewayPolicy, ledger: str, *, as_json: bool) -> NoReturn:
    if beside:
        stop("An identity token is explained alone: leave the request and --app out.")
    if policy.trust is None:
        stop(f"gateway.yaml names no issuers, so no identity token is let in ({PROGRAM} docs workloads).", PROBLEM)
    now = time.time()

    def keys_of(issuer: Issuer) -> "KeySet":
        return issuer_keys.fetched(issuer, None, partial(egress, policy, os.environ)).keys

    token = identity.read(issuer_keys.BODY_BYTES_MAX).strip()
    found = explain_identity.explain(token, policy.trust, keys_of, sqlite_files.ledger_path(ledger), now)
    click.echo(json.dumps(found, indent=2) if as_json else explain_identity.written(found))
    sys.exit(PROBLEM if found["refused"] else FINE)
