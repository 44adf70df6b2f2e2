"""`gateway explain --identity` says rule by rule why a token is let in or not, as the gateway would, and shows no token."""

import json

import pytest
from click.testing import CliRunner
from gateway import APP, write_policies
from issuers import AUDIENCE, ISSUER, SUBJECT, claims, jwks, key, token
from ledgers import new_file

from gateway_addon.cli import main

GATEWAY = f"""
audience: {AUDIENCE}
issuers:
  github: {{url: {ISSUER}, keys: {{inline: '{jwks().decode()}'}}}}
  gone: {{url: https://gone.test, keys: {{file: /nowhere/jwks.json}}}}
"""
APPS = {
    "reviews": APP + "workloads:\n  - {issuer: github, claims: {repository_id: 456, ref: refs/heads/main}}\n",
    "nightly": APP + "workloads:\n  - {issuer: github, subject: 'repo:o/r:environment:night'}\n  - {issuer: gone, subject: x}\n",
    "twin": APP + "workloads:\n  - {issuer: github, claims: {repository_id: 456, environment: both}}\n",
}


@pytest.fixture
def explained(tmp_path):
    write_policies(tmp_path / "policies", "http://127.0.0.1:1", APPS, GATEWAY)
    where = ["--policies", str(tmp_path / "policies"), "--ledger", f"sqlite:///{new_file(tmp_path)}"]

    def run(text, *options):
        (tmp_path / "token").write_text(f"{text}\n")
        return CliRunner().invoke(main, ["explain", "--identity", str(tmp_path / "token"), *where, *options])

    return run


CASES = {
    "let in": (lambda: token(claims()), None, ["let in as app reviews"]),
    "without a rule": (lambda: token(claims(ref="refs/heads/x")), "identity_unknown", ["ref is refs/heads/x, not refs/heads/main", f"sub is {SUBJECT}, not repo:o/r:environment:night"]),
    "two apps": (lambda: token(claims(environment="both")), "identity_ambiguous", ["reviews and twin at once"]),
    "expired": (lambda: token(claims(1_700_000_000)), "identity_expired", ["no  times", "s ago"]),
    "forged": (lambda: token(claims(), key("RSA", 2)), "identity_invalid", ["no  signature", "ok  times"]),
    "exp as text": (lambda: token(claims(exp="soon")), "identity_invalid", ["no  times", "exp is no time"]),
    "of a stranger": (lambda: token(claims(iss="https://evil.test")), "identity_invalid", ["no  form and issuer", "https://evil.test"]),
    "no token": (lambda: "gwt_nothing", "identity_invalid", ["is not three parts of base64url"]),
    "keys that cannot be fetched": (lambda: token(claims(iss="https://gone.test", sub="x")), "identity_unavailable", ["/nowhere/jwks.json is no file"]),
}


@pytest.mark.parametrize(("made", "code", "facts"), CASES.values(), ids=CASES)
def test_a_token_is_explained_as_the_gateway_judges_it(explained, made, code, facts):
    text = made()
    shown = explained(text)
    assert shown.exit_code == (0 if code is None else 1), shown.output
    output = " ".join(shown.output.split())
    last = shown.output.rstrip().splitlines()[-1]
    assert last.startswith("let in as app reviews" if code is None else f"refused: {code}: ")
    assert [fact for fact in facts if " ".join(fact.split()) not in output] == []
    assert text[:20] not in shown.output
    as_json = json.loads(explained(text, "--json").output)
    assert (as_json["refused"] and as_json["refused"]["code"], as_json["app"]) == (code, "reviews" if code is None else None)


def test_a_token_is_explained_alone_and_where_issuers_are(explained, tmp_path):
    (tmp_path / "request.json").write_text("{}")
    assert explained("x", "--app", "reviews").exit_code == 2
    write_policies(tmp_path / "policies", "http://127.0.0.1:1", {"reviews": APP, "nightly": APP, "twin": APP})
    assert "gateway.yaml names no issuers" in explained("x").output
    assert CliRunner().invoke(main, ["explain", "--policies", str(tmp_path / "policies")]).exit_code == 2
