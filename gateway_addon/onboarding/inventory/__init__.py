"""The inventory: find who uses the Claude API in files, before anything is moved.

Three modules: `rules` says what a consumer looks like (a table), `consumers` reads one file's bytes by it (pure), `tree`
walks folders and reads the files (the only one that touches the disk). None of them keeps or prints a key: a key
becomes its fingerprint where it is found.
"""

from gateway_addon.identity.fingerprint import fingerprint
from gateway_addon.onboarding.inventory.consumers import Consumer, Finding, Inventory, document, inspect, shared_keys
from gateway_addon.onboarding.inventory.tree import File, Skip, read

__all__ = ["Consumer", "File", "Finding", "Inventory", "Skip", "document", "fingerprint", "inspect", "read", "shared_keys"]
