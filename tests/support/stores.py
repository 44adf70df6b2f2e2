"""A store of a list's rows, whose commits fail as a test wishes: for what the ledger promises of any store."""

from contextlib import nullcontext

from gateway_addon.ledger.types import LedgerUnavailable


class Down(Exception):
    """The store's own failure."""


class Store:
    """Rows in a list. `fails`: what happens at each commit from the first on; `carried out` is a commit in doubt that took place."""

    errors = (Down,)
    journal = None
    near = True
    in_doubt = False

    def __init__(self, *fails, scopes_max=1):
        self.rows, self.tried, self.scopes_max = [], [], scopes_max
        self._fails, self._commits, self._begun = iter(fails), 0, []
        self.in_transaction = False

    must_be_unchanged = close_writer = close = lambda self: None
    connect = lambda self: self  # noqa: E731
    turn = lambda self: nullcontext()  # noqa: E731

    def begin(self, db, scopes):
        self._begun = []
        self.tried.append("".join(sorted(scopes)))

    def batch(self, db, scopes, asked, number):
        return None

    def stamp(self, db, number):
        self._number = number

    def commit(self, db):
        fail = next(self._fails, "")
        if fail in ("", "carried out"):
            self.rows += self._begun
            self._commits = self._number
        if fail:
            raise Down(fail)

    def took_place(self, db, number):
        return self._commits >= number

    def unavailable(self, error):
        return LedgerUnavailable(f"{error}")

    def is_its_own(self, error):
        return isinstance(error, Down)

    def is_busy(self, error):
        return False
