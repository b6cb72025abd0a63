"""A file-upload service on Twisted.

A TLS upload goes on though the rest of it sits inside OpenSSL, out of the kernel's sight.
A store that falls behind pauses its clients, and not one byte comes after the pause. An
upload that was answered is stored, whole and synced.

The map. Each number is a floor, and imports go downwards only
(``tests/test_architecture.py`` compares this text with the tree)::

  errors.py        0  all the ways to say no: code, status, sentence
  interfaces.py    0  the seams: who may ask whom for what
  flow.py          0  when to stop and when to go on; no I/O
  certificate.py   0  a self-signed certificate for trying things out
  loop/               from the socket to plaintext
    pending.py     1  readers that the kernel cannot announce, and how they get a turn
    presence.py    1  is the peer of a paused connection still there?
    tls.py         2  the TLS transport: bounded reads, exact pause
    reactor.py     3  the reactors that poll: they merge pending readers into each turn
    foreign.py     4  the reactor on a loop that drives itself: asyncio, uvloop
  tls/                who we are, whom we believe, and what is agreed on
    options.py     0  the command line's
    profiles.py    0  protocols, suites and groups: Mozilla's server side TLS
    certificates.py 0 keys and chains in files: found, read, checked
    clients.py     1  certificates that clients show, and the names in them
    tickets.py     1  sessions are resumed though the keys of their tickets are replaced
    contexts.py    2  the right certificate for each host, made anew when files change
    listening.py   3  TLS on top of any endpoint
  web/                bytes become a request whose body a resource can watch arriving
    limits.py      0  what one client may take: bytes, time, connections
    forwarded.py   0  what proxies in front say of their clients, and who believes it
    tally.py       0  refusals outside of requests, in one log line a second
    wire.py        1  where requests and bodies begin and end; no I/O
    body.py        2  the body of a request while it arrives
    deadline.py    1  one timer for one connection, and the least rate of a body
    answers.py     1  what a refused client is told, and whether it reads it
    outgoing.py    2  answers on their way to a client that may be slow
    plain.py       1  resources that are only looked at
    request.py     1  twisted.web's request, and interim responses
    accesslog.py   2  one line for each request, for people or for programs
    channel.py     3  the protocol: between transport, framing and requests
    site.py        4  the Site that an application uses
  access/             who may do what
    rules.py       1  what is allowed to whom, and where; no I/O
    passwords.py   1  files of passwords and tokens: only hashes that are slow to guess
    files.py       1  a small file, read again when it changes
    hashing.py     1  slow hashes in threads, fairly shared
    exposure.py    1  which listeners only this machine reaches
    slowdown.py    2  who fails waits before the next try
    credentials.py 2  Authorization: Basic and Bearer
    signing.py     2  signed URLs
    hosts.py       2  names that lead here
    checkers.py    3  twisted.cred checkers for those files
    visitor.py     3  what somebody may do, as uploads want to know it
    login.py       4  whose credentials these are; what was right is remembered
    admission.py   5  from a request to a visitor
    entrance.py    6  what the resources ask first
    options.py     3  the options of all this
    building.py    7  the way in, as the options say
  stores/             from bytes to files
    names.py       1  which names are allowed, and why not
    hashing.py     1  digests of bytes that pass by
    locks.py       1  locks on names that other processes see as well
    space.py       2  what uploads may take of the disk: promises, minimum, quota
    record.py      1  the record of an upload that outlives requests; as bytes
    tree.py        3  folders and names on the disk, safely resolved
    threads.py     4  blocking calls beside the reactor, and what their errors mean
    placing.py     4  the last steps of a file: whole, durable, visible
    batch.py       4  files that become visible together or not at all
    resumable.py   5  uploads that outlive requests: bytes, and how many are durable
    holding.py     6  such an upload as a request holds it: its calls go to threads
    waiting.py     6  such uploads as they lie there; which have expired
    local.py       7  the disk: own threads, atomic and durable commit
    fsck.py        7  what crashes have left, and files that changed by themselves
  hooks/              asking and telling an application, as tusd does
    names.py       0  the names of the events
    events.py      1  what happens to uploads, for who is asked and told
    messages.py    2  what is said to a hook and what it says, as JSON
    senders.py     2  how a hook is reached: what both ways have in common
    command.py     3  hooks as commands of a folder
    http.py        3  hooks over HTTP
    outbox.py      4  what is to be told, on disk until somebody has taken it
    delivery.py    5  telling it, again and again, until it is taken
    telling.py     6  both together: who is asked, and what is told
    options.py     3  the options of all this
    building.py    7  hooks as the options say
  uploads/            from requests to stored files
    announced.py   1  what a head says of the bytes behind it
    conditions.py  1  what a client believes of a file: If-Match and its like
    origin.py      2  requests that a page of another site caused
    digests.py     1  what a client says its bytes hash to
    disposition.py 1  the file name in a Content-Disposition
    parts.py       2  the parts of a form: limits, names; no I/O
    pages.py       2  folders with their upload form, as HTML or JSON
    transfer.py    2  the bytes of one upload on their way to the store
    spooled.py     2  requests whose body a stock Site has spooled
    put.py         4  PUT
    form.py        4  POST multipart/form-data
    appending.py   2  what one request appends: durable in steps, or proven at its end
    places.py      1  where clients find uploads and files
    reporting.py   2  what a request for such an upload asks and tells
    plan.py        4  what a resumable upload is meant to be
    session.py     5  resumable uploads: one state, whichever protocol speaks of it
    rufh.py        6  the IETF's Resumable Uploads for HTTP
    tus.py         6  tus 1.0
    cors.py        7  pages of other origins that upload
    refusable.py   1  what each operation may be refused with
    openapi.py     7  the service described for programs: OpenAPI
    resource.py    8  which method goes where; downloads and listings
    resumable.py   8  /uploads/: which protocol and method goes where
  logs.py          0  events as lines: of text, of JSON
  config.py        0  options from a file, and the lines of its mistakes
  metrics.py       7  what Prometheus is told
  running/            how a service lives among others
    notify.py      0  what a service manager is told
    sockets.py     3  listening sockets that outlive who accepts from them
    lifecycle.py   1  signals, reloads, the watchdog
    worker.py      0  how a process knows that it is one of several
    workers.py     4  several processes that serve as one
  options.py       4  what an operator may set, checked before anything is built
  service.py       9  how it all is put together and taken down
  __main__.py      10 the command line

A byte travels kernel, reactor, tls, channel, wire, put, transfer, store, disk. A turn
of the reactor gives a few readable transports one ``doRead`` each, be it the kernel or the
pending list that calls them readable, and the next turn the next few. The transport
decrypts up to its budget or until it is paused. The channel asks the wire for one event
after another while nobody holds its valve closed; at the end of the headers it finds the
resource, which may refuse before any of the body is spent. The transfer counts the bytes
and hands blocks to the store. The client has its answer when file and name are durable.

A pause travels the other way: the store falls behind, the transfer closes the channel's
valve, the channel stops asking and pauses the transport, the transport leaves epoll and
the pending list, the TCP window closes, and the client waits. When the store has caught
up the channel first empties what the wire still holds, which may close the valve again,
and only then resumes the transport.
"""

__version__ = "0.1.0"
