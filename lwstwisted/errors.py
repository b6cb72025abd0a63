"""Every refusal that a client can see, declared once: code, status, sentence.

A module that must refuse raises ``Refused(errors.SOMETHING)``. Only the channel
turns one into bytes (``web/channel.py``); anything else that escapes is a bug of
ours, answered by 500 and logged with its traceback.

The *code* is stable and meant for logs and metrics; the *sentence* is the body of
the answer and says what to do. Whose fault it is follows from the status, as in
RFC 9110 section 15: 4xx the client's, 5xx ours. Where a protocol has registered a
*problem type* for it, the body is a problem (RFC 9457) whose title is the sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Refusal:
    """One way to say no.

    :ivar code: stable identifier, ``snake_case``.
    :ivar status: HTTP status code.
    :ivar sentence: one sentence for a person, without a line break.
    :ivar problem: URI of its problem type, if it has one.
    """

    code: str
    status: int
    sentence: str
    problem: str = ""

    @property
    def is_clients_fault(self) -> bool:
        """Whether the client can mend it (4xx)."""
        return self.status < 500


class Refused(Exception):
    """Raised to answer the current request with a refusal.

    :param refusal: the declared refusal.
    :param headers: further response fields, such as ``Allow`` for 405.
    :param members: of the problem, beside type and title, where the refusal has a problem type.
    """

    def __init__(
        self,
        refusal: Refusal,
        headers: Mapping[bytes, bytes] = MappingProxyType({}),
        members: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        super().__init__(refusal.code)
        self.refusal = refusal
        self.headers = headers
        self.members = members


class BodyCut(Exception):
    """The request body will never be whole: its client left, or had its answer before the end."""


class BodyStopped(Exception):
    """The consumer of a request body called ``stopProducing()`` before the end of the body."""


_PROBLEMS = "https://iana.org/assignments/http-problem-types#"
"""The registry of problem types (RFC 9457 section 4.2)."""

# Framing (RFC 9112). The connection is closed after each of these.
BAD_REQUEST_LINE = Refusal(
    "bad_request_line", 400, "The request line must be: method, one space, target, one space, HTTP/1.1."
)
BAD_BYTES = Refusal(
    "bad_bytes", 400, "The request head has a control character, a bare CR or LF, or a folded line."
)
BAD_HEADER = Refusal("bad_header", 400, "A header line is not a valid field name, a colon and a value.")
BAD_HOST = Refusal("bad_host", 400, "Send exactly one valid Host header.")
BAD_LENGTH = Refusal("bad_length", 400, "Send at most one Content-Length, a plain decimal number.")
LENGTH_AND_CODING = Refusal(
    "length_and_coding", 400, "Send Content-Length or Transfer-Encoding, not both."
)
BAD_CODING = Refusal(
    "bad_coding", 400, "The only supported transfer coding is one 'Transfer-Encoding: chunked' in HTTP/1.1."
)
BAD_CHUNK = Refusal("bad_chunk", 400, "The chunked body is malformed.")
TARGET_TOO_LONG = Refusal("target_too_long", 414, "The request target is too long; shorten the name or the query.")
HEAD_TOO_LARGE = Refusal("head_too_large", 431, "The request head is too large; send fewer or shorter header lines.")
TRAILERS_TOO_LARGE = Refusal("trailers_too_large", 431, "The trailers of the chunked body are too large.")
UNKNOWN_METHOD = Refusal("unknown_method", 501, "This server does not know the request method.")
BAD_VERSION = Refusal("bad_version", 505, "This server speaks HTTP/1.1 and HTTP/1.0 only.")
UNKNOWN_EXPECTATION = Refusal(
    "unknown_expectation", 417, "The only supported expectation is 'Expect: 100-continue'."
)
HEAD_TIMEOUT = Refusal("head_timeout", 408, "The request head did not arrive in time.")
BODY_SHORT = Refusal("body_short", 400, "The request body ended before its announced length.")
BODY_TIMEOUT = Refusal("body_timeout", 408, "The request body stopped arriving.")
BODY_TOO_SLOW = Refusal("body_too_slow", 408, "The request body arrives too slowly.")
TOO_MANY_CONNECTIONS = Refusal(
    "too_many_connections", 503, "The server has too many connections, or too many of yours; try again in a moment."
)

BAD_FORM = Refusal("bad_form", 400, "The form in the request body is malformed.")

# Uploads.
LENGTH_REQUIRED = Refusal(
    "length_required", 411, "Send Content-Length or 'Transfer-Encoding: chunked' with an upload."
)
BODY_TOO_LARGE = Refusal("body_too_large", 413, "The upload is larger than this server accepts.")
METHOD_NOT_ALLOWED = Refusal("method_not_allowed", 405, "This resource does not support the request method.")
CONTENT_ENCODING = Refusal(
    "content_encoding", 415, "Send the file without Content-Encoding; this server stores bytes as they are."
)
CONTENT_RANGE = Refusal(
    "content_range", 400, "A PUT replaces the whole file; do not send Content-Range with it (RFC 9110 section 14.5)."
)

# Who may do what

BAD_CREDENTIALS = Refusal(
    "bad_credentials", 400, "Send one Authorization field, with 'Basic' (RFC 7617) or 'Bearer' (RFC 6750)."
)
UNAUTHORIZED = Refusal("unauthorized", 401, "Say who you are: the request needs a name and password, or a token.")
WRONG_CREDENTIALS = Refusal("wrong_credentials", 401, "The name and password, or the token, are not right.")
FORBIDDEN = Refusal("forbidden", 403, "The access rules of this server do not allow you that.")
REPLACE_FORBIDDEN = Refusal(
    "replace_forbidden", 403, "There is a file with this name, and you may not replace it; choose another name."
)
FOREIGN_PARTS = Refusal("foreign_parts", 403, "An upload that is to be concatenated was begun by somebody else.")
BAD_SIGNATURE = Refusal(
    "bad_signature", 403, "The signature does not fit the rest of the URL; use the URL exactly as it was made for you."
)
SIGNATURE_EXPIRED = Refusal("signature_expired", 403, "The time of this signed URL is over; ask for a new one.")
SIGNED_PATH = Refusal("signed_path", 403, "The URL was signed for another path.")
SIGNED_METHOD = Refusal("signed_method", 403, "The URL was signed for other methods.")
SIGNED_SIZE = Refusal("signed_size", 403, "The upload is larger than the signed URL allows.")
SIGNED_TYPE = Refusal("signed_type", 403, "The URL was signed for another Content-Type.")
WRONG_HOST = Refusal(
    "wrong_host", 421, "This server is not known by the host name that you asked for; its operator can add it (--host)."
)
TOO_MANY_LOGINS = Refusal(
    "too_many_logins", 429, "Too many logins from your address have failed or are waiting; try again in a moment."
)

CROSS_ORIGIN = Refusal(
    "cross_origin", 403, "A page of another site sent this request; open this server's own page and send it from there."
)
PRECONDITION_FAILED = Refusal(
    "precondition_failed", 412, "The file is not what the conditions of the request say; look at it again."
)
BAD_CONDITION = Refusal("bad_condition", 400, "If-Match and If-None-Match are '*' or a list of quoted entity-tags.")
BAD_DIGEST = Refusal(
    "bad_digest", 400, "A digest field is malformed; write 'Repr-Digest: sha-256=:BASE64:' (RFC 9530)."
)
DIGEST_MISMATCH = Refusal(
    "digest_mismatch", 400, "The body is not what its digest field says; it was damaged on its way, so send it again."
)

# Hooks.
HOOK_REJECTED = Refusal("hook_rejected", 400, "The application behind this server has rejected the upload.")
HOOK_STOPPED = Refusal("hook_stopped", 400, "The application behind this server has stopped the upload.")
HOOK_KEPT = Refusal("hook_kept", 400, "The application behind this server wants the upload to stay.")
HOOK_FAILED = Refusal("hook_failed", 500, "The application behind this server had no sensible answer about the upload.")
HOOK_UNREACHABLE = Refusal(
    "hook_unreachable", 503, "The application behind this server can't be asked about uploads now; try again later."
)
HOOKS_BEHIND = Refusal(
    "hooks_behind", 503, "Too many uploads wait for being reported to the application behind this server; try later."
)

# Forms (RFC 7578). BAD_FORM, above, is their framing error.
NOT_A_FORM = Refusal(
    "not_a_form", 415, "POST takes forms of the type multipart/form-data; send a single file with PUT."
)
BAD_BOUNDARY = Refusal(
    "bad_boundary", 400, "The Content-Type of a form has one boundary: 1 to 70 of the characters of RFC 2046."
)
FORM_CUT = Refusal("form_cut", 400, "The form ends before its last boundary; nothing of it was stored.")
FORM_TOO_LARGE = Refusal(
    "form_too_large", 413, "The form has too many parts, or too much in its headers, its fields or around its parts."
)
FORM_WITHOUT_FILE = Refusal("form_without_file", 400, "The form has no file in it; choose one and send it again.")
FORM_NAME_TWICE = Refusal("form_name_twice", 400, "Two files of the form have the same name; rename one of them.")
PART_ENCODING = Refusal(
    "part_encoding", 415, "Send the files of a form as they are, without a transfer or content encoding of their own."
)

# Resumable uploads.
UPLOAD_NOT_FOUND = Refusal(
    "upload_not_found", 404, "There is no such upload: it was cancelled, has expired, or never was; begin it anew."
)
UPLOAD_TAKEN = Refusal("upload_taken", 409, "A newer request has taken over this upload; ask for its offset.")
OFFSET_MISMATCH = Refusal(
    "offset_mismatch",
    409,
    "The upload has another offset; ask for it, and go on from there.",
    _PROBLEMS + "mismatching-upload-offset",
)
UPLOAD_OVERRUN = Refusal("upload_overrun", 413, "The upload is longer than was announced for it.")
LENGTH_MISMATCH = Refusal(
    "length_mismatch",
    400,
    "The upload was announced with another length.",
    _PROBLEMS + "inconsistent-upload-length",
)
UPLOAD_FINISHED = Refusal(
    "upload_finished",
    400,
    "The upload is finished; nothing can be appended to it.",
    _PROBLEMS + "completed-upload",
)
BAD_UPLOAD_FIELD = Refusal(
    "bad_upload_field", 400, "An Upload- field is missing, malformed, or contradicts another one of the request."
)
NOT_AN_UPLOAD = Refusal(
    "not_an_upload", 400, "Begin an upload here with tus (Tus-Resumable: 1.0.0) or with Upload-Complete."
)
NOT_A_PART = Refusal(
    "not_a_part", 415, "Append with the Content-Type of the protocol: application/partial-upload, or that of tus."
)
FORM_IN_PARTS = Refusal(
    "form_in_parts", 415, "A form is sent in one request; to resume an upload, send the file itself and not a form."
)
BAD_DISPOSITION = Refusal(
    "bad_disposition", 400, "Write 'Content-Disposition: inline; filename=\"NAME\"', or filename* (RFC 6266)."
)
TUS_VERSION = Refusal("tus_version", 412, "This server speaks tus 1.0.0; say so with 'Tus-Resumable: 1.0.0'.")
BAD_METADATA = Refusal(
    "bad_metadata", 400, "Upload-Metadata is a list of unique keys with Base64 values; a filename has no folders."
)
BAD_CHECKSUM = Refusal(
    "bad_checksum", 400, "Upload-Checksum is one of the announced algorithms, a space, and the sum in Base64."
)
CHECKSUM_MISMATCH = Refusal(
    "checksum_mismatch", 460, "The bytes are not what Upload-Checksum says; none was kept, so send them again."
)
CONCATENATED = Refusal("concatenated", 403, "Nothing can be appended to a concatenation; append to its parts.")
BAD_PARTS = Refusal("bad_parts", 400, "Upload-Concat names uploads of this server that were made as partial ones.")

# Names.
NAME_EMPTY = Refusal("name_empty", 400, "The path has an empty segment; name a file, without double slashes.")
NAME_DOTS = Refusal("name_dots", 400, "The path has a '.' or '..' segment; send the path you mean.")
NAME_ENCODING = Refusal(
    "name_encoding", 400, "The path must be UTF-8, percent-encoded once, without encoded slashes or backslashes."
)
NAME_CONTROL = Refusal("name_control", 400, "The path has a NUL or another control character.")
NAME_TOO_LONG = Refusal(
    "name_too_long", 400, "A path segment is longer than 255 bytes, or the path longer than 4095."
)
NAME_RESERVED = Refusal("name_reserved", 400, "This name is the store's own; choose another.")

# Store.
NOT_FOUND = Refusal("not_found", 404, "There is no such file.")
IS_FOLDER = Refusal("is_folder", 409, "There is a folder with this name; choose another name.")
NOT_A_FOLDER = Refusal(
    "not_a_folder", 409, "A part of the path is a file, not a folder; choose another path."
)
NOT_A_FILE = Refusal("not_a_file", 403, "This name is a symbolic link or a special file, which is not served.")
OTHER_FILE_SYSTEM = Refusal(
    "other_file_system", 409, "A part of the path is another file system mounted there; choose another path."
)
QUOTA_EXCEEDED = Refusal(
    "quota_exceeded", 507, "The files here may not take so much space together; delete some that are not needed."
)
DISK_FULL = Refusal("disk_full", 507, "There is not enough space on the server for this upload.")
TOO_MANY_FILES = Refusal("too_many_files", 503, "The server has too many files open; try again in a moment.")
STORE_FAILED = Refusal("store_failed", 500, "The server could not store or read the file; try again later.")
INTERNAL = Refusal("internal", 500, "The server failed in an unforeseen way; it has been logged.")
NOT_READY = Refusal(
    "not_ready", 503, "The disk failed to keep what it was given; somebody has to look at it before it gets more."
)
STOPPING = Refusal("stopping", 503, "The server is stopping; try again in a moment.")
