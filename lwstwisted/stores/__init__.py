"""Where a body becomes a file.

A store offers :class:`lwstwisted.interfaces.Store`; ``tests/contracts.py`` is what each of them
must pass. Nothing here knows HTTP, uploads or transports.

====================  =====================================================================
``names.py``          a request path becomes a :data:`~lwstwisted.interfaces.Name`, or a refusal
``tree.py``           folders beneath a root, by descriptor; blocking
``batch.py``          files that become visible together or not at all, and the theory of that
``local.py``          a store that is a folder on this machine, and the theory of a commit
====================  =====================================================================
"""
