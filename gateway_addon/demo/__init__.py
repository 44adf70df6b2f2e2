"""`gateway demo`: the whole gateway at work on this machine, with no account and no network, and the proof that its figures add up.

    stage    a simulated Claude API, a temporary folder of policies and a ledger, and the gateway itself as a process
    client   the apps' side: HTTP over real sockets, shaped like the official SDKs' calls
    scenes   what the apps do, and what must come of it
    proof    the ledger held against the simulated API's own book, to the nano-dollar
"""
