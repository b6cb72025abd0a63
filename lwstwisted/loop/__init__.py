"""Bytes arrive: event loops on which no decrypted TLS byte is stranded.

``pending.py`` is the mechanism, ``reactor.py`` and ``foreign.py`` put it into Twisted's reactors, and ``tls.py`` is
the transport that needs it. The rest of this page is for authors of event loops.

**What can go wrong.** A TLS transport that stops after its budget, or that was paused and resumed, has plaintext
in OpenSSL while its socket is empty. To ``epoll`` and its like that connection is idle. A loop that waits for
them alone leaves it so until the client sends more or a timeout ends it.

**Three ways in.**

* *Any Twisted reactor*: nothing to do. :func:`~lwstwisted.loop.pending.pending_reads` keeps a list for it, and
  one ``callLater(0, ...)`` serves all that are pending. This is the default path.
* *A reactor with a* ``doIteration()`` *that polls once and serves what it found*: name
  :class:`~lwstwisted.loop.reactor.MergingReactor` before it among the bases. It brings the hook, the order of a
  turn, the monotonic clock, ``install()`` and ``listenSSL()``.
* *A loop that has turns of its own*: provide :class:`~lwstwisted.interfaces.IFakePollin`. ``foreign.py`` does so for
  asyncio and uvloop, ``examples/custom_loop.py`` for a loop written from scratch.

On each of them :class:`~lwstwisted.loop.tls.TLSFactory` may be listened with by ``listenTCP()``. With
:class:`~lwstwisted.loop.tls.TLSPort` it costs less, because the socket is read into a buffer that is reused.

**The contract of** ``fake_pollin(readers)``. It is called when readers become pending, once for each time: a reader
that is no longer pending may become so again, and is then told again. That happens within a ``doRead()``, within a
timer or another call of the application that resumes a connection, and even while the loop does not run yet; it
is always in the reactor's thread. The hook takes note and returns at once:

* True is a promise. For each of these readers the loop will call ``pending_reads(loop).servicePending(reader)``: behind
  the poll of this turn if it is still to come, or of the next, and that poll does not block. ``servicePending`` looks
  whether the reader is pending still, calls its ``doRead()``, and disconnects it if that fails.
* False changes nothing: these readers go by the default path. The answer may be another one each time.

**What never to do.**

* Call ``doRead()`` of a noted reader yourself: it may have been paused, closed or read since.
* Note them by descriptor number: a number may belong to another connection by the time of its turn.
* Merge them into the events *before* the poll, whose result takes their place.
* Go through the very container that ``fake_pollin`` fills: a busy reader comes back in its own turn, and nobody else
  would ever get one. Put an empty one in its place first.
* Give a reader that the kernel announced, and that became pending again by that, a second turn in the same one.
* Call any of this from another thread: ``callFromThread()`` is for that.

A loop with a queue of its own, and what comes of a mark::

    >>> from twisted.internet.selectreactor import SelectReactor
    >>> from zope.interface import implementer
    >>> from lwstwisted.interfaces import IFakePollin
    >>> from lwstwisted.loop.pending import pending_reads

    >>> @implementer(IFakePollin)
    ... class Loop(SelectReactor):
    ...     def __init__(self):
    ...         self.noted = {}
    ...         super().__init__()
    ...     def fake_pollin(self, readers):
    ...         self.noted.update(dict.fromkeys(readers))
    ...         return True
    ...     def doIteration(self, timeout):
    ...         noted, self.noted = self.noted, {}
    ...         super().doIteration(0 if noted else timeout)
    ...         for reader in noted:
    ...             if reader not in self.noted:
    ...                 pending_reads(self).servicePending(reader)

    >>> class Reader:
    ...     def doRead(self):
    ...         print("its turn")
    ...     def logPrefix(self):
    ...         return "reader"

    >>> loop, first, second = Loop(), Reader(), Reader()
    >>> for reader in first, second:
    ...     pending_reads(loop).addPending(reader)
    >>> pending_reads(loop).removePending(second)  # paused in the meantime
    >>> loop.doIteration(10)  # seconds, if nobody were pending; so it does not wait
    its turn
    >>> loop.doIteration(0)
"""
