"""A connection that fails as a disk does."""

import sqlite3


class Broken:
    """A connection of which one statement fails as the disk would make it fail; `after`: though it was carried out."""

    def __init__(self, db, statement, error, *, after=False):
        self._db, self._statement, self._error, self._after = db, statement, error, after

    def __getattr__(self, name):
        return getattr(self._db, name)

    def execute(self, sql, *values):
        if getattr(sql, "text", sql).strip().startswith(self._statement):
            if self._after:
                self._db.execute(sql, *values)
            raise self._error
        return self._db.execute(sql, *values)


def disk_error(code=sqlite3.SQLITE_IOERR, text="disk I/O error"):
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error
