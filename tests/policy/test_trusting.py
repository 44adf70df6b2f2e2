"""Whom a policy trusts: issuers and workloads as they are written, and those that would let strangers in."""

import pytest
from click.testing import CliRunner
from gateway import APP, write_policies
from handbook import blocks, page
from issuers import jwks

from gateway_addon.cli import main
from gateway_addon.identity.key_set import KeySet
from gateway_addon.identity.trust import AppRule, Issuer, KeySource, WorkloadRule
from gateway_addon.identity.workloads import mismatch
from gateway_addon.policy import PolicyError, load
from gateway_addon.policy.trusting import doubtful

GITHUB = "https://token.actions.githubusercontent.com"
ISSUERS = f"""
audience: https://gateway.internal
issuers:
  github: {{url: {GITHUB}}}
  cluster: {{url: https://cluster.test, keys: {{file: /etc/jwks.json}}, algorithms: [ES384], lifetime: 2h, skew: 5s}}
  spire: {{url: "spiffe://example.org", keys: {{url: https://spire.test/bundle}}}}
"""
RULES = """
workloads:
  - {issuer: github, claims: {repository_id: 456, ref: refs/heads/main}}
  - {issuer: cluster, subject: "system:serviceaccount:batch:nightly"}
"""


def loaded(folder, apps, gateway=ISSUERS):
    return load(write_policies(folder, "http://127.0.0.1:1", {name: APP + text for name, text in apps.items()}, gateway))


def test_issuers_and_workloads_are_read_as_written(tmp_path):
    policy = loaded(tmp_path, {"app": RULES, "other": ""})
    github = WorkloadRule(GITHUB, None, (("ref", "refs/heads/main"), ("repository_id", "456")))
    cluster = WorkloadRule("https://cluster.test", "system:serviceaccount:batch:nightly", ())
    assert policy.apps["app"].workloads == (github, cluster)
    assert policy.apps["other"].workloads == ()
    trust = policy.trust
    assert trust.audience == "https://gateway.internal"
    assert trust.rules == {GITHUB: (AppRule("app", github),), "https://cluster.test": (AppRule("app", cluster),)}
    assert list(trust.issuers.values()) == [
        Issuer("github", GITHUB, KeySource("discovery"), ("RS256", "ES256"), 3600.0, 60.0),
        Issuer("cluster", "https://cluster.test", KeySource("file", "/etc/jwks.json"), ("ES384",), 7200.0, 5.0),
        Issuer("spire", "spiffe://example.org", KeySource("url", "https://spire.test/bundle"), ("RS256", "ES256"), 3600.0, 60.0),
    ]


def test_without_issuers_nobody_is_trusted(tmp_path):
    assert loaded(tmp_path, {"app": ""}, "").trust is None


def test_keys_may_stand_in_the_policy(tmp_path):
    text = f"audience: x\nissuers:\n  cluster:\n    url: https://cluster.test\n    keys:\n      inline: >-\n        {jwks().decode()}\n"
    assert loaded(tmp_path, {"app": ""}, text).trust.issuers["https://cluster.test"].keys == KeySource("inline", jwks().decode())


WRONG_ISSUERS = [
    ("issuers: {x: {url: https://x.test}}", "audience: is missing"),
    ("audience: x", "audience: has no effect without issuers"),
    ("audience: x\nissuers: {}", "audience: has no effect without issuers"),
    ("audience: x\nissuers: {X: {url: https://x.test}}", "issuers.X: not a name"),
    ("audience: x\nissuers: {x: {url: http://x.test}}", "must be an https address"),
    ("audience: x\nissuers: {x: {url: https://x.test?a=b}}", "must be an https address"),
    ("audience: x\nissuers: {x: {url: https://me:pw@x.test}}", "must be an https address"),
    ("audience: x\nissuers: {x: {url: file:///etc/passwd}}", "must be an https address"),
    ("audience: x\nissuers: {x: {url: 'spiffe://x.test/ns'}}", "must be a trust domain alone"),
    ("audience: x\nissuers: {x: {url: 'spiffe://x.test'}}", "issuers.x.keys: is missing"),
    ("audience: x\nissuers: {x: {url: https://x.test, keys: {url: http://x.test/keys}}}", "must be an https address"),
    ("audience: x\nissuers: {x: {url: https://x.test, keys: {inline: '{}'}}}", "must be a JWK set"),
    ("audience: x\nissuers: {x: {url: https://x.test, keys: {inline: '{'}}}", "the JWK set is not JSON"),
    ("audience: x\nissuers: {x: {url: https://x.test, algorithms: [HS256]}}", "'HS256' is not a word known here"),
    ("audience: x\nissuers: {x: {url: https://x.test, algorithms: []}}", "issuers.x.algorithms: names none"),
    ("audience: x\nissuers: {x: {url: https://x.test}, y: {url: https://x.test}}", "issuers.y.url: is that of x too"),
]


@pytest.mark.parametrize(("text", "why"), WRONG_ISSUERS)
def test_an_issuer_that_cannot_be_asked_safely_is_refused(tmp_path, text, why):
    with pytest.raises(PolicyError) as raised:
        loaded(tmp_path, {"app": ""}, text)
    assert why in str(raised.value)


