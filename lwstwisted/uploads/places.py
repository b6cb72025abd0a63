"""Where clients find uploads and files."""

from __future__ import annotations

from urllib.parse import quote, urljoin, urlsplit

from lwstwisted.interfaces import Name


class Places:
    """URLs, and what they mean.

    :param path: the URL path of uploads, with a slash at both ends.
    :param files_path: that of the files that they become.
    :param public_url: what stands in front of both where a client has to be told an absolute URL.
    """

    def __init__(self, path: str, files_path: str, public_url: str) -> None:
        self._path = path
        self._files_path = files_path
        self._public_url = public_url.rstrip("/")

    def url_of(self, id: str) -> str:
        """Where an upload is."""
        return f"{self._public_url}{self._path}{id}"

    def id_of(self, url: str) -> str:
        """The id in a URL of :meth:`url_of`, absolute or not; "" if it is none."""
        try:
            path = urlsplit(urljoin(self.url_of(""), url)).path.removeprefix(urlsplit(self._public_url).path)
        except ValueError:
            return ""
        return path.removeprefix(self._path) if path.startswith(self._path) else ""

    def url_of_file(self, name: Name) -> str:
        """Where a file is."""
        return f"{self._public_url}{self._files_path}{'/'.join(quote(segment, safe='') for segment in name)}"
