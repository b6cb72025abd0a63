"""A file-upload service on Twisted.

Its TLS uploads go on although their bytes already lie decrypted where the kernel cannot
announce them; it stops reading the moment the store behind it is full; what it
acknowledged is on the disk.

The map. A module imports only from floors below its own, and the number is its floor
(``tests/test_architecture.py`` compares this text with the tree)::

  errors.py        0  every refusal a client can see: code, status, sentence
  interfaces.py    0  what each floor promises the next
  flow.py          0  when to stop and when to go on; no I/O
  certificate.py   0  a self-signed certificate for trying things out
  loop/               bytes arrive
    pending.py     1  the pending-read list, the optional hook, the default path
    tls.py         2  the TLS transport: bounded reads, exact pause
    reactor.py     3  the reactors that poll: they merge pending readers into each turn
    foreign.py     4  the reactor on a loop that drives itself: asyncio, uvloop
  web/                bytes become a request whose body a resource can watch arriving
    wire.py        1  HTTP/1.1 framing without I/O
    body.py        2  the body of a request while it arrives
    deadline.py    1  one timer for one connection
    answers.py     1  what a refused client is told, and whether it reads it
    channel.py     3  the protocol: between transport, framing and requests
    site.py        4  a twisted.web Site for resources that take a body as it comes
  stores/             a body becomes a file
    names.py       1  which names are allowed, and why not
    tree.py        2  folders and names on the disk, safely resolved
    local.py       3  the disk: own threads, atomic and durable commit
  uploads/            a request becomes an upload
    transfer.py    2  one upload while its bytes arrive
    put.py         3  PUT
    resource.py    5  the resource: which method goes where
  service.py       6  the one place where everything is built, named, started and stopped
  __main__.py      7  the command line

A byte travels kernel, reactor, tls, channel, wire, put, transfer, store, disk. Each turn
of the reactor gives every readable transport one ``doRead``, be it the kernel or the
pending list that calls it readable. The transport decrypts up to its budget or until it
is paused. The channel asks the wire for one event after another while nobody holds its
valve closed; at the end of the headers it finds the resource, which may refuse before
any of the body is spent. The transfer counts the bytes and hands blocks to the store. The
client has its answer when file and name are durable.

A pause travels the other way: the store falls behind, the transfer closes the channel's
valve, the channel stops asking and pauses the transport, the transport leaves epoll and
the pending list, the TCP window closes, and the client waits. When the store has caught
up the channel first empties what the wire still holds, which may close the valve again,
and only then resumes the transport.
"""

__version__ = "0.1.0"
