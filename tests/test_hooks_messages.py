"""What hooks are told and what they say, beside what tusd tells and understands."""

from __future__ import annotations

import json
from pathlib import Path

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.http_headers import Headers

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.hooks.events import Answer, Cause, Upload, rename_refused
from lwstwisted.hooks.messages import message, response, without_secrets
from lwstwisted.hooks.names import Hook

# The example of tusd's documentation (docs/_advanced-topics/hooks.md), its comments left out.
POST_FINISH = """
{
    "Type": "post-finish",
    "Event": {
        "Upload": {
            "ID": "5d892c228ec8d0451dfec588697e8930",
            "Size": 432724,
            "SizeIsDeferred": false,
            "Offset": 432724,
            "MetaData": {
                "filename": "Screenshot 2023-08-17 at 09.00.40 1.png",
                "filetype": "image/png"
            },
            "IsPartial": false,
            "IsFinal": false,
            "PartialUploads": null,
            "Storage": {
                 "Type": "filestore",
                 "Path": "/my/upload/directory/14b1c4c77771671a8479bc0444bbc5ce"
            }
        },
        "HTTPRequest": {
            "Method": "PATCH",
            "URI": "/files/5d892c228ec8d0451dfec588697e8930",
            "RemoteAddr": "127.0.0.1:59395",
            "Header": {
                "Host": ["localhost:8080"],
                "Tus-Resumable": ["1.0.0"],
                "User-Agent": ["Mozilla/5.0 (Macintosh; Intel Mac OS X 10.15; rv:109.0) Gecko/20100101 Firefox/116.0"]
            }
        }
    }
}
"""

# Likewise, of a response.
RESPONSE = r"""
{
    "HTTPResponse": {
        "StatusCode": 400,
        "Body": "{\"message\":\"the upload is too big\"}",
        "Header": {"Content-Type": "application/json"}
    },
    "RejectUpload": true,
    "RejectTermination": true,
    "ChangeFileInfo": {
        "ID": "my-custom-upload-id",
        "MetaData": {"my-custom-field": "..."},
        "Storage": {"Path": "./upload-e7a036dc-33f4-451f-9520-49032b87e952/presentation.pdf"}
    },
    "StopUpload": true
}
"""


class Asked:
    """As much of a request as is told of."""

    method = b"PATCH"
    uri = b"/files/5d892c228ec8d0451dfec588697e8930"

    def __init__(self, address: object, *fields: tuple[bytes, bytes]) -> None:
        self.requestHeaders = Headers()
        for name, value in fields:
            self.requestHeaders.addRawHeader(name, value)
        self._address = address

    def getClientAddress(self) -> object:
        """See ``Request``."""
        return self._address


def cause_of(address: object, *fields: tuple[bytes, bytes]) -> Cause:
    return Cause.of(Asked(address, *fields))  # type: ignore[arg-type]


class MessageTests(SynchronousTestCase):
    """A program for tusd finds what it looks for."""

    def test_as_documented(self) -> None:
        """Each field of the documented example is there, with the same name, type and value, and no other one."""
        agent = b"Mozilla/5.0 (Macintosh; Intel Mac OS X 10.15; rv:109.0) Gecko/20100101 Firefox/116.0"
        fields = (b"host", b"localhost:8080"), (b"TUS-RESUMABLE", b"1.0.0"), (b"User-Agent", agent)
        upload = Upload(
            "5d892c228ec8d0451dfec588697e8930",
            432724,
            432724,
            {"filename": "Screenshot 2023-08-17 at 09.00.40 1.png", "filetype": "image/png"},
            at=("14b1c4c77771671a8479bc0444bbc5ce",),
        )
        cause = cause_of(IPv4Address("TCP", "127.0.0.1", 59395), *fields)
        told = json.loads(message(Hook.POST_FINISH, upload, cause, Path("/my/upload/directory")))
        self.assertEqual(told, json.loads(POST_FINISH))

    def test_before_creation(self) -> None:
        """What isn't known has the value that it has in Go: no ID, size 0 that is deferred, no storage."""
        upload = json.loads(message(Hook.PRE_CREATE, Upload(), Cause(), Path("/r")))["Event"]["Upload"]
        self.assertEqual(
            upload,
            {
                "ID": "", "Size": 0, "SizeIsDeferred": True, "Offset": 0, "MetaData": {}, "IsPartial": False,
                "IsFinal": False, "PartialUploads": None, "Storage": None,
            },
        )  # fmt: skip

    def test_concatenation(self) -> None:
        """A part is partial; what is made of parts is final, and names them in their order."""
        part = json.loads(message(Hook.POST_CREATE, Upload("a", 1, is_partial=True), Cause(), Path("/")))
        whole = json.loads(message(Hook.POST_CREATE, Upload("c", 2, parts=("b", "a")), Cause(), Path("/")))
        keys = "IsPartial", "IsFinal", "PartialUploads"
        found = [[one["Event"]["Upload"][key] for key in keys] for one in (part, whole)]
        self.assertEqual(found, [[True, False, None], [False, True, ["b", "a"]]])

    def test_names_of_fields_as_go_has_them(self) -> None:
        """A program that looks for ``Etag`` and ``Www-Authenticate`` finds them; repeated ones are all there."""
        cause = cause_of(None, (b"etag", b"1"), (b"WWW-authenticate", b"2"), (b"x-a", b"3"), (b"X-A", b"\xff\xc3\xa9"))
        self.assertEqual(cause.headers, {"Etag": ["1"], "Www-Authenticate": ["2"], "X-A": ["3", "\ufffdé"]})

    def test_addresses(self) -> None:
        """An address is what Go writes, also of IPv6; a client on a UNIX socket has none."""
        addresses = IPv4Address("TCP", "10.0.0.1", 7), IPv6Address("TCP", "::1", 8), UNIXAddress("/s"), None
        self.assertEqual([cause_of(one).address for one in addresses], ["10.0.0.1:7", "[::1]:8", "", ""])

    def test_secrets_stay_off_the_disk(self) -> None:
        """What waits on the disk has no passwords, tokens, cookies or signatures, unless they are to be handed on."""
        headers = {"Authorization": ["a"], "Cookie": ["b"], "Proxy-Authorization": ["c"], "X-Me": ["d"]}
        cause = Cause("PUT", "/files/a?key=k1&signature=abc&x=1", "", headers)
        kept = without_secrets(cause, ())
        self.assertEqual((kept.uri, kept.headers), ("/files/a?key=k1&signature=-&x=1", {"X-Me": ["d"]}))
        self.assertEqual(without_secrets(cause, ["cookie"]).headers, {"Cookie": ["b"], "X-Me": ["d"]})
        self.assertEqual(cause.headers["Authorization"], ["a"])


