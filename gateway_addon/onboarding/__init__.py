"""Moving in: the inventory of consumers, lines to paste, and when the real key may be rotated."""
