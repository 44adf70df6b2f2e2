"""Read one file's bytes: the consumers of the Claude API in it, each with the place to edit and how to switch it.

Pure: bytes in, frozen values out. Promises that no key leaves this module: what is kept of one is its public prefix and
48 bits of its SHA-256, equal wherever the same key stands and of no use to anyone who does not have the key already.
Knows nothing of folders, terminals or the ledger.
"""

import base64
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from gateway_addon.identity.fingerprint import fingerprint
from gateway_addon.onboarding.inventory import rules
from gateway_addon.onboarding.inventory.rules import FileKind

_BY_NAME = {kind.name: kind for kind in rules.KINDS}
_KIND_PATHS = tuple((re.compile(kind.path), kind) for kind in rules.KINDS)
_STRENGTH = ("key", "token", "direct url", "base url", "sets", "runs", "sdk", "reads")
"""Kinds of evidence, the place that has to be edited first."""
DOCUMENT_VERSION = 1
_OWN_DOCUMENT = b'"gateway_inventory":'


@dataclass(frozen=True, slots=True)
class Finding:
    """One piece of evidence. `value` is safe to print: a fingerprint, a variable's name, a package, a scheme and host."""

    line: int
    rule: str
    value: str


@dataclass(frozen=True, slots=True)
class Consumer:
    """One user of the API. `state` is one of

    - `direct`: calls the provider with a key of its own
    - `environment`: takes key and URL from where it runs, so it is switched there
    - `half switched`: names a gateway, but still holds the real key or the provider's address
    - `switched`: its base URL is not the provider's (`base_url` says whose), or it holds a gateway token
    - `gateway`: the gateway's own policy, the one place where the real key belongs
    """

    path: str
    line: int
    kind: str
    state: str
    keys: tuple[str, ...]
    variables: tuple[str, ...]
    base_url: str | None
    switch: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Inventory:
    roots: tuple[str, ...]
    consumers: tuple[Consumer, ...]
    skipped: tuple[tuple[str, str], ...]
    """(reason, path) of each file or folder that was not read."""
    files: int
    """Files read."""


def inspect(path: str, data: bytes) -> tuple[Consumer, ...]:
    """Return the consumers in the file `path` (absolute) with the content `data`, in the order of their lines."""
    if not any(word in data for word in rules.WORDS) or _OWN_DOCUMENT in data[:64]:
        return ()
    text = data.decode("utf-8", "replace")
    kind = kind_of(path, text)
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    sections = [0, *(match.start() for match in re.finditer(kind.section, text, re.MULTILINE))] if kind.section else [0]
    groups: dict[int, list[Finding]] = {}
    for offset, rule, value in sorted(set(_evidence(kind, text))):
        finding = Finding(bisect_right(starts, offset), rule, value)
        groups.setdefault(bisect_right(sections, offset), []).append(finding)
    # what the head of a crontab sets holds for every job below it
    head = [finding for finding in groups.get(1, ()) if finding.rule == "base url"]
    return tuple(_consumer(path, kind, findings if section == 1 else [*head, *findings]) for section, findings in sorted(groups.items()))


def kind_of(path: str, text: str = "") -> FileKind:
    """Return the kind of file, by its path, or by the interpreter that its first line names."""
    kind = next(kind for pattern, kind in _KIND_PATHS if pattern.search(path))
    if kind.name == "other" and text.startswith("#!"):
        return next((_BY_NAME[name] for pattern, name in rules.INTERPRETERS if pattern.match(text)), kind)
    return kind


def shared_keys(consumers: Iterable[Consumer]) -> dict[str, list[Consumer]]:
    """Return, by fingerprint, the consumers that hold a key, the most shared key first."""
    holders: dict[str, list[Consumer]] = {}
    for consumer in consumers:
        for key in consumer.keys:
            holders.setdefault(key, []).append(consumer)
    return dict(sorted(holders.items(), key=lambda item: (-len(item[1]), item[0])))


def document(inventory: Inventory, made_at: str) -> dict[str, object]:
    """Return the inventory as `--json` prints it and `--save` writes it, for `gateway cutover` to read:

        {"gateway_inventory": 1, "made_at": "2026-11-23T23:50:00Z", "roots": [...], "files": 100012,
         "consumers": [{"path", "line", "kind", "state", "keys": [fingerprint...], "variables": [name...], "base_url": url | null,
                        "switch", "findings": [{"line", "rule", "value"}...]}...],
         "keys": {fingerprint: ["path:line"...]}, "skipped": [{"reason", "path"}...]}

    A gateway token's fingerprint ends in the first 12 hex digits of the hash under which the ledger knows it. The first
    member comes first in the file: it is how a later inventory knows its own record and does not list it.
    """
    return {
        "gateway_inventory": DOCUMENT_VERSION,
        "made_at": made_at,
        "roots": list(inventory.roots),
        "files": inventory.files,
        "consumers": [asdict(consumer) for consumer in inventory.consumers],
        "keys": {key: [f"{c.path}:{c.line}" for c in holders] for key, holders in shared_keys(inventory.consumers).items()},
        "skipped": [{"reason": reason, "path": path} for reason, path in inventory.skipped],
    }


