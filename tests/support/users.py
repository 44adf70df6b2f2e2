"""A second user of the machine, for tests that run as root: what it may do is the kernel's to say."""

import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

OTHER = 65_533
"""A user without a name, a home or a group of its own."""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@contextmanager
def as_user(user: int, groups: Collection[int] = (OTHER,)) -> Iterator[None]:
    """Run the block as this user and in these groups: for files the effective user counts, and root's powers go with it."""
    own, its_group = os.getgroups(), os.getegid()
    os.setgroups(list(groups))
    os.setegid(next(iter(groups)))
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(its_group)
        os.setgroups(own)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)
