"""Where the ledger is kept: SQLite or PostgreSQL, one writer, its locks, its journal, its schema."""
