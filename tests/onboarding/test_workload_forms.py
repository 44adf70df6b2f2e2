"""Both sides of a workload's identity, as they are printed: the policy's loads, and lets in what such an issuer gives out."""

import re

import pytest
import yaml
from click.testing import CliRunner
from gateway import APP, write_policies
from issuers import AUDIENCE, claims, jwks, token

from gateway_addon.cli import main
from gateway_addon.identity import workloads
from gateway_addon.identity.key_set import KeySet
from gateway_addon.identity.workloads import Workload
from gateway_addon.onboarding import snippets
from gateway_addon.onboarding.workload_forms import WORKLOAD_KINDS
from gateway_addon.policy import load

FILLED_IN = {
    # the reader's words for the names in capitals, a token that such an issuer gives to this job, one that it gives to another
    "github-actions-oidc": (
        {"REPOSITORY_ID": "456"},
        {"iss": "https://token.actions.githubusercontent.com", "sub": "repo:o@123/r@456:ref:refs/heads/main"},
        {"iss": "https://token.actions.githubusercontent.com", "sub": "repo:o/r:ref:refs/heads/main", "repository_id": "457"},
    ),
    "gitlab": (
        {"GITLAB": "https://gitlab.test", "PROJECT_ID": "22", "JOB": "review", "YOUR_COMMAND": "make"},
        {"iss": "https://gitlab.test", "sub": "project_path:g/p:ref_type:branch:ref:main", "project_id": "22", "ref": "main", "ref_type": "branch", "ref_protected": "true"},
        {"iss": "https://gitlab.test", "sub": "project_path:g/p:ref_type:tag:ref:main", "project_id": "22", "ref": "main", "ref_type": "tag", "ref_protected": "true"},
    ),
    "kubernetes": (
        {"ISSUER": "https://kubernetes.default.svc.cluster.local", "KEYS_FILE": "/etc/gateway/jwks.json", "NAMESPACE": "batch", "SERVICE_ACCOUNT": "nightly", "CONTAINER": "c"},
        {"iss": "https://kubernetes.default.svc.cluster.local", "sub": "system:serviceaccount:batch:nightly", "aud": [AUDIENCE]},
        {"iss": "https://kubernetes.default.svc.cluster.local", "sub": "system:serviceaccount:batch:default", "aud": [AUDIENCE]},
    ),
}


@pytest.fixture
def printed(tmp_path):
    """Return the lines that the command prints for a form."""
    write_policies(tmp_path / "policies", "http://127.0.0.1:1", {"nightly": APP}, f"audience: {AUDIENCE}\nissuers: {{x: {{url: https://x.test}}}}")

    def run(kind, *options):
        return CliRunner().invoke(main, ["token", "issue", "nightly", "--for", kind, *options, "--policies", str(tmp_path / "policies")])

    return run


@pytest.mark.parametrize("kind", WORKLOAD_KINDS)
def test_what_is_printed_loads_and_lets_the_job_in(printed, tmp_path, kind):
    shown = printed(kind)
    assert shown.exit_code == 0, shown.output
    assert "gwt_" not in shown.output, "no token is made"
    words, its, others = FILLED_IN[kind]
    lines = re.sub(r"\b(" + "|".join(words) + r")\b", lambda found: words[found[1]], shown.stdout)
    assert re.search(r"\b(?!ANTHROPIC|ACTIONS|RUNNER|GITHUB|YOUR)[A-Z]{3,}_?[A-Z]*\b", lines.replace(words.get("YOUR_COMMAND", "x"), "")) is None, "nothing is left to put in"
    gateway, app, job = re.split(r"^# (?:policies/\S+|the job|\.gitlab|the pod).*\n", lines, flags=re.MULTILINE)[1:]
    write_policies(tmp_path / "new", "http://127.0.0.1:1", {"nightly": APP + app}, gateway)
    trust, keys = load(tmp_path / "new").trust, KeySet(jwks())
    for changes, let_in in ((its, True), (others, False)):
        found = workloads.judge(*workloads.read(token(claims(**changes)), trust), keys, trust, claims()["iat"])
        assert isinstance(found, Workload) == let_in, found
    wanted = yaml.safe_load(job)
    text = str(wanted)
    assert AUDIENCE in text
    assert "ANTHROPIC_IDENTITY_TOKEN" in text
    assert "http://127.0.0.1:8080" in text
    assert "nightly" in text


def test_a_form_for_a_workload_takes_no_options_of_a_token(printed):
    refused = printed("kubernetes", "--expires", "1h")
    assert (refused.exit_code, "makes no token" in refused.output) == (2, True)


def test_no_form_has_two_meanings():
    assert set(WORKLOAD_KINDS) & set(snippets.KINDS) == set()
