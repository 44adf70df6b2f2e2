"""The project's own benchmark: `./run.sh bench`.

    upstream   a simulated API that answers from memory     load    callers in a closed loop
    peers      what stands between them                     table   medians, ratios and the machine

The simulated API and the callers are byte-level asyncio protocols: on the core that they share they carry some ten times what
a proxy in Python does, and the table says how much by a row of its own (`direct`).
"""
