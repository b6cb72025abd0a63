"""HTTP: from plaintext to the resources of twisted.web, which may watch a body arrive.

``wire.py`` knows the framing and no I/O, ``channel.py`` pumps between transport, wire and the
``Request`` of twisted.web, ``site.py`` is the factory that an application uses.
"""
