"""Makes lwstwisted known to Twisted: ``--reactor=lws`` and ``twistd lwstwisted``.

Twisted loads this file to list its plugins, so it imports nothing of ours.
"""

from twisted.application.reactors import Reactor
from twisted.application.service import ServiceMaker

reactor = Reactor("lws", "lwstwisted.loop.reactor", "epoll that also knows of input pending inside TLS.")
service = ServiceMaker("lwstwisted", "lwstwisted.service", "An upload service over HTTP(S).", "lwstwisted")
