"""`gateway demo` as a newcomer runs it, in an empty folder."""

import json
import subprocess
import sys

import pytest

from gateway_addon.demo import proof
from gateway_addon.ledger.reports.entry_history import Forwarded


def demo(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "gateway_addon", "demo", *arguments], capture_output=True, text=True, timeout=60, **options)


def test_demo_ends_well_and_books_every_call_as_billed(tmp_path):
    """The demo ends well and every call is booked as it was billed."""
    done = demo("--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["holds"]
    assert all(finding["holds"] for finding in told["findings"])
    exact = [call for call in told["calls"] if not any(flag.startswith("estimated") for flag in call["flags"])]
    assert len(exact) >= 10
    assert all(call["ledger_nano"] == call["book_nano"] for call in exact)


def test_story_names_refusals_with_reasons_and_no_secret(tmp_path):
    """The story names what was refused and why and shows no secret."""
    done = demo(cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("403 permission_error", "401 authentication_error", "429 billing_error", "Ten calls at once", "Every figure adds up"):
        assert words in done.stdout
    assert "gwt_" not in done.stdout + done.stderr
    assert "sk-ant" not in done.stdout + done.stderr


@pytest.mark.parametrize(("ledger_nano", "flags", "holds"), [(100, (), True), (101, (), False), (99, (), False), (150, ("estimated:cut",), True), (99, ("estimated:cut",), False)])
def test_the_proof_fails_where_the_books_differ(ledger_nano, flags, holds):
    call = Forwarded(1, "req_1", "app", "messages", "settled", flags, 200, 200, ledger_nano)
    pair = proof.Pair("req_1", call, type("Row", (), {"billed_nano": 100})())
    assert (proof.exact([pair]).holds and proof.estimated([pair]).holds) is holds
