"""The journal of endings that a ledger could not take: what is in it is on the disk, and a crash tears no more than its last line."""

import os

import pytest
from ledgers import Part, Tokens, die

from gateway_addon.ledger import Outcome, Settlement
from gateway_addon.ledger.store import journal
from gateway_addon.ledger.store.journal import Journal, unwritten_journals
from gateway_addon.ledger.types import RecordedEnd

OUTCOME = Outcome(200, "claude-haiku-4-5", "end_turn", "req_1", 2.5, True, "claude-haiku-4-5", ("drift", "cut:budget"), "standard", None, "global")
BILL = Settlement(250, (Part(200), Part(50, "compaction", None, Tokens(1, 2, 3, 4, 5, 6), 7, None)), OUTCOME)
ENDINGS = [
    RecordedEnd("settle", 1, "me", BILL, 10.25),
    RecordedEnd("settle", 2, "me", Settlement(None), 11.0),
    RecordedEnd("void", 3, "me", Settlement(0, (), Outcome(flags=("not_sent",))), 12.0),
]


def found(folder):
    with unwritten_journals(folder) as journals:
        return [(left.endings, left.damaged) for left in journals]


def told(ending):
    """An ending by its values: the classes of its parts are the reader's own."""
    parts = [[part.kind, part.model, [getattr(part.tokens, name) for name in Tokens.__dataclass_fields__], part.web_searches, part.nano, part.price_row]
             for part in ending.settlement.parts]  # fmt: skip
    return ending.kind, ending.call_id, ending.owner, ending.at, ending.settlement.cost_nano, ending.settlement.outcome, parts


def test_a_dead_process_has_left_every_ending_as_it_was(tmp_path):
    kept = Journal(tmp_path / "of" / "this-ledger", "me")
    assert kept.keep(ENDINGS[:1])
    assert kept.keep(ENDINGS[1:])
    die(kept)
    [(endings, damaged)] = found(tmp_path / "of" / "this-ledger")
    assert [told(each) for each in endings] == [told(each) for each in ENDINGS]
    assert not damaged


def test_a_journal_file_exists_only_while_something_is_unwritten(tmp_path):
    folder = tmp_path / "unwritten"
    kept = Journal(folder, "me")
    assert not folder.exists()
    for _ in range(2):
        assert kept.keep(ENDINGS)
        assert [path.name for path in folder.iterdir()] == ["me.jsonl"]
        kept.clear()
        assert list(folder.iterdir()) == []


def test_it_is_private(tmp_path):
    kept = Journal(tmp_path / "unwritten", "me")
    kept.keep(ENDINGS)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("unwritten", "unwritten/me.jsonl")] == [0o700, 0o600]


def test_what_is_kept_is_on_the_disk_before_anybody_counts_on_it(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    Journal(tmp_path, "me").keep(ENDINGS)
    assert sorted(synced) == [str(tmp_path), str(tmp_path / "me.jsonl")]


def test_a_living_process_keeps_its_journal_to_itself(tmp_path):
    kept = Journal(tmp_path, "me")
    kept.keep(ENDINGS)
    assert found(tmp_path) == []
    die(kept)
    with unwritten_journals(tmp_path) as first, unwritten_journals(tmp_path) as second:
        assert (len(first), len(second)) == (1, 0)


def test_a_crash_at_any_byte_tears_the_last_line_alone(tmp_path):
    kept = Journal(tmp_path, "me")
    kept.keep(ENDINGS)
    whole = (tmp_path / "me.jsonl").read_bytes()
    for length in range(len(whole) + 1):
        endings, damaged = journal.read(whole[:length])
        assert len(endings) == whole[:length].count(b"\n")
        assert not damaged


def test_a_changed_byte_costs_one_line_and_sets_the_file_aside(tmp_path, caplog):
    kept = Journal(tmp_path, "me")
    kept.keep(ENDINGS)
    die(kept)
    path = tmp_path / "me.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"cost_nano":250', b'"cost_nano":150'))
    with unwritten_journals(tmp_path) as [left]:
        assert [each.call_id for each in left.endings] == [2, 3]
        left.done(unknown=0)
    assert [path.name for path in tmp_path.iterdir()] == ["me.unread"]
    assert "me.unread" in caplog.text


def test_a_later_versions_line_is_set_aside_and_not_guessed_at(tmp_path):
    kept = Journal(tmp_path, "me")
    kept.keep(ENDINGS[:1])
    die(kept)
    text = (tmp_path / "me.jsonl").read_bytes()[9:-1].replace(b'"status"', b'"stance"')
    (tmp_path / "me.jsonl").write_bytes(b"%08x %s\n" % (journal.zlib.crc32(text), text))
    assert found(tmp_path) == [((), True)]


def test_it_goes_once_all_of_it_is_in_the_ledger(tmp_path):
    kept = Journal(tmp_path, "me")
    kept.keep(ENDINGS)
    die(kept)
    with unwritten_journals(tmp_path) as [left]:
        left.done(unknown=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["disk", "limit"])
def test_a_full_journal_logs_once_and_stays_readable(tmp_path, monkeypatch, caplog, fault):
    kept = Journal(tmp_path, "me")
    assert kept.keep(ENDINGS[:1])

    def half(file, data):
        os.write(file, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        if fault == "disk":
            broken.setattr(journal, "_write", half)
        else:
            broken.setattr(journal, "BYTES_MAX", kept._size_bytes + 10)
        assert not kept.keep(ENDINGS[1:])
        assert not kept.keep(ENDINGS[1:])
    assert caplog.text.count("takes no more") == 1
    assert kept.keep(ENDINGS[2:])
    die(kept)
    [(endings, damaged)] = found(tmp_path)
    assert ([each.call_id for each in endings], damaged) == ([1, 3], False)


def test_a_journal_taken_before_its_lock_loses_nothing(tmp_path, monkeypatch):
    """A process that looks for dead ones may take the empty file; then it is made again."""
    lock, path = journal.fcntl.flock, tmp_path / "me.jsonl"
    looks = iter([path.unlink])

    def lock_late(file, how):
        next(looks, lambda: None)()
        lock(file, how)

    monkeypatch.setattr(journal.fcntl, "flock", lock_late)
    Journal(tmp_path, "me").keep(ENDINGS)
    assert len(journal.read(path.read_bytes())[0]) == 3
