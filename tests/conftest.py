"""Set-up for pytest: the tests run on our reactor, as they do under ``trial --reactor=lws``."""

from lwstwisted.loop.reactor import install

install()
