"""The writer's thread, on a store made for the test: what shares a commit, and what is told of it when one fails."""

import pytest
from stores import Store

from gateway_addon.ledger.store.interface import EVERYTHING
from gateway_addon.ledger.store.writer import Operation, Writer, batchable_runs, disjoint_groups


def scoped(*scopes):
    return Operation(lambda db: None, 0, frozenset(scopes))


@pytest.mark.parametrize(
    ("scopes", "scopes_max", "groups"),
    [
        (["a", "b", "a"], None, [["a", "b", "a"]]),
        (["b", "a", "b"], 1, [["a"], ["b", "b"]]),
        (["d", "c", "b", "a"], 2, [["a", "b"], ["c", "d"]]),
        (["a", "a t", "b t", "c"], 1, [["a", "a t", "b t"], ["c"]]),
        (["a b", "c d", "b c", "e"], 3, [["a b", "c d", "b c"], ["e"]]),
        (["a", "", "b"], 1, [["", "a"], ["b"]]),
        (["a", EVERYTHING, "b"], 1, [["a", EVERYTHING, "b"]]),
        ([], 1, []),
        ([], None, []),
    ],
)
def test_a_commit_locks_few_scopes_and_no_two_commits_share_one(scopes, scopes_max, groups):
    operations = [scoped(*each.split()) for each in scopes]
    assert [[" ".join(sorted(each.scopes)) for each in group] for group in disjoint_groups(operations, scopes_max)] == groups


@pytest.mark.parametrize(
    ("group", "runs"),
    [
        ("2a 0a 2a", ["0a 2a 2a"]),
        ("3- 2a 0a 2a 3-", ["0a 2a 2a", "3- 3-"]),
        ("2a 0- 1- 0a 2a", ["0a", "0- 1-", "2a 2a"]),
        ("2a 2- 0a 2a", ["0a 2a 2a", "2-"]),
        ("3- 2a 0a", ["3- 2a 0a"]),
    ],
)
def test_what_needs_statements_of_its_own_holds_up_no_batch(group, runs):
    """Ranks, with `a` where the store can do it together with others: money that comes back first, top-ups before admissions."""
    operations = [Operation(lambda db: None, int(rank), asked=object() if kind == "a" else None) for rank, kind in group.split()]
    found = [" ".join(f"{each.rank}{'a' if each.asked else '-'}" for each in run) for run in batchable_runs(operations)]
    assert found == runs


def written(store, *names, broken=()):
    """Give a writer operations, a name each and a scope of that name; in capitals they are lasting. Returns what each was told."""
    outcomes = {name: [] for name in names}

    def apply(name):
        if name in broken:
            raise ValueError(name)
        store._begun.append(name)

    def deliver(answers):
        for answer in answers:
            answer.operation.emit(answer.value)

    writer = Writer(store, deliver)
    for name in names:
        scopes, write = frozenset((name.lower(),)), (lambda db, name=name: apply(name))
        writer.put(Operation(write, 0, scopes, lasting=name.isupper(), emit=outcomes[name].append))
    writer.start()
    assert writer.stop(5)
    return {name: ["written" if answer is None else type(answer).__name__ for answer in answers] for name, answers in outcomes.items()}


def test_each_group_is_told_of_its_own_commit():
    store = Store()
    assert written(store, "c", "a", "b") == {"c": ["written"], "a": ["written"], "b": ["written"]}
    assert store.tried == ["a", "b", "c"]


def test_a_failing_store_is_tried_once_more_for_all_the_rest():
    store = Store("down", "down")
    assert written(store, "a", "b", "c", "d") == {name: ["LedgerUnavailable"] for name in "abcd"}
    assert store.tried == ["a", "bcd"]


@pytest.mark.parametrize("doubt", ["carried out", "not carried out"])
def test_a_commit_in_doubt_among_several_writes_nothing_twice(doubt):
    store = Store("", doubt)
    outcomes = written(store, "A", "B", "C")
    assert sorted(store.rows) == ["A", "B", "C"]
    assert outcomes == {name: ["written"] for name in "ABC"}


@pytest.mark.parametrize("fails", [(), ("", "down"), ("", "", "carried out")])
def test_a_broken_operation_breaks_alone_even_if_the_store_fails(fails):
    """An operation that was written alone before the store failed is not written again."""
    store = Store(*fails, scopes_max=None)
    outcomes = written(store, "A", "b", "C", broken="b")
    assert sorted(store.rows) == ["A", "C"]
    assert outcomes["A"] == outcomes["C"] == ["written"]
    assert outcomes["b"] in (["ValueError"], ["LedgerUnavailable"])
