"""A ledger of each engine for the tests of the room, and a connection to it. A test file with a ledger of its own says so itself."""

from contextlib import closing

import pytest
from ledgers import ENGINES, new_ledger, writing


@pytest.fixture(params=ENGINES)
def path(tmp_path, request):
    return new_ledger(tmp_path, request.param)


@pytest.fixture
def db(path):
    with closing(writing(path)) as connection:
        yield connection
