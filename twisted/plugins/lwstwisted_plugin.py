"""Makes lwstwisted known to Twisted: ``--reactor=lws`` and ``twistd lwstwisted``.

Twisted loads this file to list its plugins, so it imports nothing of ours.
"""

from twisted.application.reactors import Reactor
from twisted.application.service import ServiceMaker

lws = Reactor("lws", "lwstwisted.loop.reactor", "epoll that also knows of input pending inside TLS.")
lws_poll = Reactor("lws-poll", "lwstwisted.loop.reactor.LwsPollReactor", "The same on poll(2).")
lws_select = Reactor("lws-select", "lwstwisted.loop.reactor.LwsSelectReactor", "The same on select(2).")
lws_asyncio = Reactor(
    "lws-asyncio", "lwstwisted.loop.foreign", "The same on asyncio; LWSTWISTED_EVENT_LOOP=uvloop on that."
)
service = ServiceMaker("lwstwisted", "lwstwisted.service", "An upload service over HTTP(S).", "lwstwisted")
