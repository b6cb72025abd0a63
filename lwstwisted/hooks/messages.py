"""What is said to a hook, and what it says: JSON as tusd has it, so that programs written for that understand it.

A field that Go has no value for is 0 or "" there, not null: the ID before an upload is created, the size while it is
deferred. Names are read in any case, as Go's decoder does.

What is told later lies on the disk until then. So it has no secrets of the client: ``Authorization``,
``Proxy-Authorization`` and ``Cookie`` are left out unless the operator has these forwarded, and the signature of a
signed URL is. Who is asked before gets the whole request, as that may be what it decides by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lwstwisted.hooks.events import NO_WISHES, Answer, Cause, Upload
from lwstwisted.hooks.names import Hook

SECRETS = frozenset({"authorization", "proxy-authorization", "cookie"})

_SIGNATURE = re.compile(r"([?&]signature=)[^&#]*")


def message(hook: Hook, upload: Upload, cause: Cause, root: Path) -> str:
    """The JSON of an event.

    :param root: of the store.
    """
    storage = None
    if upload.at is not None:
        storage = {"Type": "filestore", "Path": str(root.joinpath(*upload.at))}
    return json.dumps(
        {
            "Type": hook.value,
            "Event": {
                "Upload": {
                    "ID": upload.id,
                    "Size": upload.size or 0,
                    "SizeIsDeferred": upload.size is None,
                    "Offset": upload.offset,
                    "MetaData": dict(upload.metadata),
                    "IsPartial": upload.is_partial,
                    "IsFinal": bool(upload.parts),
                    "PartialUploads": list(upload.parts) or None,
                    "Storage": storage,
                },
                "HTTPRequest": {
                    "Method": cause.method,
                    "URI": cause.uri,
                    "RemoteAddr": cause.address,
                    "Header": {name: list(values) for name, values in cause.headers.items()},
                },
            },
        }
    )


def without_secrets(cause: Cause, forwarded: Collection[str]) -> Cause:
    """What may lie on the disk of a request.

    :param forwarded: names of fields that the operator wants to be handed on, in lower case.
    """
    kept = {name: value for name, value in cause.headers.items() if name.lower() not in SECRETS - set(forwarded)}
    return replace(cause, uri=_SIGNATURE.sub(r"\1-", cause.uri), headers=kept)


@dataclass(frozen=True, slots=True)
class Response:
    """What a hook says.

    :ivar answer: what it wants to be different.
    :ivar rejects: whether the upload is not to be created.
    :ivar stops: whether it is not to go on.
    :ivar keeps: whether it is not to be cancelled.
    :ivar unfit: what it wants and can't have.
    """

    answer: Answer = NO_WISHES
    rejects: bool = False
    stops: bool = False
    keeps: bool = False
    unfit: tuple[str, ...] = ()


def response(content: bytes) -> Response:
    """Read what a hook says.

    :raises ValueError: with a sentence, if it makes no sense.
    """
    try:
        said = json.loads(content)
    except ValueError:
        raise ValueError("the response is no JSON") from None
    except RecursionError:
        raise ValueError("the response is nested too deeply") from None
    top = _Object("the response", said)
    http, changes = [_Object(name, top.get(name)) for name in ("HTTPResponse", "ChangeFileInfo")]
    status = http.value("StatusCode", int, 0)
    if status and not 200 <= status <= 599:
        raise ValueError(f"StatusCode is {status}, and not one of 200 to 599")
    wanted = {"ID": changes.value("ID", str, ""), "Storage": changes.texts("Storage")}
    answer = Answer(status, http.value("Body", str, ""), http.texts("Header") or {}, changes.texts("MetaData"))
    return Response(
        answer,
        rejects=top.value("RejectUpload", bool, False),
        stops=top.value("StopUpload", bool, False),
        keeps=top.value("RejectTermination", bool, False),
        unfit=tuple(f"ChangeFileInfo.{name}" for name, value in wanted.items() if value),
    )


class _Object:
    """A JSON object, or null, whose names count in any case."""

    def __init__(self, name: str, value: Any) -> None:
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{name} is no object")
        self._found: Mapping[str, Any] = {key.lower(): found for key, found in (value or {}).items()}

    def get(self, name: str) -> Any:
        return self._found.get(name.lower())

    def value(self, name: str, kind: type, default: Any) -> Any:
        found = self.get(name)
        if found is None:
            return default
        if type(found) is not kind:  # True is an int as well
            raise ValueError(f"{name} is no {kind.__name__}")
        return found

    def texts(self, name: str) -> Mapping[str, str] | None:
        found = self.get(name)
        if found is None:
            return None
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise ValueError(f"{name} is no object of strings")
        return found
