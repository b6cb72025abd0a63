"""How a service lives among others: its service manager, its signals, its workers.

The map is in the docstring of ``lwstwisted``.
"""
