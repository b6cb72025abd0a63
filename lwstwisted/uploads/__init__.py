"""A request becomes an upload.

``transfer.py`` is one upload while its bytes arrive, each protocol is a file of its own, and
``resource.py`` is the table of them: nothing else knows them all.
"""