def _evidence(kind: FileKind, text: str) -> Iterator[tuple[int, str, str]]:
    """Yield (offset, rule, value safe to print) for each piece of evidence in a file of this kind."""
    yield from _secrets(text)
    if kind.text == "prose":
        return
    comment = re.compile(rf"^[ \t]*(?:{kind.comment})", re.MULTILINE | re.DOTALL)
    yield from _mentions(kind, comment.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text))


def _secrets(text: str) -> Iterator[tuple[int, str, str]]:
    for match in rules.KEY.finditer(text):
        if _looks_real(match[2]):
            yield match.start(), "key", fingerprint(match[0])
    for match in rules.ENCODED_KEY.finditer(text):
        decoded = _decoded(match[0])
        if (key := rules.KEY.regex.fullmatch(decoded)) and _looks_real(key[2]):
            yield match.start(), "key", fingerprint(decoded)
    for match in rules.TOKEN.finditer(text):
        yield match.start(), "token", fingerprint(match[0])
    for match in rules.ENCODED_TOKEN.finditer(text):
        if rules.TOKEN.regex.fullmatch(decoded := _decoded(match[0])):
            yield match.start(), "token", fingerprint(decoded)


def _decoded(encoded: str) -> str:
    bare = encoded.rstrip("=")
    return base64.b64decode(bare + "=" * (-len(bare) % 4)).decode("ascii", "replace").strip()


def _looks_real(secret: str) -> bool:
    return len(set(secret)) >= 8 and not rules.NOT_A_KEY.search(secret)


def _mentions(kind: FileKind, text: str) -> Iterator[tuple[int, str, str]]:
    direct = rules.DIRECT_CALL if kind.text == "other" else rules.DIRECT_URL
    yield from ((match.start(), "direct url", match[1]) for match in direct.finditer(text))
    for match in rules.BASE_URL.finditer(text):
        url = next(group for group in match.groups() if group)
        if not rules.DIRECT_URL.regex.search(url):
            yield match.start(match.lastindex or 0), "base url", url
    for match in rules.NAME.finditer(text):
        rule = _variable_rule(kind, text, match)
        if rule and not (match["name"] == "ANTHROPIC_BASE_URL" and rule == "sets"):
            yield match.start(), rule, match["name"]
    runs = {"code": (rules.RUNS_FROM_CODE,), "settings": (rules.RUNS, rules.RUNS_IN_CI, rules.RUNS_WITH_HELPER), "other": ()}
    for pattern in runs[kind.text]:
        yield from ((match.start(), "runs", match[1]) for match in pattern.finditer(text))
    if kind.name in rules.SDK:
        yield from ((match.start(1), "sdk", match[1]) for match in rules.SDK[kind.name].finditer(text))


def _variable_rule(kind: FileKind, text: str, match: re.Match[str]) -> str | None:
    """Return whether a place sets the variable or reads it; None for room left for it (`ANTHROPIC_API_KEY=`)."""
    sets = match["assigned"] is not None and not (kind.text == "code" and match["sign"] == ":")
    if sets and match["sign"] == "=" and rules.PLACEHOLDER.fullmatch(match["value"]):
        return None
    if kind.text == "other":
        before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
        return "sets" if sets and match["value"] and rules.ASSIGNMENT_BEFORE.match(before) else None
    return "sets" if sets and match["value"] else "reads"


def _consumer(path: str, kind: FileKind, findings: Sequence[Finding]) -> Consumer:
    def values(*wanted: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(finding.value for finding in findings if finding.rule in wanted))

    state = "gateway" if kind.name == "gateway" else _state({finding.rule for finding in findings})
    keys, base_urls = values("key", "token"), values("base url")
    place = min(findings, key=lambda finding: (_STRENGTH.index(finding.rule), finding.line))
    return Consumer(
        path=path,
        line=place.line,
        kind=kind.name,
        state=state,
        keys=keys,
        variables=values("sets", "reads"),
        base_url=base_urls[0] if base_urls else None,
        switch=_switch(kind, state, keys),
        findings=tuple(findings),
    )


def _state(found: set[str]) -> str:
    own, moved = {"key", "direct url"} & found, {"token", "base url"} & found
    if own and moved:
        return "half switched"
    if own:
        return "direct"
    if moved:
        return "switched"
    return "direct" if "sets" in found else "environment"


def _switch(kind: FileKind, state: str, keys: Sequence[str]) -> str:
    if keys and all(key.startswith("sk-ant-admin") for key in keys):
        return "stays: an admin key reads reports and calls no model"
    if state == "switched":
        return "done"
    if state == "environment":
        return f"where its environment is set, or here: {kind.switch}"
    return kind.switch
