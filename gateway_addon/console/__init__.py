"""Serve the operator's console: pages over the ledger, for one person on the same machine.

    app      addresses, who is let in, headers, the server      login    the one-time link and the cookie
    pages    what each address shows                            desk     caps, live calls and alerts, as values
    ranges   the days that a page is about                      sums     their figures, by app, model, token and day
    listing  the list of calls: filters, order, exports         charts   the geometry of the drawings
    metrics  the overview for machines
"""
