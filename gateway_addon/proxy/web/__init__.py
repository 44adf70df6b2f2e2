"""`gateway web`: the gateway under mitmweb, for the person who looks for what went wrong.

    contents   bodies of the Messages API as a person reads them; pure
    view       the same as a content view of mitmweb's
    addon      comments, marks and commands on the flows; edited and replayed flows pass the same admission
    replays    mitmweb's replay button, through the gateway's own layers
    master     mitmweb with what could run code, move files or open a way around taken out

No production gateway imports any of it.
"""
