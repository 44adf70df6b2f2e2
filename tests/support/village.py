"""A village of twelve consumers, hidden in as many forms among files that only look like consumers."""

import base64
import json
import random
from pathlib import Path

KEY = "sk-ant-api03-Qm7xR2vKp9LdTz4WbN8cYf1GhJ6sAe3UoViXq5_kMtBw0PyDnElZrCSu-OaHg8F2jQAA"
OTHER_KEY = "sk-ant-api03-w0PyDnElZrCSuOaHg8F2jQm7xR2vKp9LdTz4WbN8cYf1GhJ6sAe3UoViXq5kMtB-NeAA"
ADMIN_KEY = "sk-ant-admin01-8cYf1GhJ6sAe3UoViXq5kMtBw0PyDnElZrCSuOaHg8F2jQm7xR2vKp9LdTz4WbN-AA"
TOKEN = "gwt_PKBcymhKYd4uFXDrD4Fq7KQZ5IYti8tZRTOvMyr920P04co1F"
VILLAGE = {
    # path: (content, line, kind, state, keys)
    "etc/crontab": (
        f"SHELL=/bin/sh\n# 0 1 * * * ANTHROPIC_API_KEY=$OLD /opt/old\n15 3 * * * root ANTHROPIC_API_KEY={KEY} /opt/reports\n",
        3, "crontab", "direct", [KEY],
    ),
    "etc/cron.daily/digest": (
        "#!/bin/sh\ncurl -s https://api.anthropic.com/v1/messages -H \"x-api-key: $ANTHROPIC_API_KEY\" -d @/srv/digest.json\n",
        2, "shell", "direct", [],
    ),
    "etc/systemd/system/replies.service": (
        f"[Service]\nExecStart=/opt/replies/run\nEnvironment=ANTHROPIC_API_KEY={KEY}\n", 3, "systemd", "direct", [KEY],
    ),
    "home/ada/analysis/churn.ipynb": (
        json.dumps({"cells": [{"cell_type": "code", "source": ["import os\n", "import anthropic\n"]}], "nbformat": 4}, indent=1),
        7, "notebook", "environment", [],
    ),
    "home/ada/.claude/settings.json": ('{"apiKeyHelper": "/home/ada/bin/key"}\n', 1, "claude-code", "environment", []),
    "srv/shop/compose.yaml": (
        f"services:\n  db:\n    image: postgres\n  answers:\n    environment:\n      ANTHROPIC_API_KEY: {OTHER_KEY}\n",
        6, "compose", "direct", [OTHER_KEY],
    ),
    "srv/shop/.env": (f"DEBUG=1\nANTHROPIC_API_KEY={KEY}\n", 2, "dotenv", "direct", [KEY]),  # and .gitignore names it
    "srv/shop/lib/hardcoded.py": (
        "import httpx\n\nURL = 'https://api.anthropic.com/v1/messages'\n", 3, "python", "direct", [],
    ),
    "srv/web/src/chat.ts": (
        'import Anthropic from "@anthropic-ai/sdk";\nexport const client = new Anthropic();\n', 1, "javascript", "environment", [],
    ),
    "srv/web/.github/workflows/review.yml": (
        "jobs:\n  review:\n    steps:\n      - run: ./a\n        env:\n          ANTHROPIC_API_KEY: ${{ secrets.ANTHROPIC_API_KEY }}\n",
        6, "github-actions", "direct", [],
    ),
    "srv/search/main.go": (
        'package main\n\nimport (\n\t"github.com/anthropics/anthropic-sdk-go"\n)\n', 4, "go", "environment", [],
    ),
    "srv/search/deploy/secret.yaml": (
        f"kind: Secret\ndata:\n  key: {base64.b64encode(KEY.encode()).decode()}\n", 3, "configuration", "direct", [KEY],
    ),
}
LOOKALIKES = {
    "README.md": "Set ANTHROPIC_API_KEY and `import anthropic`, then call https://api.anthropic.com/v1/messages.\n",
    "CHANGELOG": "Moved from api.anthropic.com to the gateway.\n",
    "requirements.txt": "anthropic==2.14.0\n",
    "package.json": '{"dependencies": {"@anthropic-ai/sdk": "^1.12.0"}}\n',
    ".env.example": "ANTHROPIC_API_KEY=sk-ant-api03-your-key-goes-in-this-place\n",
    "empty.env": "ANTHROPIC_API_KEY=\nANTHROPIC_AUTH_TOKEN=\"\"  # fill in\n",
    "commented.py": "# import anthropic\n# os.environ['ANTHROPIC_API_KEY']\nx = 1\n",
    "docstring.py": '"""How to call it:\n\nimport anthropic\nclient = anthropic.Anthropic()\n"""\n',
    "neighbour.py": "import anthropic_mock\nfrom philanthropic import giving\n",
    "commented.ts": '/* once:\nimport Anthropic from "@anthropic-ai/sdk";\n*/\n// process.env.ANTHROPIC_API_KEY\n',
    "commented.yaml": "#  ANTHROPIC_API_KEY: x\nname: claude\n",
    "commented.service": "[Service]\n;Environment=ANTHROPIC_API_KEY=abc\n#Environment=ANTHROPIC_API_KEY=abc\n",
    "people.csv": "name,mail\nClaude Shannon,claude@example.org\n",
    "claude.sh": "echo claude wrote this -- print it\nrm -rf claude-p\n",
    "placeholder.conf": "key = sk-ant-api03-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\n",
    "elsewhere.py": "from openai import OpenAI\nclient = OpenAI(base_url='http://127.0.0.1:8080')\n",
    "docs.anthropic.conf": "see https://docs.anthropic.com and https://api.anthropic.com.evil.example/\n",
    "tests/cassettes/answer.yaml": "uri: https://api.anthropic.com/v1/messages\n",
    "node_modules/@anthropic-ai/sdk/client.js": 'const key = process.env.ANTHROPIC_API_KEY; import("@anthropic-ai/sdk");\n',
    "notes": "ask ops for the ANTHROPIC_API_KEY of api.anthropic.com\n",
}


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def build_village(root: Path, others: int) -> None:
    """The twelve consumers, a lookalike of every kind, and `others` files of ordinary text."""
    write(root, {name: row[0] for name, row in VILLAGE.items()})
    write(root / "srv/lookalikes", LOOKALIKES)
    write(root, {"srv/shop/.gitignore": ".env\nbuild/\n", "srv/shop/build/bundle.py": "import anthropic\n"})
    (root / "srv/lookalikes/photo.bin").write_bytes(b"\x89PNG\0" + KEY.encode())
    words = ("claude", "shop", "order", "token", "import", "return", "client", "request", "#", "(", ")", "=", "''", '""', "{", "}", "\n")
    texts = [" ".join(random.Random(seed).choices(words, k=400)).encode() for seed in range(50)]
    for number in range(others):
        folder = root / f"srv/others/{number // 2000}/{number // 100 % 20}"
        if number % 100 == 0:
            folder.mkdir(parents=True)
        (folder / f"{number}.{('py', 'ts', 'yaml', 'go', 'sh', 'json', 'txt')[number % 7]}").write_bytes(texts[number % 50])
