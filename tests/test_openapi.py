"""What the service says of itself (``/openapi.json``), held against what it does, by us and by schemathesis."""

from __future__ import annotations

import ast
import http.client
import json
import re
import shutil
import socket
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from twisted.trial.unittest import SynchronousTestCase, TestCase

import lwstwisted
from lwstwisted import errors
from lwstwisted.errors import Refusal
from lwstwisted.uploads.openapi import describe
from lwstwisted.web.limits import DEFAULT_LIMITS, MAX_LENGTH, Limits
from tests.servers import PATIENCE, Server, script, serving, twistd

METHODS = {"get", "head", "put", "post", "patch", "delete", "options"}
PACKAGE = Path(lwstwisted.__file__).parent
REFUSALS = {value.code: value for value in vars(errors).values() if isinstance(value, Refusal)}

LARGEST = 1 << 61
"""Bytes of the largest upload here: more than a disk has, and less than a length can say."""

ELSEWHERE = {
    "body_too_slow": "tests/test_web_limits.py drips for as long as the rate is averaged over",
    "too_many_connections": "tests/test_web_limits.py",
    "other_file_system": "tests/test_stores_local.py, which needs a mount",
    "quota_exceeded": "tests/test_stores_space.py",
    "too_many_files": "tests/test_stores_local.py, where a system call fails",
    "store_failed": "tests/test_stores_local.py, where a system call fails",
    "internal": "nobody knows how",
    "not_ready": "tests/test_service.py, where a sync fails",
    "stopping": "tests/test_stores_local.py",
    **dict.fromkeys(
        (
            "wrong_host",
            "bad_credentials",
            "unauthorized",
            "wrong_credentials",
            "too_many_logins",
            "forbidden",
            "replace_forbidden",
            "foreign_parts",
            "bad_signature",
            "signature_expired",
            "signed_path",
            "signed_method",
            "signed_size",
            "signed_type",
        ),
        "tests/test_access_protocols.py, where there are rules",
    ),
    **dict.fromkeys(
        ("hook_rejected", "hook_stopped", "hook_kept", "hook_failed", "hook_unreachable", "hooks_behind"),
        "tests/test_hooks_service.py, where there are hooks",
    ),
}
"""Refusals that no request alone brings about."""

TELLING = ["hooks/telling.py", "hooks/events.py"]
ACCESS = [f"access/{name}.py" for name in ("admission", "credentials", "hosts", "signing", "slowdown", "visitor")]


