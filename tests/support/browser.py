"""A real browser for the tests: the system's Chromium, without a window, driven by Playwright."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium")
needed = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="no browser here: apt-get install --no-install-recommends chromium"
)
QUIET = ("--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync")


@contextmanager
def opened() -> Iterator[Page]:
    """An empty page of a browser of its own, which ends with the block."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=False, args=QUIET)
        try:
            yield chromium.new_page()
        finally:
            chromium.close()
