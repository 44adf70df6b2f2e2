"""Who may open a ledger's files: the user whose they are, a group for reading, nobody else."""

import os
import stat
from contextlib import closing
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from gateway import gateway, write_policies
from ledgers import new_file, new_ledger, rows, spend, writing
from users import OTHER, as_user, needs_root, open_folder

from gateway_addon.cli import main
from gateway_addon.ledger import Ledger, LedgerUnavailable, access
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.ledger.store.sqlite import FileStore
from gateway_addon.operations.reload import align
from gateway_addon.simulator import Simulator

FRIENDS = 65_500


def modes(path) -> dict[str, int]:
    return {beside: stat.S_IMODE(path.with_name(path.name + beside).stat().st_mode) for beside in access.BESIDE}


@pytest.mark.parametrize(
    ("owner", "mode", "user", "groups", "may"),
    [
        (7, 0o600, 7, {1}, "read write"),
        (7, 0o600, 0, {0}, ""),
        (7, 0o644, 8, {1}, ""),
        (7, 0o640, 8, {1}, ""),
        (7, 0o640, 8, {1, 5}, "read"),
        (7, 0o600, 8, {5}, ""),
        (7, 0o660, 8, {5}, "read"),
        (0, 0o600, 0, {0}, "read write"),
    ],
)
def test_a_user_is_judged_by_owner_group_and_mode(owner, mode, user, groups, may):
    status = SimpleNamespace(st_uid=owner, st_gid=5, st_mode=stat.S_IFREG | mode)
    allowed = {kind for kind, reading in (("read", True), ("write", False)) if access.is_allowed(status, user, groups, reading=reading)}
    assert allowed == set(may.split())


async def test_a_new_ledger_is_its_users_alone(tmp_path):
    path, before = tmp_path / "gateway.db", os.umask(0)
    try:
        ledger = await Ledger.open(f"sqlite:///{path}", create=True)
        await ledger.ready()
        assert modes(path) == dict.fromkeys(access.BESIDE, 0o600)
        await ledger.close()
    finally:
        os.umask(before)


@pytest.mark.parametrize(("policy", "mode"), [("", 0o600), ("ledger_mode: 0640", 0o640), ("ledger_mode: 0600", 0o600)])
async def test_a_gateway_gives_old_files_the_mode_of_its_policy(tmp_path, policy, mode, caplog):
    """By the same function that a reload runs; -wal and -shm too, which never let a group write."""
    path = new_file(tmp_path)
    with closing(writing(path)) as db:  # as an old gateway left them
        db.execute("DELETE FROM noise")
        for beside in access.BESIDE:
            path.with_name(path.name + beside).chmod(0o666)
        async with Simulator() as api, gateway(tmp_path, api, policy=policy) as gw:
            await align(gw.gateway.ledger, gw.gateway.policy, "test")
            assert modes(path) == dict.fromkeys(access.BESIDE, mode)
            assert f"{path}-shm had the mode 0666 and has {mode:04o} now (ledger_mode)" in caplog.text


@pytest.mark.parametrize("mode", ["0660", "0644", "640", "0o600", "rw"])
def test_a_mode_that_lets_others_in_is_refused(tmp_path, mode):
    policies = write_policies(tmp_path, "https://api.anthropic.com", {}, f"ledger_mode: {mode}")
    result = CliRunner().invoke(main, ["check", str(policies)])
    assert result.exit_code == 2
    assert "can stop every call; write 0600 or 0640" in result.output


def test_doctor_tells_of_files_that_others_may_open(tmp_path, monkeypatch):
    path, policies = new_ledger(tmp_path), write_policies(tmp_path / "policies", "http://127.0.0.1:1", {})
    monkeypatch.setenv("SIMULATED_KEY", "sk-ant-x")
    ask = ["doctor", "--offline", "--ledger", f"sqlite:///{path}", "--policies", str(policies)]
    assert CliRunner().invoke(main, ask).exit_code == 0
    path.chmod(0o644)
    result = CliRunner().invoke(main, ask)
    assert result.exit_code == 1
    assert f"{path} has the mode 0644: anybody who can open it reads everything and can stop every call. chmod 0600 {path}" in result.output


def run(path, *command):
    result = CliRunner().invoke(main, [*command, "--ledger", f"sqlite:///{path}"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@needs_root
@pytest.mark.parametrize(
    "command",
    [
        ["report"], ["doctor", "--offline"], ["pause", "--all"], ["token", "list"], ["batches"], ["backup", "/tmp/never.db"],
        ["restore", __file__],
    ],
    ids=" ".join,
)  # fmt: skip
def test_another_users_command_names_the_owner_and_stops(command):
    """It touches nothing."""
    with open_folder() as folder:
        path = new_ledger(folder)
        os.chown(path, OTHER, OTHER)  # and root is the other one
        before = sorted(os.listdir(folder))
        code, said = run(path, *command)
        assert code == 2, said
        assert f"the user {OTHER}'s: run this as that user (sudo -u '#{OTHER}' ...)" in said
        assert sorted(os.listdir(folder)) == before


@needs_root
def test_a_gateway_of_another_user_does_not_start():
    with open_folder() as folder:
        path = new_file(folder)
        os.chown(path, OTHER, OTHER)
        with pytest.raises(LedgerUnavailable, match="run this as that user"):
            FileStore(path)


@needs_root
def test_a_second_user_reads_nothing_of_a_private_ledger():
    with open_folder() as folder:
        path = new_ledger(folder)
        folder.chmod(0o777)
        with closing(writing(path)) as db:
            spend(db, 1.7e9)
            run(path, "report")  # whatever a command loads is loaded now
            with as_user(OTHER):
                for beside in access.BESIDE:
                    with pytest.raises(PermissionError):
                        os.open(path.with_name(path.name + beside), os.O_RDONLY)
                code, said = run(path, "report")
        assert (code, "the user root's: run this as root (sudo -u root ...)" in said) == (2, True), said
        folder.chmod(0o700)
        with as_user(OTHER):
            code, said = run(path, "report")
        assert (code, "closed to you: it is the user root's" in said) == (2, True), said


@needs_root
def test_a_group_reads_while_a_gateway_runs_and_writes_nothing():
    with open_folder() as folder:
        path = new_ledger(folder)
        os.chown(path, 0, FRIENDS)
        access.restrict(path, 0o640)
        for command in (["report"], ["pause", "--all"], ["resume", "--all"]):  # whatever they load is loaded now
            assert run(path, *command)[0] == 0
        with closing(writing(path)) as db:
            spend(db, 1.7e9)
            with as_user(OTHER, [FRIENDS]):
                code, said = run(path, "report", "--since", "2023-11-01")
                assert (code, "reports" in said) == (0, True), said
                with pytest.raises(PermissionError):
                    os.open(f"{path}-shm", os.O_RDWR)
                code, said = run(path, "pause", "--all")
                assert (code, "run this as root" in said) == (2, True), said
        with as_user(OTHER, [FRIENDS]):
            code, said = run(path, "report")
        assert (code, "only while a gateway runs" in said) == (2, True), said
        assert rows(path, "SELECT count(*) FROM pauses") == [(0,)]


def test_a_log_that_grew_is_cut_back(tmp_path):
    with closing(sqlite_files.writer_connection(new_ledger(tmp_path))) as db:
        assert db.execute("PRAGMA journal_size_limit").fetchone() == (sqlite_files.WAL_KEPT_BYTES_MAX,)
