"""Pages of the service itself: a folder with its upload form, in HTML that needs no script, or the same as JSON.

They are sent with a policy under which nothing is loaded, run or framed.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from html import escape
from typing import Any
from urllib.parse import quote

from twisted.web.server import Request

from lwstwisted.interfaces import Entry
from lwstwisted.web.plain import send_content

_STYLE = (
    "body{font:1rem/1.5 system-ui,sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%}td{padding:.2rem .5rem;border-top:1px solid #ccc}"
    "td+td{text-align:right;white-space:nowrap}form{padding:1rem;border:1px solid #ccc}"
)
_STYLE_HASH = b64encode(sha256(_STYLE.encode()).digest())

PAGE_POLICY = (
    b"default-src 'none'; style-src 'sha256-%b'; "
    b"form-action 'self'; base-uri 'none'; frame-ancestors 'none'" % _STYLE_HASH
)
"""``Content-Security-Policy`` of these pages: their own style sheet, and forms to this server."""


def wants_json(request: Request) -> bool:
    """Whether a program asks."""
    return b"application/json" in (request.getHeader(b"accept") or b"")


def send_json(request: Request, answer: Any) -> None:
    """Finish ``request`` with an object."""
    _send(request, b"application/json", json.dumps(answer, ensure_ascii=False) + "\n")


def send_page(request: Request, title: str, content: str) -> None:
    """Finish ``request`` with a page.

    :param title: plain text.
    :param content: HTML; whatever came from outside is escaped in it.
    """
    request.setHeader(b"Content-Security-Policy", PAGE_POLICY)
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n<h1>{escape(title)}</h1>\n{content}</html>\n"
    )
    _send(request, b"text/html; charset=utf-8", page)


def _send(request: Request, kind: bytes, text: str) -> None:
    request.setHeader(b"Vary", b"Accept")
    send_content(request, kind, text.encode())


def send_listing(request: Request, path: str, entries: Sequence[Entry]) -> None:
    """Finish ``request`` with what is in a folder.

    :param path: of the folder, as in its URL, with a slash at its end.
    """
    if wants_json(request):
        send_json(
            request,
            [
                {"name": e.name, "type": "folder" if e.is_folder else "file", "size": e.size, "modified": e.modified}
                for e in entries
            ],
        )
    else:
        send_page(request, path, _form(path) + f"<table>\n{''.join(_row(path, entry) for entry in entries)}</table>\n")


def _form(path: str) -> str:
    return (
        f'<form method="post" enctype="multipart/form-data" action="{escape(path)}">\n'
        '<input type="file" name="file" multiple required aria-label="Files"> <button>Upload</button>\n</form>\n'
    )


def link(path: str, name: str, is_folder: bool = False) -> str:
    """HTML of a link to what is in a folder."""
    end = "/" if is_folder else ""
    return f'<a href="{escape(path)}{quote(name, safe="")}{end}">{escape(name)}{end}</a>'


def _row(path: str, entry: Entry) -> str:
    size = "" if entry.is_folder else f"{entry.size:,} bytes"
    return f"<tr><td>{link(path, entry.name, entry.is_folder)}</td><td>{size}</td></tr>\n"
