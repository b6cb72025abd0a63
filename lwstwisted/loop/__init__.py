"""Bytes arrive: event loops on which no decrypted TLS byte is stranded.

``pending.py`` is the mechanism, ``reactor.py`` puts it into a Twisted reactor, and
``tls.py`` is the transport that needs it.
"""
