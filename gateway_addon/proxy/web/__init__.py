"""Run the gateway under mitmweb (`gateway web`), for a person who looks for what went wrong.

    pretty     bodies of the Messages API as a person reads them; pure
    view       pretty as a content view of mitmweb's
    addon      comments, marks and commands on the flows; edited and replayed flows pass the same admission
    replays    mitmweb's replay button, through the gateway's own layers
    master     mitmweb without the commands that could run code, move files or bypass the gateway

No production gateway imports any of it.
"""
