"""Upload a file with tuspy, as its documentation shows: ``tuspy_upload.py URL FILE STORAGE``.

It goes on where an earlier process has stopped, which it knows from the storage.
"""

import sys
import time

from tusclient.client import TusClient
from tusclient.exceptions import TusCommunicationError
from tusclient.storage.filestorage import FileStorage

url, path, storage = sys.argv[1:]
while True:
    try:
        uploader = TusClient(url).uploader(
            path,
            chunk_size=6_000_000,
            metadata={"filename": path.rsplit("/", 1)[-1]},
            retries=20,
            retry_delay=0.1,
            store_url=True,
            url_storage=FileStorage(storage),
        )
        uploader.upload()
        break
    except TusCommunicationError as error:
        print(f"{error}; once more", file=sys.stderr)
        time.sleep(0.2)
