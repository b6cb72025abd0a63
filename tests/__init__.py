"""The tests. They run by ``pytest`` and by ``python -m twisted.trial --reactor=lws tests``."""
