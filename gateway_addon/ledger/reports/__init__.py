"""Read the ledger: spending, single calls, daily totals, token usage. No function here writes a call."""
