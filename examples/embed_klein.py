"""Uploads as a branch of a klein application, on any reactor: ``python embed_klein.py 8080 FOLDER``.

klein itself takes a request when its body is whole. So the uploads are a resource beside it, and not one of its routes.
"""

import sys

from klein import Klein
from twisted.internet import endpoints, reactor
from twisted.web.resource import Resource

from lwstwisted.stores.local import LocalStore
from lwstwisted.uploads.resource import UploadResource
from lwstwisted.web.site import StreamingSite

port, folder = sys.argv[1:]
app = Klein()


@app.route("/")
def home(request):
    return b"the application\n"


@app.route("/echo", methods=["POST"])
def echo(request):
    return request.content.read()


class Root(Resource):
    """What is no child is klein's."""

    def getChild(self, path, request):
        request.postpath.insert(0, request.prepath.pop())
        return app.resource()


root = Root()
root.putChild(b"files", UploadResource(LocalStore(folder), max_size=2**20))
endpoints.serverFromString(reactor, f"tcp:{port}:interface=127.0.0.1").listen(StreamingSite(root))
reactor.run()
