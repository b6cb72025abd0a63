"""The service described by itself: an OpenAPI 3.1 document.

What can be counted or listed comes from the constants that the code obeys: limits, names, digests, and all refusals
with their status and sentence (``errors.py``). What a client may rely on is written down; what it may not is left out.

Three things the format has no words for, so prose says them: a path has any number of segments, a digest belongs to
the body that is sent with it, and any request may meet a refusal of HTTP's framing.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Iterable
from typing import Any

from twisted.web.http import NO_CONTENT, OK, PARTIAL_CONTENT, REQUESTED_RANGE_NOT_SATISFIABLE

from lwstwisted import __version__, errors
from lwstwisted.errors import Refusal
from lwstwisted.stores.names import PATH_LIMIT, SEGMENT_LIMIT, STATE_FOLDER
from lwstwisted.uploads.digests import ALGORITHMS
from lwstwisted.uploads.form import FIELD_BYTES
from lwstwisted.uploads.parts import BOUNDARY_LENGTH, HEADER_LINES, PARTS
from lwstwisted.uploads.refusable import (
    APPEND,
    CANCEL,
    CONDITIONS,
    CREATE,
    DELETE,
    FORM,
    HEAD,
    LOOK,
    OTHER_METHODS,
    PUT,
    READ,
)
from lwstwisted.uploads.rufh import PART_TYPE
from lwstwisted.uploads.tus import ALGORITHMS as CHECKSUMS
from lwstwisted.uploads.tus import CONTENT_TYPE as TUS_TYPE
from lwstwisted.uploads.tus import METADATA_BYTES
from lwstwisted.web.limits import MAX_LENGTH, Limits
from lwstwisted.web.plain import ReadOnly, send_content

Json = dict[str, Any]

# Fields of requests. Only what is refused where it is malformed has a pattern; what is ignored then has none.

_CONTROL = "\\u0000-\\u001f\\u007f-\\u009f\\u2028\\u2029"
_RESERVED = "".join(f"[{sign}{sign.upper()}]" if sign.isalpha() else f"\\{sign}" for sign in STATE_FOLDER)
_SEGMENT = f"^(?!\\.{{1,2}}(?:;|$))(?!{_RESERVED}$)(?![^%]*(?:%[^%]*)*%[0-9A-Fa-f]{{2}})[^/\\\\{_CONTROL}]+$"
# A quoted name that ends with a backslash has no end.
_FIELD_NAME = "^[^\\u0000-\\u0008\\u000a-\\u001f\\u007f]*(?<!\\\\)(?:\\\\\\\\)*$"
_TAG = '(?:W/)?"[!#-~\\u0080-\\u00ff]*"'
_TAGS = f"^(?:\\*|(?:[ \\t]*{_TAG}[ \\t]*,)*(?:[ \\t]*{_TAG}[ \\t]*)?)$"


_IDENTITY = f"^{''.join(f'[{sign}{sign.upper()}]' for sign in 'identity')}$"


def _name(name: str, what: str) -> Json:
    """A segment of a path."""
    schema = {"type": "string", "minLength": 1, "maxLength": SEGMENT_LIMIT, "pattern": _SEGMENT}
    return {"name": name, "in": "path", "required": True, "description": what, "schema": schema}


def _field(name: str, what: str, example: str | None = None, **schema: Any) -> Json:
    """A field of a request."""
    field = {"name": name, "in": "header", "description": what, "schema": {"type": "string", **schema}}
    return field if example is None else field | {"example": example}


def _digest_of(example: bytes, algorithm: str) -> str:
    return b64encode(hashlib.new(algorithm, example, usedforsecurity=False).digest()).decode()


_DIGEST = f"Refused unless the body hashes to it: {' or '.join(ALGORITHMS)}; other algorithms are ignored (RFC 9530)."
_EXAMPLE = b"hello\n"
_EXAMPLE_DIGEST = ", ".join(f"{name}=:{_digest_of(_EXAMPLE, known)}:" for name, known in ALGORITHMS.items())
_FIELDS = {
    "IfMatch": _field("If-Match", "Entity-tags, one of which the file must have.", pattern=_TAGS),
    "IfNoneMatch": _field("If-None-Match", "Entity-tags that the file must not have; `*`: any.", pattern=_TAGS),
    "IfModifiedSince": _field("If-Modified-Since", "Ignored beside If-None-Match, and if it is no date."),
    "IfUnmodifiedSince": _field("If-Unmodified-Since", "Ignored beside If-Match, and if it is no date."),
    "Range": _field("Range", "`bytes=` and ranges; anything else is ignored."),
    "IfRange": _field("If-Range", "The entity-tag with which the range makes sense; else the whole file is sent."),
    "WantReprDigest": _field("Want-Repr-Digest", f"Preferences among {', '.join(ALGORITHMS)} (RFC 9530)."),
    "ContentDigest": _field("Content-Digest", _DIGEST, _EXAMPLE_DIGEST),
    "ReprDigest": _field("Repr-Digest", _DIGEST + " It is kept with the file.", _EXAMPLE_DIGEST),
    "ContentMD5": _field(
        "Content-MD5",
        "MD5 of the body in Base64 (RFC 1864), obsolete.",
        _digest_of(_EXAMPLE, "md5"),
        pattern="^[0-9A-Za-z+/]{21}[AQgw]==$",
    ),
    "UploadComplete": _field("Upload-Complete", "`?1` or `?0`: whether all of the file ends with this content."),
    "UploadLength": _field("Upload-Length", "Bytes of the whole file.", pattern="^[0-9]{1,15}$"),
    "UploadOffset": _field("Upload-Offset", "Bytes that are there already.", pattern="^[0-9]{1,15}$"),
    "TusResumable": _field("Tus-Resumable", "Says that a request is one of tus, and which.", pattern="^1\\.0\\.0$"),
    "UploadDeferLength": _field("Upload-Defer-Length", "tus: the length will be told later.", pattern="^1$"),
    "UploadMetadata": _field(
        "Upload-Metadata",
        "tus: keys with values in Base64. `filename`, or else `name`, is the name of the file in the root folder.",
        f"filename {b64encode(b'hello.txt').decode()}",
        maxLength=METADATA_BYTES,
    ),
    "UploadConcat": _field("Upload-Concat", "tus: `partial`, or `final;` and the URLs of the parts."),
    "UploadChecksum": _field(
        "Upload-Checksum",
        f"tus: what the content hashes to, in Base64: {', '.join(CHECKSUMS)}. It may be a trailer.",
        f"sha1 {_digest_of(_EXAMPLE, 'sha1')}",
    ),
    "ContentDisposition": _field("Content-Disposition", "IETF: its `filename` is the name of the file (RFC 6266)."),
    "ContentEncoding": _field("Content-Encoding", "`identity`: files are stored as they are.", pattern=_IDENTITY),
}

# Fields of responses.

_NO_SNIFFING = {"X-Content-Type-Options": {"required": True, "schema": {"const": "nosniff"}}}
_ETAG = {
    "description": "A strong entity-tag: another one after each change.",
    "schema": {"type": "string", "pattern": '^"[!#-~]+"$'},
}
_REPR_DIGEST = {"description": "As wanted, where a digest was kept.", "schema": {"type": "string"}}
_LOCATION = {"required": True, "schema": {"type": "string", "format": "uri-reference"}}
_ALLOW = {"required": True, "schema": {"type": "string"}}
_POLICY = {"description": "Under which no script runs.", "schema": {"type": "string"}}
_TEXT: Json = {"schema": {"type": "string"}}
_NUMBER: Json = {"schema": {"type": "string", "pattern": "^[0-9]+$"}}
_UPLOAD_HEADERS = {
    "Tus-Resumable": {"schema": {"const": "1.0.0"}},
    "Upload-Offset": _NUMBER,
    "Upload-Length": _NUMBER,
    "Upload-Expires": _TEXT,
    "Upload-Complete": {"schema": {"enum": ["?0", "?1"]}},
    "Upload-Limit": _TEXT,
    "Content-Location": {"description": "The file that the upload has become.", "schema": _LOCATION["schema"]},
    "ETag": _ETAG,
}
_FILE_HEADERS = {
    **_NO_SNIFFING,
    "ETag": {"required": True, **_ETAG},
    "Repr-Digest": _REPR_DIGEST,
    "Last-Modified": {"schema": {"type": "string"}},
    "Accept-Ranges": {"schema": {"const": "bytes"}},
    "Content-Disposition": {"schema": {"type": "string", "pattern": "^attachment; "}},
    "Content-Security-Policy": _POLICY,
}

_COUNT = {"type": "integer", "minimum": 0}
_SCHEMAS = {
    "Listing": {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["name", "type", "size", "modified"],
            "additionalProperties": False,
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "type": {"enum": ["file", "folder"]},
                "size": {**_COUNT, "description": "Bytes; 0 for a folder."},
                "modified": {"type": "number", "description": "Seconds since 1970."},
            },
        },
    },
    "Stored": {
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "required": ["name", "path", "size", "etag", "created"],
            "additionalProperties": False,
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "path": {"type": "string", "format": "uri-reference"},
                "size": _COUNT,
                "etag": _ETAG["schema"],
                "created": {"type": "boolean", "description": "False if it replaced another file."},
            },
        },
    },
    "Form": {
        "type": "object",
        "description": "Each part with a file name is a file; its field may have any name. Other parts are ignored.",
        "required": ["file"],
        "properties": {"file": {"type": "string", "format": "binary"}},
        "propertyNames": {"pattern": _FIELD_NAME},
    },
}


def _ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


def _fields(*names: str) -> list[Json]:
    return [_ref("parameters", name) for name in names]


def _refused(refusals: Iterable[Refusal], has_content: bool = True) -> Json:
    """Responses by status: each says which refusals it may be, and has one of their sentences as its content."""
    by_status: dict[int, dict[str, Refusal]] = {}
    for refusal in refusals:
        by_status.setdefault(refusal.status, {})[refusal.code] = refusal
    found: Json = {}
    for status, refused in sorted(by_status.items()):
        response: Json = {
            "description": "\n".join(f"- `{code}`: {one.sentence}" for code, one in refused.items()),
            "headers": _NO_SNIFFING,
        }
        if has_content:
            response["content"] = _content_of(refused.values())
        found[str(status)] = response
    return found


def _content_of(refusals: Iterable[Refusal]) -> Json:
    """A sentence as plain text, or a problem (RFC 9457)."""
    plain = [f"{refusal.sentence}\n" for refusal in refusals if not refusal.problem]
    problems = [
        {
            "type": "object",
            "required": ["type", "title", "status"],
            "properties": {
                "type": {"const": refusal.problem},
                "title": {"const": refusal.sentence},
                "status": {"const": refusal.status},
            },
        }
        for refusal in refusals
        if refusal.problem
    ]
    return {
        **({"text/plain": {"schema": {"enum": plain}}} if plain else {}),
        **({"application/problem+json": {"schema": {"oneOf": problems}}} if problems else {}),
    }


def _operation(
    name: str,
    summary: str,
    responses: Json,
    refusals: Iterable[Refusal],
    fields: Iterable[str] = (),
    **more: Any,
) -> Json:
    refused = _refused(refusals, has_content=not name.startswith("head"))
    operation = {"operationId": name, "summary": summary, **more, "responses": responses | refused}
    return operation | ({"parameters": _fields(*fields)} if fields else {})


_OF_RANGES = (str(PARTIAL_CONTENT), str(REQUESTED_RANGE_NOT_SATISFIABLE))


def _both(name: str, summary: str, responses: Json, refusals: Iterable[Refusal], fields: Iterable[str] = ()) -> Json:
    """GET, and HEAD: the same without content, and without ranges (RFC 9110 section 14.2)."""
    bare = {
        status: {key: value for key, value in answer.items() if key != "content"}
        for status, answer in responses.items()
        if status not in _OF_RANGES
    }
    return {
        "get": _operation(f"get{name}", summary, responses, refusals, fields),
        "head": _operation(f"head{name}", f"{summary} Only the head of the answer.", bare, refusals, fields),
    }


def _options(name: str, *parameters: Json) -> Json:
    answer = {str(NO_CONTENT): {"description": "The methods.", "headers": {"Allow": _ALLOW}}}
    operation = _operation(f"options{name}", "Which methods there are, be the name good or not.", answer, HEAD)
    if parameters:
        operation["parameters"] = [{**one, "schema": {"type": "string", "minLength": 1}} for one in parameters]
    return {"options": operation}


_PAGE: Json = {"text/html": {}}


def _folder(which: str, what: str, *parameters: Json) -> Json:
    """The methods of a path that ends with a slash."""
    listing = {
        "description": "What is in the folder, sorted by name. JSON for who accepts `application/json`.",
        "headers": _NO_SNIFFING,
        "content": {"application/json": {"schema": _ref("schemas", "Listing")}, **_PAGE},
    }
    stored = {
        "description": "All files of the form are stored.",
        "headers": _NO_SNIFFING,
        "content": {"application/json": {"schema": _ref("schemas", "Stored")}, **_PAGE},
    }
    form = {"required": True, "content": {"multipart/form-data": {"schema": _ref("schemas", "Form")}}}
    post = _operation(
        f"post{which}",
        f"Store the files of a form in {what}, all of them or none. Conditions hold for each of them; Content-Digest,"
        " Repr-Digest and Content-MD5 for the form as it is sent.",
        {"201": stored},
        FORM,
        ("IfMatch", "IfNoneMatch", "IfUnmodifiedSince", "ContentEncoding"),
        requestBody=form,
    )
    listed = _both(which, f"List {what}.", {"200": listing}, READ)
    return {"parameters": list(parameters), **listed, "post": post, **_options(which, *parameters)}


def _file(path: Json) -> Json:
    """The methods of a file."""
    reading = ("IfMatch", "IfNoneMatch", "IfModifiedSince", "IfUnmodifiedSince", "Range", "IfRange", "WantReprDigest")
    writing = ("IfMatch", "IfNoneMatch", "IfUnmodifiedSince")
    content: Json = {"*/*": {}}
    etag = {"ETag": {"required": True, **_ETAG}}
    content_range = {"Content-Range": {"schema": {"type": "string", "pattern": "^bytes "}}}
    found = {
        "200": {
            "description": "The file, with a media type that its name suggests. Of a folder, its listing.",
            "headers": {**_FILE_HEADERS, "ETag": _ETAG},
            "content": content,
        },
        "206": {
            "description": "The ranges; several are sent as `multipart/byteranges`.",
            "headers": {**_FILE_HEADERS, **content_range},
            "content": content,
        },
        "304": {"description": "The client has it.", "headers": {**_NO_SNIFFING, **etag, "Repr-Digest": _REPR_DIGEST}},
        "416": {"description": "No byte of the file is in the range.", "headers": {**_FILE_HEADERS, **content_range}},
    }
    body = {
        "description": "The bytes, of any type, with Content-Length or chunked. Without any, the file is empty.",
        "content": {"application/octet-stream": {"example": _EXAMPLE.decode()}},
    }
    put = _operation(
        "putFile",
        "Store a file, in place of any other of its name. It becomes visible whole, and stays after a power cut."
        " One with Content-Range is refused: a file is replaced whole (RFC 9110 section 14.5).",
        {
            "201": {
                "description": "The name is new. With `Upload-Complete: ?0`, the upload is begun, at the location.",
                "headers": {"ETag": _ETAG, "Location": _LOCATION},
            },
            "204": {"description": "Another file was replaced.", "headers": etag},
        },
        PUT,
        (*writing, "ContentDigest", "ReprDigest", "ContentMD5", "ContentEncoding", "UploadComplete"),
        requestBody=body,
    )
    gone = {"204": {"description": "The name is gone."}}
    return {
        "parameters": [path],
        **_both("File", "Fetch a file.", found, (*READ, *CONDITIONS), reading),
        "put": put,
        "delete": _operation("deleteFile", "Remove a file.", gone, DELETE, writing),
        **_options("File", path),
    }


def _uploads() -> Json:
    """The methods of the place where resumable uploads begin."""
    post = _operation(
        "postUploads",
        "Begin a resumable upload, of tus (with Tus-Resumable) or the IETF (with Upload-Complete); perhaps with its"
        " first bytes, or all of them. An upload that is whole is a file.",
        {
            "201": {
                "description": "It is begun, at the location; or it is whole, and what it became has a new name.",
                "headers": {**_UPLOAD_HEADERS, "Location": _LOCATION},
            },
            "204": {"description": "It is whole, and has replaced a file.", "headers": _UPLOAD_HEADERS},
        },
        CREATE,
        (
            *("TusResumable", "UploadLength", "UploadDeferLength", "UploadMetadata", "UploadConcat", "UploadChecksum"),
            *("UploadComplete", "ContentDisposition", "ReprDigest", "ContentEncoding"),
            *("IfMatch", "IfNoneMatch", "IfUnmodifiedSince"),
        ),
        requestBody=_upload_content(TUS_TYPE.decode(), "application/octet-stream"),
    )
    return {"post": post, **_upload_options("Uploads")}


def _upload() -> Json:
    """The methods of a resumable upload."""
    id = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
    parameter = {"name": "id", "in": "path", "required": True, "description": "An upload under way.", "schema": id}
    done = {"description": "Done, as far as the offset says.", "headers": _UPLOAD_HEADERS}
    state = {"description": "How far it is (tus).", "headers": {**_UPLOAD_HEADERS, "Cache-Control": _TEXT}}
    patch = _operation(
        "patchUpload",
        "Append. Whoever else is appending is told to leave.",
        {"201": {**done, "description": "All bytes are there (IETF): a new file."}, "204": done},
        APPEND,
        (
            *("TusResumable", "UploadOffset", "UploadLength", "UploadChecksum", "UploadComplete"),
            *("ContentDigest", "ContentEncoding"),
        ),
        requestBody=_upload_content(TUS_TYPE.decode(), PART_TYPE.decode()),
    )
    states = {"200": state, "204": {**state, "description": "The same (IETF)."}}
    look = _both("Upload", "Tell how far an upload is.", states, LOOK, ("TusResumable",))
    gone = {"204": {"description": "The upload is gone; a file that it has become stays."}}
    delete = _operation("deleteUpload", "Cancel an upload.", gone, CANCEL, ("TusResumable",))
    return {"parameters": [parameter], **look, "patch": patch, "delete": delete, **_upload_options("Upload", parameter)}


def _upload_content(*kinds: str) -> Json:
    example = {"example": _EXAMPLE.decode()}
    return {"description": "Bytes of the file.", "content": {kind: example for kind in kinds}}


def _upload_options(name: str, *parameters: Json) -> Json:
    """What can be done, and how large an upload may be."""
    options = _options(name, *parameters)["options"]
    fields = {"Tus-Version": _TEXT, "Tus-Extension": _TEXT, "Tus-Checksum-Algorithm": _TEXT, "Upload-Limit": _TEXT}
    headers = {"Allow": _ALLOW, **{field: {"required": True, **schema} for field, schema in fields.items()}}
    refused = {status: answer for status, answer in options["responses"].items() if status != str(NO_CONTENT)}
    answer = {str(OK): {"description": "Methods, extensions, limits.", "headers": {**headers, "Tus-Max-Size": _NUMBER}}}
    return {"options": {**options, "responses": answer | refused}}


def _health(name: str, summary: str, refusals: Iterable[Refusal]) -> Json:
    answer = {"200": {"description": "Yes.", "headers": _NO_SNIFFING, "content": {"text/plain": {}}}}
    return {**_both(name, summary, answer, refusals), **_options(name)}


def describe(files: str, max_size: int, limits: Limits, uploads: str = "/uploads/") -> Json:
    """The OpenAPI document of a service.

    :param files: path of the files, with a slash at both ends.
    :param max_size: bytes of one file at most.
    :param limits: of its site.
    :param uploads: path of the resumable uploads, with a slash at both ends.
    """
    redirect = {"302": {"description": "To the files.", "headers": {"Location": _LOCATION}}}
    json_object = {"application/json": {"schema": {"type": "object"}}}
    itself = {"200": {"description": "This.", "headers": _NO_SNIFFING, "content": json_object}}
    path = _name("path", "A file; in front of it the folders that it is in, each with a slash.")
    folder = _name("folder", "A folder; in front of it those that it is in.")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "lwstwisted",
            "version": __version__,
            "summary": "Uploads of files.",
            "description": _prose(files, max_size, limits, uploads),
        },
        "paths": {
            "/": {**_both("Home", "Lead to the files.", redirect, HEAD), **_options("Home")},
            "/healthz": _health("Health", "Tell that the service runs.", HEAD),
            "/readyz": _health("Readiness", "Tell whether uploads should be sent here.", (*HEAD, errors.NOT_READY)),
            "/openapi.json": {**_both("OpenAPI", "Describe the service.", itself, HEAD), **_options("OpenAPI")},
            files: _folder("Root", "the folder of all files"),
            f"{files}{{path}}": _file(path),
            f"{files}{{folder}}/": _folder("Folder", "a folder", folder),
            uploads: _uploads(),
            f"{uploads}{{id}}": _upload(),
        },
        "components": {
            "parameters": _FIELDS,
            "schemas": _SCHEMAS,
            "responses": {f"OtherMethod{status}": answer for status, answer in _refused(OTHER_METHODS).items()},
        },
    }


def _prose(files: str, max_size: int, limits: Limits, uploads: str) -> str:
    largest = min(max_size, limits.body_bytes)
    return "\n".join(
        [
            f"A path below `{files}` has as many segments as it needs, and folders are made by need. Its slashes are"
            " sent as they are, which OpenAPI cannot say of a parameter: an encoded one is refused. A path that ends"
            " with a slash means a folder; a folder without one is listed too.",
            "",
            f"- A segment: UTF-8, percent-encoded once, {SEGMENT_LIMIT} bytes; the whole path {PATH_LIMIT}."
            " It is stored in Unicode's form NFC.",
            f"- A file: {'no limit' if largest == MAX_LENGTH else f'{largest} bytes'}.",
            f"- The request target and each line of a head: {limits.line_bytes} bytes; {limits.header_lines} lines;"
            f" the whole head {limits.head_bytes} bytes; trailers {limits.trailer_bytes} bytes.",
            f"- A form: {PARTS} parts with {HEADER_LINES} lines each; a field that is no file {FIELD_BYTES} bytes;"
            f" its boundary {BOUNDARY_LENGTH} characters.",
            f"- Time for a head: {limits.head_time:g} s. A body may pause for {limits.body_time:g} s, and brings"
            f" {limits.body_rate} bytes per second.",
            f"- `Upload-Metadata`: {METADATA_BYTES} bytes.",
            "",
            f"Resumable uploads are those of tus 1.0 and of draft-ietf-httpbis-resumable-upload; `{uploads}` begins one"
            f" of either, and a PUT or POST below `{files}` with `Upload-Complete` one of the IETF's.",
            "",
            "Who changes something from a page of another site is refused, as the browser says with Sec-Fetch-Site or"
            " Origin; but such a page may begin resumable uploads of new files, if its origin is allowed.",
            "",
            "A refusal is one sentence of plain text. A method that a resource does not have is answered by"
            f" {errors.METHOD_NOT_ALLOWED.status} with `Allow`, one that is unknown by {errors.UNKNOWN_METHOD.status}.",
        ]
    )


def published(document: Json) -> ReadOnly:
    """A resource that publishes a document."""
    data = json.dumps(document, ensure_ascii=False).encode() + b"\n"

    return ReadOnly(lambda request: send_content(request, b"application/json", data))
