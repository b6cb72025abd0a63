"""What each operation of the service may be refused with, for who describes it."""

from __future__ import annotations

from lwstwisted import errors

HEAD = (
    errors.BAD_REQUEST_LINE,
    errors.BAD_BYTES,
    errors.BAD_HEADER,
    errors.BAD_HOST,
    errors.BAD_LENGTH,
    errors.LENGTH_AND_CODING,
    errors.BAD_CODING,
    errors.HEAD_TIMEOUT,
    errors.BODY_TOO_LARGE,
    errors.TARGET_TOO_LONG,
    errors.UNKNOWN_EXPECTATION,
    errors.HEAD_TOO_LARGE,
    errors.INTERNAL,
    errors.TOO_MANY_CONNECTIONS,
    errors.BAD_VERSION,
)
BODY = (
    errors.BAD_CHUNK,
    errors.BODY_SHORT,
    errors.BODY_TIMEOUT,
    errors.BODY_TOO_SLOW,
    errors.LENGTH_REQUIRED,
    errors.CONTENT_ENCODING,
    errors.TRAILERS_TOO_LARGE,
)
NAME = (
    errors.NAME_EMPTY,
    errors.NAME_DOTS,
    errors.NAME_ENCODING,
    errors.NAME_CONTROL,
    errors.NAME_TOO_LONG,
    errors.NAME_RESERVED,
)
STORE = (
    errors.NOT_A_FILE,
    errors.NOT_A_FOLDER,
    errors.OTHER_FILE_SYSTEM,
    errors.STORE_FAILED,
    errors.STOPPING,
    errors.TOO_MANY_FILES,
)
ACCESS = (
    errors.WRONG_HOST,
    errors.BAD_CREDENTIALS,
    errors.UNAUTHORIZED,
    errors.WRONG_CREDENTIALS,
    errors.TOO_MANY_LOGINS,
    errors.FORBIDDEN,
    errors.BAD_SIGNATURE,
    errors.SIGNATURE_EXPIRED,
    errors.SIGNED_PATH,
    errors.SIGNED_METHOD,
)
READ = (*HEAD, *ACCESS, *NAME, *STORE, errors.NOT_FOUND)
CONDITIONS = (errors.BAD_CONDITION, errors.PRECONDITION_FAILED)
CHANGE = (errors.CROSS_ORIGIN, *CONDITIONS, errors.IS_FOLDER, errors.DISK_FULL, errors.QUOTA_EXCEEDED)
HOOKS = (
    errors.HOOK_REJECTED,
    errors.HOOK_STOPPED,
    errors.HOOK_FAILED,
    errors.HOOK_UNREACHABLE,
    errors.HOOKS_BEHIND,
)
REPLACING = (errors.REPLACE_FORBIDDEN, errors.SIGNED_SIZE, errors.SIGNED_TYPE)
STORING = (*HEAD, *ACCESS, *HOOKS, *REPLACING, *BODY, *NAME, *STORE, *CHANGE, errors.BAD_DIGEST, errors.DIGEST_MISMATCH)
RESUMED = (errors.CONTENT_RANGE, errors.LENGTH_MISMATCH, errors.UPLOAD_OVERRUN, errors.UPLOAD_TAKEN)
PUT = (*STORING, *RESUMED)
DELETE = (*READ, *CHANGE)
NAMED_BY_FIELD = (errors.BAD_DISPOSITION, errors.FORM_IN_PARTS)
FORM = (
    *STORING,
    *RESUMED,
    *NAMED_BY_FIELD,
    errors.NOT_A_FORM,
    errors.BAD_BOUNDARY,
    errors.BAD_FORM,
    errors.FORM_CUT,
    errors.FORM_TOO_LARGE,
    errors.FORM_WITHOUT_FILE,
    errors.FORM_NAME_TWICE,
    errors.PART_ENCODING,
)
OF_UPLOAD = (
    *ACCESS,
    *HOOKS,
    errors.HOOK_KEPT,
    errors.TUS_VERSION,
    errors.CROSS_ORIGIN,
    errors.UPLOAD_NOT_FOUND,
    errors.UPLOAD_TAKEN,
)
NAMING = (
    *REPLACING,
    *STORE,
    errors.NAME_TOO_LONG,
    errors.PRECONDITION_FAILED,
    errors.IS_FOLDER,
    errors.DISK_FULL,
    errors.QUOTA_EXCEEDED,
    errors.DIGEST_MISMATCH,
)
CONTENT = (
    errors.BAD_UPLOAD_FIELD,
    errors.NOT_A_PART,
    errors.BAD_CHECKSUM,
    errors.CHECKSUM_MISMATCH,
    errors.CONCATENATED,
    errors.BAD_DIGEST,
    errors.LENGTH_MISMATCH,
    errors.UPLOAD_OVERRUN,
)
CREATE = (
    *STORING,
    *RESUMED,
    *NAMED_BY_FIELD,
    *CONTENT,
    errors.TUS_VERSION,
    errors.NOT_AN_UPLOAD,
    errors.BAD_METADATA,
    errors.BAD_PARTS,
    errors.FOREIGN_PARTS,
)
LOOK = (*HEAD, *OF_UPLOAD, *NAMING)
APPEND = (*LOOK, *BODY, *CONTENT, errors.OFFSET_MISMATCH, errors.UPLOAD_FINISHED)
CANCEL = (*HEAD, *OF_UPLOAD, errors.STORE_FAILED, errors.STOPPING, errors.TOO_MANY_FILES)
OTHER_METHODS = (errors.METHOD_NOT_ALLOWED, errors.UNKNOWN_METHOD)
