"""Uploads beside the other resources of a twisted.web application, on any reactor: ``python embed.py 8080 FOLDER``."""

import sys

from twisted.internet import endpoints, reactor
from twisted.web.resource import Resource
from twisted.web.static import Data

from lwstwisted.stores.local import LocalStore
from lwstwisted.uploads.resource import UploadResource
from lwstwisted.web.site import StreamingSite

port, folder = sys.argv[1:]
root = Resource()
root.putChild(b"", Data(b"the application\n", "text/plain"))
root.putChild(b"files", UploadResource(LocalStore(folder), max_size=2**20))
endpoints.serverFromString(reactor, f"tcp:{port}:interface=127.0.0.1").listen(StreamingSite(root))
reactor.run()
