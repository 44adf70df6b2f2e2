"""Work on a whole ledger: backup, invariants, migrate, prune."""
