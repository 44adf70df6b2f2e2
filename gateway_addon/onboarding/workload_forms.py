"""Write both sides of a workload's identity: what the policy says of it, and what the job that calls has to have. No secret is in either.

Pure: a form is text with the gateway's address, its audience and the app's name. Names in capitals are the reader's to put in.
"""

import re
from typing import NamedTuple


class WorkloadForm(NamedTuple):
    where: str
    """One or two sentences: where the lines go, and where the names in capitals come from."""
    policy: str
    """Lines for gateway.yaml, which has the audience above them already, and for the app's file."""
    job: str


_ENVIRONMENT = """\
ANTHROPIC_BASE_URL: "@base_url@"
ANTHROPIC_FEDERATION_RULE_ID: "@app@"
ANTHROPIC_ORGANIZATION_ID: 00000000-0000-0000-0000-000000000000
"""

WORKLOAD_FORMS: dict[str, WorkloadForm] = {
    "github-actions-oidc": WorkloadForm(
        "REPOSITORY_ID: gh api repos/OWNER/NAME --jq .id. It stays when a repository is renamed, and nobody else gets it.",
        """\
# policies/gateway.yaml
audience: @audience@
issuers:
  github: {url: https://token.actions.githubusercontent.com}

# policies/apps/@app@.yaml
workloads:
  - {issuer: github, claims: {repository_id: REPOSITORY_ID, ref: refs/heads/main}}
""",
        """\
# the job, which the runner must reach the gateway from
permissions: {id-token: write, contents: read}
steps:
  - name: Identity token, and a fresh one every two minutes for as long as the job runs
    run: |
      token="$RUNNER_TEMP/identity-token"
      ask() {
        curl -sSf -H "Authorization: Bearer $ACTIONS_ID_TOKEN_REQUEST_TOKEN" \\
          "$ACTIONS_ID_TOKEN_REQUEST_URL&audience=@audience@" | jq -re .value > "$token.new" && mv "$token.new" "$token"
      }
      ask
      (while sleep 120; do ask; done) > /dev/null 2>&1 &
  - run: YOUR_COMMAND
    env:
      ANTHROPIC_IDENTITY_TOKEN_FILE: ${{ runner.temp }}/identity-token
@environment:6@""",
    ),
    "gitlab": WorkloadForm(
        "GITLAB: the address of your GitLab, https://gitlab.com for the public one. PROJECT_ID: on the project's page.",
        """\
# policies/gateway.yaml
audience: @audience@
issuers:
  gitlab: {url: GITLAB}

# policies/apps/@app@.yaml
workloads:
  - {issuer: gitlab, claims: {project_id: PROJECT_ID, ref: main, ref_type: branch, ref_protected: "true"}}
""",
        """\
# .gitlab-ci.yml: one token a job, which lives as long as the job may (at least five minutes)
JOB:
  id_tokens:
    ANTHROPIC_IDENTITY_TOKEN: {aud: "@audience@"}
  variables:
@environment:4@  script: [YOUR_COMMAND]
""",
    ),
    "kubernetes": WorkloadForm(
        "ISSUER: kubectl get --raw /.well-known/openid-configuration | jq -r .issuer. The keys, again when the cluster's change: "
        "kubectl get --raw /openid/v1/jwks > KEYS_FILE; the gateway reads a new file within a second.",
        """\
# policies/gateway.yaml
audience: @audience@
issuers:
  cluster: {url: ISSUER, keys: {file: KEYS_FILE}}

# policies/apps/@app@.yaml
workloads:
  - {issuer: cluster, subject: "system:serviceaccount:NAMESPACE:SERVICE_ACCOUNT"}
""",
        """\
# the pod: Kubernetes renews the file by itself
spec:
  serviceAccountName: SERVICE_ACCOUNT
  containers:
    - name: CONTAINER
      env:
        - {name: ANTHROPIC_IDENTITY_TOKEN_FILE, value: /var/run/secrets/gateway/token}
        - {name: ANTHROPIC_BASE_URL, value: "@base_url@"}
        - {name: ANTHROPIC_FEDERATION_RULE_ID, value: "@app@"}
        - {name: ANTHROPIC_ORGANIZATION_ID, value: 00000000-0000-0000-0000-000000000000}
      volumeMounts: [{name: identity, mountPath: /var/run/secrets/gateway, readOnly: true}]
  volumes:
    - name: identity
      projected:
        sources:
          - serviceAccountToken: {path: token, audience: "@audience@", expirationSeconds: 3600}
""",
    ),
}
WORKLOAD_KINDS = tuple(WORKLOAD_FORMS)


def lines(kind: str, *, base_url: str, audience: str, app: str) -> str:
    """Return the lines of both sides, ending in a newline."""
    form = WORKLOAD_FORMS[kind]
    text = f"{form.policy}\n{form.job}"
    text = re.sub(r"@environment:(\d+)@", lambda match: _indented(int(match[1])), text)
    values = {"base_url": base_url.rstrip("/"), "audience": audience, "app": app}
    return re.sub("@(base_url|audience|app)@", lambda match: values[match[1]], text)


def _indented(blanks: int) -> str:
    return "".join(f"{' ' * blanks}{line}\n" for line in _ENVIRONMENT.splitlines())