def described(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The responses of each operation: of a method and a path."""
    return {
        (method.upper(), path): operation["responses"]
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    }


def codes_of(responses: dict[str, Any]) -> set[str]:
    """The refusals that are described among responses."""
    return {code for answer in responses.values() for code in re.findall(r"(?m)^- `(\w+)`: ", answer["description"])}


def mentioned(*modules: str) -> set[str]:
    """The refusals that the text of modules names."""
    names = {
        node.attr
        for module in modules
        for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "errors"
    }
    return {code for code, refusal in REFUSALS.items() if any(getattr(errors, n, None) is refusal for n in names)}


def is_of(refusal: Refusal, content: bytes) -> bool:
    """Whether a refusal has this content: a sentence, or a problem."""
    if not refusal.problem:
        return content == f"{refusal.sentence}\n".encode()
    return content.startswith(b"{") and json.loads(content).get("type") == refusal.problem


class DocumentTests(SynchronousTestCase):
    """The document, as a program reads it."""

    def setUp(self) -> None:
        self.document = describe("/files/", MAX_LENGTH, DEFAULT_LIMITS)

    def test_format(self) -> None:
        """It is OpenAPI 3.1, by the schema of that, and its parts are where its references say."""
        from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

        self.assertEqual([str(error) for error in OPENAPI_31_VALIDATOR.iter_errors(self.document)], [])
        for kind, name in re.findall(r'"#/components/(\w+)/(\w+)"', json.dumps(self.document)):
            self.assertIn(name, self.document["components"][kind])
        items = self.document["paths"].values()
        names = [item[method]["operationId"] for item in items for method in METHODS & item.keys()]
        self.assertEqual(sorted(names), sorted(set(names)))

    def test_every_refusal(self) -> None:
        """Whatever a client may be refused for is described, with its status and its sentence, and nothing else."""
        everything = [*described(self.document).values(), self.document["components"]["responses"]]
        found = set()
        for responses in everything:
            for status, answer in responses.items():
                for code, sentence in re.findall(r"(?m)^- `(\w+)`: (.*)$", answer["description"]):
                    self.assertEqual(sentence, REFUSALS[code].sentence)
                    self.assertTrue(status.endswith(str(REFUSALS[code].status)), (status, code))
                    found.add(code)
        self.assertEqual(found, set(REFUSALS))

    def test_every_refusal_of_an_upload(self) -> None:
        """What the modules name that an upload goes through is what PUT and POST are described with."""
        web = [f"web/{name}.py" for name in ("answers", "channel", "wire")]
        stores = [f"stores/{name}.py" for name in ("names", "space", "tree", "threads", "batch", "local")]
        shared = [f"uploads/{name}.py" for name in ("announced", "conditions", "digests", "origin", "transfer")]
        below = [*web, *stores, *shared, *ACCESS, *TELLING]
        # Known methods are understood, files that are looked for are not stored, and a channel parses forms for others.
        not_met = {"unknown_method", "not_found", "hook_kept"}
        resumed = {"content_range", "length_mismatch", "upload_overrun", "upload_taken"}
        self.assertEqual(resumed - mentioned("uploads/rufh.py", "uploads/session.py"), set())
        put = mentioned("uploads/put.py", *below) - not_met - {"bad_form"} | resumed
        named_by_field = {"bad_disposition", "form_in_parts"}
        post = mentioned("uploads/form.py", "uploads/parts.py", *below) - not_met | resumed | named_by_field
        operations = described(self.document)
        self.assertEqual(codes_of(operations["PUT", "/files/{path}"]), put)
        self.assertEqual(codes_of(operations["POST", "/files/"]), post)
        self.assertEqual(codes_of(operations["POST", "/files/{folder}/"]), post)

    def test_every_refusal_of_a_resumable_upload(self) -> None:
        """What the modules name that it goes through is what the paths of uploads are described with."""
        below = [f"web/{name}.py" for name in ("answers", "channel", "wire")]
        stores = ("names", "space", "tree", "threads", "placing", "record", "resumable")
        below += [f"stores/{name}.py" for name in stores]
        shared = ("announced", "conditions", "digests", "origin", "cors", "transfer", "session", "resumable")
        below += [*(f"uploads/{name}.py" for name in (*shared, "tus", "rufh")), *ACCESS, *TELLING]
        operations = described(self.document)
        found = [codes_of(answers) for (_, path), answers in operations.items() if path.startswith("/uploads/")]
        not_met = {"unknown_method", "method_not_allowed", "not_found", "bad_form"}
        self.assertEqual(set().union(*found), mentioned(*below) - not_met)

    def test_limits(self) -> None:
        """The numbers are those of this service."""
        limits = Limits(line_bytes=9001, header_lines=77, head_bytes=33001, trailer_bytes=501, body_rate=303)
        prose = describe("/there/", 12345, limits)["info"]["description"]
        for number in ("12345", "9001", "77", "33001", "501", "303"):
            self.assertRegex(prose, rf"\b{number}\b")
        self.assertIn("/there/{path}", describe("/there/", 12345, limits)["paths"])
        self.assertIn("- A file: no limit.", self.document["info"]["description"])


class Answers:
    """Answers of a service, each held against what is described.

    :ivar codes: refusals so far.
    :ivar statuses: of each operation so far.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.codes: set[str] = set()
        self.statuses: set[tuple[str, str, str]] = set()
        answer = self.send(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "GET")
        self.published = answer[1], answer[2]
        self.document = json.loads(answer[2])

    def send(self, request: bytes, method: str) -> tuple[int, http.client.HTTPMessage, bytes]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as client:
            client.sendall(request)
            answer = http.client.HTTPResponse(client, method=method)
            answer.begin()
            return answer.status, answer.msg, answer.read()

    def ask(
        self,
        method: str,
        path: str,
        target: str,
        *fields: str,
        body: bytes = b"",
        host: str = "x",
        version: str = "1.1",
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Send a request, and see whether its answer is one of those that are described.

        :param path: as the document has it.
        :param target: what is asked for.
        """
        lines = [f"{method} {target} HTTP/{version}", f"Host: {host}", "Connection: close", *fields, "", ""]
        status, headers, content = self.send("\r\n".join(lines).encode("latin-1") + body, method)
        responses = described(self.document)[method, path]
        where = f"{method} {target[:40]} {fields}: {status} {content[:200]!r}"
        assert str(status) in responses, where
        answer = responses[str(status)]
        self.statuses.add((method, path, str(status)))
        for name, field in answer.get("headers", {}).items():
            value = headers[name]
            assert value is not None or not field.get("required"), f"{where}: no {name}"
            if value is not None and name != "X-Content-Type-Options":
                assert jsonschema_rs.is_valid(field["schema"], value), f"{where}: {name}: {value}"
        kinds = answer.get("content", {})
        if kinds:
            kind = headers.get_content_type()
            assert kind in kinds or "*/*" in kinds, f"{where}: {kind}"
            schema = kinds.get(kind, {}).get("schema")
            if schema is not None:
                schema = {**schema, "components": self.document["components"]}  # where its references point
                value = json.loads(content) if kind.endswith("json") else content.decode()
                assert jsonschema_rs.is_valid(schema, value), where
            self.codes |= {code for code, refusal in REFUSALS.items() if is_of(refusal, content)}
        else:
            assert content == b"", where
        return status, headers, content


class ServiceTestCase(TestCase):
    """With a folder for services."""

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.addCleanup(shutil.rmtree, self.folder)
        self.root = self.folder / "root"
        self.log = self.folder / "log"

    def serve(self, *options: str) -> Server:
        command = twistd(
            *("--root", self.root, "--durability", "none", "--listen", "tcp:0:interface=127.0.0.1"),
            *("--access-log", self.log, "--access-log-format", "json", *options),
        )
        running = serving(command, cwd=self.folder)
        self.addCleanup(running.__exit__, None, None, None)
        return running.__enter__()


class AnswerTests(ServiceTestCase):
    """What is described happens, and what happens is described."""

    @pytest.mark.slow  # it waits for two limits of a second each
    def test_every_answer(self) -> None:
        """Each kind of answer was seen, in the form that is described for it."""
        limits = ("--limit", "head-time=1", "--limit", "body-time=1")
        answers = Answers(self.serve("--max-size", str(LARGEST), *limits).wait_for_ports()[0])
        ask, file, root, folder = answers.ask, "/files/{path}", "/files/", "/files/{folder}/"

        def refused(refusal: Refusal, *request: str, **more: Any) -> None:
            status, _, content = ask(*request, **more)
            self.assertEqual((status, is_of(refusal, content)), (refusal.status, True), (request, content))

        # What works
        example = answers.document["paths"][file]["put"]
        body = example["requestBody"]["content"]["application/octet-stream"]["example"].encode()
        length = f"Content-Length: {len(body)}"
        parameters = answers.document["components"]["parameters"]
        given = [parameters[one["$ref"].rpartition("/")[2]] for one in example["parameters"]]
        integrity = [f"{field['name']}: {field['example']}" for field in given if "example" in field]
        self.assertEqual(len(integrity), 3)
        put = ask("PUT", file, "/files/x", length, *integrity, body=body)
        self.assertEqual((put[0], put[1]["Location"]), (201, "/files/x"))
        self.assertEqual(ask("PUT", file, "/files/x", length, *integrity, body=body)[0], 204)
        etag = ask("GET", file, "/files/x")[1]["ETag"]
        self.assertIsNotNone(ask("GET", file, "/files/x", "Want-Repr-Digest: sha-256=1")[1]["Repr-Digest"])
        for method in ("GET", "HEAD"):
            ask(method, file, "/files/x")
            ask(method, file, "/files/x", f"If-None-Match: {etag}")
        ask("GET", file, "/files/x", "Range: bytes=0-1")
        ask("GET", file, "/files/x", "Range: bytes=0-0,2-2")
        ask("GET", file, "/files/x", "Range: bytes=99-")
        form = b'--b\r\nContent-Disposition: form-data; name="f"; filename="%b"\r\n\r\n%b\r\n--b--\r\n'
        kind = "Content-Type: multipart/form-data; boundary=b"

        def posted(template: str, target: str, content: bytes, *fields: str) -> tuple[str, ...]:
            return "POST", template, target, kind, f"Content-Length: {len(content)}", *fields

        whole = form % (b"y", b"content")
        for accept in ("text/html", "application/json"):
            for template, target in ((root, "/files/"), (folder, "/files/folder/")):
                self.assertEqual(ask(*posted(template, target, whole, f"Accept: {accept}"), body=whole)[0], 201)
                for method in ("GET", "HEAD"):
                    self.assertEqual(ask(method, template, target, f"Accept: {accept}")[0], 200)
        ask("GET", file, "/files/folder")
        self.assertEqual(ask("GET", "/", "/")[1]["Location"], "/files/")
        for path, target in (
            (file, "/files/x"),
            (root, root),
            (folder, "/files/folder/"),
            ("/", "/"),
            ("/openapi.json", "/openapi.json"),
            ("/healthz", "/healthz"),
            ("/readyz", "/readyz"),
        ):
            self.assertEqual(ask("OPTIONS", path, target)[0], 204)
            ask("GET", path, target)
            ask("HEAD", path, target)
        ask("DELETE", file, "/files/y")

        # What a head may be refused for
        get = ("GET", file, "/files/x")
        refused(errors.BAD_REQUEST_LINE, "GET", file, "/files/x y")
        refused(errors.BAD_BYTES, *get, "X: \x01")
        refused(errors.BAD_HEADER, *get, "no colon")
        refused(errors.BAD_HOST, *get, host="a b")
        refused(errors.BAD_LENGTH, *get, "Content-Length: -1")
        refused(errors.LENGTH_AND_CODING, *get, "Content-Length: 1", "Transfer-Encoding: chunked")
        refused(errors.BAD_CODING, *get, "Transfer-Encoding: gzip")
        refused(errors.TARGET_TOO_LONG, "GET", file, "/files/" + "x" * 9000)
        refused(errors.HEAD_TOO_LARGE, *get, "X: " + "x" * 9000)
        refused(errors.UNKNOWN_EXPECTATION, *get, "Expect: more")
        refused(errors.BAD_VERSION, *get, version="2.0")
        refused(errors.BODY_TOO_LARGE, *get, f"Content-Length: {MAX_LENGTH + 1}")
        late = answers.send(b"GET /files/x HTTP/1.1\r\n", "GET")
        self.assertEqual(late[2], errors.HEAD_TIMEOUT.sentence.encode() + b"\n")
        self.assertIn("head_timeout", codes_of(described(answers.document)["GET", file]))
        answers.codes.add("head_timeout")

        # A name
        for refusal, target in (
            (errors.NAME_EMPTY, "a//b"),
            (errors.NAME_DOTS, "a/../b"),
            (errors.NAME_ENCODING, "a%2Fb"),
            (errors.NAME_CONTROL, "a%00b"),
            (errors.NAME_TOO_LONG, "x" * 256),
            (errors.NAME_RESERVED, ".lwstwisted"),
        ):
            for request in (("GET",), ("DELETE",), ("PUT", length)):
                refused(refusal, request[0], file, f"/files/{target}", *request[1:], body=body)
            content = form % (target.encode(), b"")
            where = f"/files/{target}/"
            refused(refusal, *posted(folder, where, content), body=content)
        # What is there
        (self.root / "link").symlink_to("x")
        refused(errors.NOT_FOUND, "GET", file, "/files/missing")
        refused(errors.NOT_A_FILE, "GET", file, "/files/link")
        refused(errors.NOT_A_FOLDER, "GET", folder, "/files/x/")
        refused(errors.IS_FOLDER, "DELETE", file, "/files/folder")
        refused(errors.NOT_A_FOLDER, "PUT", file, "/files/x/y", length, body=body)
        # An upload
        store = ("PUT", file, "/files/new")
        for refusal, fields in (
            (errors.LENGTH_REQUIRED, []),
            (errors.CONTENT_ENCODING, [length, "Content-Encoding: gzip"]),
            (errors.CONTENT_RANGE, [length, "Content-Range: bytes 0-5/6"]),
            (errors.CROSS_ORIGIN, [length, "Origin: http://elsewhere"]),
            (errors.PRECONDITION_FAILED, [length, "If-Match: *"]),
            (errors.BAD_CONDITION, [length, "If-Match: x"]),
            (errors.BAD_DIGEST, [length, "Content-MD5: x"]),
            (errors.DIGEST_MISMATCH, [length, "Content-MD5: AAAAAAAAAAAAAAAAAAAAAA=="]),
            (errors.BODY_TOO_LARGE, [f"Content-Length: {LARGEST + 1}"]),
            (errors.DISK_FULL, [f"Content-Length: {LARGEST}"]),
            (errors.BODY_TIMEOUT, ["Content-Length: 100"]),
        ):
            refused(refusal, *store, *fields, body=body)
        refused(errors.BAD_CHUNK, *store, "Transfer-Encoding: chunked", body=b"x\r\n")
        trailers = b"0\r\nX: " + b"x" * 9000 + b"\r\n\r\n"
        refused(errors.TRAILERS_TOO_LARGE, *store, "Transfer-Encoding: chunked", body=trailers)
        # A form
        refused(errors.NOT_A_FORM, "POST", root, root, length, body=body)
        refused(errors.BAD_BOUNDARY, "POST", root, root, "Content-Type: multipart/form-data", length, body=body)
        for refusal, content in (
            (errors.BAD_FORM, b"--b\r\nno colon\r\n\r\n--b--\r\n"),
            (errors.FORM_CUT, whole[:-4]),
            (errors.FORM_TOO_LARGE, b"x" * 70_000),
            (errors.FORM_WITHOUT_FILE, b'--b\r\nContent-Disposition: form-data; name="f"\r\n\r\nx\r\n--b--\r\n'),
            (errors.FORM_NAME_TWICE, whole.replace(b"--b--\r\n", b"") + whole),
            (errors.PART_ENCODING, whole.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n", 1)),
        ):
            refused(refusal, *posted(root, root, content), body=content)
        with socket.create_connection(("127.0.0.1", answers.port), timeout=PATIENCE) as client:
            client.sendall(b"PUT /files/new HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
            client.shutdown(socket.SHUT_WR)
            self.assertIn(errors.BODY_SHORT.sentence.encode(), client.recv(65536))
            answers.codes.add("body_short")

        self.resumable(answers, refused)

        operations = described(answers.document)
        every = set().union(*(codes_of(responses) for responses in operations.values()))
        self.assertEqual(every - answers.codes, set(ELSEWHERE))
        good = {(*key, status) for key, responses in operations.items() for status in responses if status < "400"}
        self.assertEqual(good - answers.statuses, set())

    def resumable(self, answers: Answers, refused: Any) -> None:
        """Uploads of both protocols: what works, and what doesn't."""
        ask, begin, one = answers.ask, ("POST", "/uploads/", "/uploads/"), "/uploads/{id}"
        tus, kind = "Tus-Resumable: 1.0.0", "Content-Type: application/offset+octet-stream"
        self.assertEqual(ask("OPTIONS", "/uploads/", "/uploads/")[0], 200)

        def begun(*fields: str, body: bytes = b"") -> str:
            status, headers, _ = ask(*begin, *fields, f"Content-Length: {len(body)}", body=body)
            self.assertEqual(status, 201)
            return str(headers["Location"])

        path = begun(tus, "Upload-Length: 6", "Upload-Metadata: filename aGVsbG8=")
        self.assertEqual(ask("OPTIONS", one, path)[0], 200)
        append = ("PATCH", one, path, tus, kind, "Upload-Offset: 0")
        body, length = b"hello\n", "Content-Length: 6"
        for refusal, request, content in (
            (errors.OFFSET_MISMATCH, (*append[:-1], "Upload-Offset: 1", length), body),
            (errors.NOT_A_PART, ("PATCH", one, path, tus, "Upload-Offset: 0", length), body),
            (errors.BAD_UPLOAD_FIELD, (*append[:-1], length), body),
            (errors.BAD_CHECKSUM, (*append, length, "Upload-Checksum: x"), body),
            (errors.CHECKSUM_MISMATCH, (*append, length, "Upload-Checksum: md5 AAAA"), body),
            (errors.UPLOAD_OVERRUN, (*append, "Content-Length: 7"), body + b"x"),
            (errors.LENGTH_MISMATCH, (*append, length, "Upload-Length: 7"), body),
            (errors.TUS_VERSION, ("HEAD", one, path, "Tus-Resumable: 2"), b""),
            (errors.TUS_VERSION, ("DELETE", one, path, "Tus-Resumable: 2"), b""),
            (errors.UPLOAD_NOT_FOUND, ("GET", one, "/uploads/" + "0" * 32), b""),
            (errors.BAD_METADATA, (*begin, tus, "Upload-Length: 1", "Upload-Metadata: ,"), b""),
            (errors.BAD_PARTS, (*begin, tus, f"Upload-Concat: final;{path}"), b""),
            (errors.NOT_AN_UPLOAD, begin, b""),
            (errors.FORM_IN_PARTS, (*begin, "Upload-Complete: ?1", "Content-Type: multipart/form-data"), b""),
            (errors.BAD_DISPOSITION, (*begin, "Upload-Complete: ?0", "Content-Disposition: /"), b""),
        ):
            if request[0] == "HEAD":
                self.assertEqual(ask(*request)[0], refusal.status)
            else:
                refused(refusal, *request, body=content)
        part = begun(tus, "Upload-Length: 6", "Upload-Concat: partial")
        final = begun(tus, f"Upload-Concat: final;{part}")
        refused(errors.CONCATENATED, "PATCH", one, final, tus, kind, "Upload-Offset: 0", length, body=body)
        with socket.create_connection(("127.0.0.1", answers.port), timeout=PATIENCE) as client:
            lines = [f"PATCH {path} HTTP/1.1", "Host: x", *append[3:], length, "Expect: 100-continue", "", ""]
            client.sendall("\r\n".join(lines).encode())
            self.assertTrue(client.recv(65536).startswith(b"HTTP/1.1 100 "))
            for method in ("HEAD", "GET"):
                self.assertEqual([ask(method, one, path, *said)[0] for said in ((), (tus,))], [204, 200])
            self.assertIn(errors.UPLOAD_TAKEN.sentence.encode(), client.recv(65536))
            answers.codes.add("upload_taken")
        self.assertEqual(ask(*append, length, body=body)[0], 204)
        refused(errors.UPLOAD_FINISHED, *append[:-1], "Upload-Offset: 6", "Content-Length: 1", body=b"x")
        self.assertEqual(ask("DELETE", one, path)[0], 204)

        named = "Content-Disposition: attachment; filename=ietf"
        self.assertEqual(ask(*begin, "Upload-Complete: ?1", named, length, body=body)[0], 201)
        self.assertEqual(ask(*begin, "Upload-Complete: ?1", named, length, body=body)[0], 204)
        path = begun("Upload-Complete: ?0", "Content-Disposition: attachment; filename=more", body=b"hel")
        rest = ("Upload-Offset: 3", "Upload-Complete: ?1", "Content-Length: 3")
        kind = "Content-Type: application/partial-upload"
        self.assertEqual(ask("PATCH", one, path, kind, *rest, body=b"lo\n")[0], 201)

    def test_other_methods(self) -> None:
        """What a resource can't do is 405, with what it can; a method that nobody knows is 501."""
        answers = Answers(self.serve().wait_for_ports()[0])
        responses = answers.document["components"]["responses"]
        for method, target in (
            ("PATCH", "/files/x"),
            ("POST", "/files/x"),
            ("PUT", "/openapi.json"),
            ("DELETE", "/"),
            ("NONSENSE", "/"),
        ):
            request = f"{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
            status, headers, content = answers.send(request, method)
            schema = responses[f"OtherMethod{status}"]["content"]["text/plain"]["schema"]
            self.assertIn(content.decode(), schema["enum"])
            self.assertEqual(status, 501 if method == "NONSENSE" else 405)
            self.assertEqual(headers["Allow"] is None, method == "NONSENSE")

    def test_published(self) -> None:
        """It is sent as JSON that no browser takes for anything else, and tells the size that the service was given."""
        headers, content = Answers(self.serve("--max-size", "54321").wait_for_ports()[0]).published
        self.assertEqual(headers["Content-Type"], "application/json")
        self.assertEqual(headers["X-Content-Type-Options"], "nosniff")
        self.assertEqual(headers["Content-Length"], str(len(content)))
        self.assertEqual(json.loads(content), describe("/files/", 54321, DEFAULT_LIMITS))

    def test_methods_of_a_folder(self) -> None:
        """A folder offers what it is described with, and nothing else."""
        answers = Answers(self.serve().wait_for_ports()[0])
        allowed = {method for method, path in described(answers.document) if path == "/files/"}
        offered = answers.ask("OPTIONS", "/files/", "/files/")[1]["Allow"].split(", ")
        self.assertEqual(set(offered), allowed)
        answer = answers.send(b"PUT /files/ HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", "PUT")
        self.assertEqual((answer[0], answer[1]["Allow"]), (405, ", ".join(offered)))


    def test_ranges(self) -> None:
        """A suffix longer than the file is the file, and ranges behind its end are none."""
        answers = Answers(self.serve().wait_for_ports()[0])
        answers.ask("PUT", "/files/{path}", "/files/x", "Content-Length: 3", body=b"abc")
        for value, status, content in (
            ("-4", 206, b"abc"),
            ("-2,90-", 206, b"bc"),
            ("90-,91-", 416, b""),
            ("-0,-0", 416, b""),
        ):
            answer = answers.ask("GET", "/files/{path}", "/files/x", f"Range: bytes={value}")
            self.assertEqual((answer[0], answer[2]), (status, content), value)


    def test_bad_condition_of_a_folder(self) -> None:
        """A condition that can't be read is refused, be it a file or a folder that has the name."""
        answers = Answers(self.serve().wait_for_ports()[0])
        answers.ask("PUT", "/files/{path}", "/files/folder/x", "Content-Length: 0")
        for name in ("folder", "folder/x"):
            self.assertEqual(answers.ask("GET", "/files/{path}", f"/files/{name}", "If-Match: x")[0], 400)



HOOKS = """
import schemathesis

schemathesis.serializer.alias(
    ["application/offset+octet-stream", "application/partial-upload"], "application/octet-stream"
)
"""
"""Both media types are any bytes."""

SETTINGS = """
hooks = "media_types"

[checks.positive_data_acceptance]
# What fits the description may still miss what is there: no such file, a folder, other conditions, no such range.
expected-statuses = ["2xx", "302", "304", "404", "409", "412", "416"]

[checks.negative_data_rejection]
# A condition may fail before the rest is looked at; a server error is no answer to bad data.
expected-statuses = ["400", "404", "405", "409", "411", "412", "415", "431"]

[[operations]]
# A digest that was drawn is not that of the body which was drawn beside it (digest_mismatch, bad_digest).
include-operation-id = "putFile"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "409", "412"]

[[operations]]
# Which fields have to be there depends on others, and a media type on the protocol.
include-operation-id-regex = "^(post|patch)Uploads?$"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "404", "409", "412", "413", "415", "460"]

[[operations]]
# Another version of tus is refused (412) whatever the method is.
include-path-regex = "^/uploads/"
[operations.checks.unsupported_method]
enabled = false

[[operations]]
# Its answer is what could be done under a name, whether or not a file has it.
include-method = "OPTIONS"
[operations.checks.use_after_free]
enabled = false
"""

NOT_CHECKED = "ignored_auth,object_level_authorization"
"""The service has no users of its own: who may do what is for the server in front of it."""

EXAMPLES = 20
"""Drawn for each operation and phase. With all that is systematic it makes about 800 requests in 10 seconds."""


class SchemathesisTests(ServiceTestCase):
    """A program that reads the description tries to prove it wrong."""

    @pytest.mark.slow
    def test_finds_nothing(self) -> None:
        """In all phases, with every check that there is something to check for."""
        settings = self.folder / "schemathesis.toml"
        settings.write_text(SETTINGS, encoding="utf-8")
        (self.folder / "media_types.py").write_text(HOOKS, encoding="utf-8")
        server = self.serve("--max-size", "100K")
        port = server.wait_for_ports()[0]
        options = ["--exclude-checks", NOT_CHECKED, "--max-examples", str(EXAMPLES), "--seed", "1", "--no-color"]
        # JSON is the form of a listing that has a schema. A redirect is an answer, not a way to another operation.
        options += ["--header", "Accept: application/json", "--max-redirects", "0", "--generation-database", "none"]
        command = [script("schemathesis"), "--config-file", str(settings), "run"]
        done = subprocess.run(
            [*command, f"http://127.0.0.1:{port}/openapi.json", *options],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10 * PATIENCE,
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertRegex(done.stdout, r"31 selected / 31 total")
        # What it did is seen here and not believed: every operation was called, and the good answers were among them.
        seen = Counter(self.operation_of(line) for line in self.log.read_text(encoding="utf-8").splitlines())
        operations = described(Answers(port).document)
        asked = Counter[tuple[str, str]]()
        for (method, path, _), count in seen.items():
            asked[method, path] += count
        # There are few ways to call one that takes nothing.
        self.assertEqual({key for key in operations if asked[key] < (EXAMPLES if "{" in key[1] else 1)}, set())
        for expected in (
            ("PUT", "/files/{path}", 201),
            ("PUT", "/files/{path}", 400),
            ("GET", "/files/{path}", 200),
            ("DELETE", "/files/{path}", 204),
            ("POST", "/files/", 201),
            ("POST", "/files/{folder}/", 201),
            ("GET", "/files/{folder}/", 200),
            ("PATCH", "/files/{path}", 405),
        ):
            self.assertGreater(seen[expected], 0, expected)


    def operation_of(self, line: str) -> tuple[str, str, int]:
        """Method, path as the document has it, and status of a line of the access log."""
        entry = json.loads(line)
        path = entry["target"].partition("?")[0]
        if re.fullmatch(r"/uploads/[^/]+", path):
            path = "/uploads/{id}"
        elif match := re.fullmatch(r"/files/[^/]+(/?)", path):
            path = "/files/{folder}/" if match[1] else "/files/{path}"
        return entry["method"], path, entry["status"]