WRONG_RULES = [
    ("{issuer: gitlab, subject: x}", "no issuer 'gitlab' in gateway.yaml"),
    ("{issuer: github}", "names neither a subject nor claims"),
    ("{issuer: github, claims: {}}", "names neither a subject nor claims"),
    ("{issuer: github, claims: {aud: 'https://gateway.internal'}}", "the claim aud is judged by itself"),
    ("{issuer: github, subject: x, claims: {sub: y}}", "the claim sub is judged by itself"),
    ("{issuer: github, subject: '*', claims: {repository_id: 1}}", "the subject * is any"),
    ("{issuer: github, subject: 'repo:o/*'}", "the subject repo:o/* is a beginning"),
    ("{issuer: github, subject: 'repo:o/*', claims: {ref: refs/heads/main}}", "name a claim beside it that is an id"),
    ("{subject: x}", "issuer is missing"),
]


@pytest.mark.parametrize(("rule", "why"), WRONG_RULES)
def test_a_rule_that_lets_strangers_in_is_refused(tmp_path, rule, why):
    with pytest.raises(PolicyError) as raised:
        loaded(tmp_path, {"app": f"workloads:\n  - {rule}\n"})
    assert why in str(raised.value)
    assert "policies/apps/app.yaml:" in str(raised.value).replace(str(tmp_path.name), "policies")


def test_a_beginning_beside_an_id_is_taken(tmp_path):
    rules = [f"{{issuer: github, subject: 'repo:o/r:*', claims: {{{name}: 1}}}}" for name in ("repository_id", "oid", "id")]
    assert len(loaded(tmp_path, {"app": "workloads: [" + ", ".join(rules) + "]"}).apps["app"].workloads) == 3


def test_two_apps_with_one_rule_are_refused(tmp_path):
    with pytest.raises(PolicyError, match=r"other\.yaml: workloads: ref refs/heads/main, repository_id 456 is in .*app\.yaml too"):
        loaded(tmp_path, {"app": RULES, "other": "workloads:\n  - {issuer: github, claims: {ref: refs/heads/main, repository_id: '456'}}\n"})


NAMED = ["{issuer: github, subject: 'repo:o/r:ref:refs/heads/main'}", "{issuer: github, subject: 'repo:o@1/r@456:environment:x'}"]
PINNED = ["{issuer: github, subject: 'repo:o/r:x', claims: {repository_id: 1}}", "{issuer: cluster, subject: 'system:serviceaccount:a:b'}"]


def test_a_repository_that_is_named_without_its_id_is_doubtful(tmp_path):
    """The forms of `sub` before and since ids stand in it: a name is given away again, an id is not."""
    policy = loaded(tmp_path, {"app": f"workloads: [{', '.join(NAMED + PINNED)}]"})
    [sentence] = doubtful(policy.apps)
    assert "/apps/app.yaml: workloads: the subject repo:o/r:ref:refs/heads/main is a repository's name" in sentence
    write_policies(tmp_path, "http://127.0.0.1:1", {"app": APP + f"workloads: [{NAMED[0]}]"}, ISSUERS)
    shown = CliRunner().invoke(main, ["check", str(tmp_path), "--ledger", f"sqlite:///{tmp_path / 'none.db'}"])
    assert (shown.exit_code, "warning: " in shown.output, GITHUB in shown.output) == (0, True, True)
    assert "app: subject repo:o/r:ref:refs/heads/main" in shown.output.replace("\n", "")


EXAMPLES = {
    # tokens of the jobs that the handbook's rules name, by the rules' order
    "by ids": {"iss": GITHUB, "sub": "repo:any/name:environment:production", "repository_id": "456", "environment": "production"},
    "the older form of sub": {"iss": GITHUB, "sub": "repo:octo/tools:ref:refs/heads/main", "repository_id": "457"},
    "the form with ids": {"iss": GITHUB, "sub": "repo:octo@123/tools@458:ref:refs/heads/main"},
    "a protected branch": {"iss": "https://gitlab.com", "sub": "project_path:g/p:ref_type:branch:ref:main", "project_id": "22", "ref": "main", "ref_type": "branch", "ref_protected": "true"},
    "keys in a file": {"iss": "https://kubernetes.default.svc.cluster.local", "sub": "system:serviceaccount:batch:nightly"},
    "keys in the policy": {"iss": "https://edge.internal", "sub": "system:serviceaccount:batch:nightly"},
}


def test_the_handbooks_examples_load_and_each_matches_its_job(tmp_path):
    """Each rule is right for one job alone: none of the others' tokens match it."""
    shown = [block.text for block in blocks(page("workloads")) if block.language == "yaml"]
    assert len(shown) == 2
    for text in shown:
        gateway, _, app = text.partition("# policies/apps/")
        policy = loaded(tmp_path, {"app": app.partition("\n")[2]}, gateway)
    assert doubtful(policy.apps) == []
    matches = [[name for name, each in EXAMPLES.items() if each["iss"] == rule.issuer and mismatch(rule, each) is None] for rule in policy.apps["app"].workloads]
    assert matches == [[name] for name in EXAMPLES]
    inline = KeySet(policy.trust.issuers["https://edge.internal"].keys.value.encode())
    assert [each.key_id for each in inline.keys] == ["k1"]
