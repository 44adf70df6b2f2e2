"""Store the ledger: SQLite or PostgreSQL, one writer, its locks, its journal, its schema."""
