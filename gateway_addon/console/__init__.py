"""Serve the operator's console: a read-only page over the ledger, for one person on the same machine.

    login   the one-time link and the cookie          desk    what there is to see, as values
    app     routes, headers, the server                charts  the geometry of the drawings
    metrics the same for machines
"""