class ResponseTests(SynchronousTestCase):
    """What a hook says is understood as tusd does, or not at all."""

    def test_as_documented(self) -> None:
        """Each field of the documented example does something, if only that it can't be had."""
        said = response(RESPONSE.encode())
        body, headers = '{"message":"the upload is too big"}', {"Content-Type": "application/json"}
        self.assertEqual(said.answer, Answer(400, body, headers, {"my-custom-field": "..."}))
        self.assertTrue(said.rejects and said.stops and said.keeps)
        self.assertEqual(said.unfit, ("ChangeFileInfo.ID", "ChangeFileInfo.Storage"))

    def test_nothing_is_wanted(self) -> None:
        """An empty object, null, nulls, and fields that nobody knows change nothing."""
        for content in (
            b"{}", b"null", b'{"New": [1]}', b'{"HTTPResponse": null, "ChangeFileInfo": {"ID": "", "Storage": null}}',
            b'{"HTTPResponse": {"StatusCode": 0, "Body": "", "Header": null}}',
        ):  # fmt: skip
            said = response(content)
            self.assertEqual((said.answer.has_content, said.answer.metadata, said.unfit), (False, None, ()), content)
            self.assertFalse(said.rejects or said.stops or said.keeps or said.answer.headers, content)

    def test_names_in_any_case(self) -> None:
        """``rejectUpload`` is ``RejectUpload``, as for Go's decoder."""
        said = response(b'{"rejectUpload": true, "httpresponse": {"statuscode": 403, "BODY": "no"}}')
        self.assertEqual((said.rejects, said.answer.status, said.answer.body), (True, 403, "no"))

    def test_no_sense(self) -> None:
        """Whatever isn't what it should be is refused, and not guessed at."""
        for content in (
            b"", b"junk", b"[]", b'"x"', b'{"RejectUpload": 1}', b'{"RejectUpload": "true"}', b"\xff", b"[" * 100_000,
            b'{"HTTPResponse": []}', b'{"HTTPResponse": {"StatusCode": "400"}}',
            b'{"HTTPResponse": {"StatusCode": 99}}',
            b'{"HTTPResponse": {"StatusCode": true}}', b'{"HTTPResponse": {"StatusCode": 600}}',
            b'{"HTTPResponse": {"Header": {"a": ["b"]}}}', b'{"ChangeFileInfo": {"MetaData": {"a": 1}}}',
            b'{"HTTPResponse": {"Body": 5}}',
        ):  # fmt: skip
            self.assertRaises(ValueError, response, content)

    def test_framing_stays_ours(self) -> None:
        """A hook can't say where an answer ends."""
        answer = Answer(400, "no", {"Content-Length": "5", "transfer-encoding": "chunked", "X-Why": "because"})
        refused = answer.refusing(errors.HOOK_REJECTED)
        self.assertEqual(dict(refused.headers), {b"X-Why": b"because"})
        said = refused.refusal
        self.assertEqual((said.code, said.status, said.sentence), ("hook_rejected", 400, "no"))

    def test_the_later_answer_counts(self) -> None:
        """What ``pre-finish`` says comes on top of what ``pre-create`` has said."""
        both = Answer(201, "a", {"X": "1", "Y": "1"}).followed_by(Answer(0, "b", {"Y": "2"}))
        self.assertEqual(both, Answer(201, "b", {"X": "1", "Y": "2"}, None))

    def test_a_name_that_the_url_says(self) -> None:
        """Metadata may change, but not to another name than that of the URL."""
        rename_refused({"filename": "a", "more": "x"}, {"filename": "a", "path": "b/a"})
        refused = self.assertRaises(Refused, rename_refused, {"filename": "c"}, {"filename": "a"})
        self.assertEqual(refused.refusal.status, 500)
