"""Upload a file in four parts at once, with the client of resumable-upload: ``parallel_upload.py URL FILE STORAGE``.

It goes on where an earlier process has stopped, which it knows from the storage.
"""

import sys
import time

from resumable_upload import FileURLStorage, TusClient
from resumable_upload.exceptions import TusCommunicationError, TusUploadFailed

url, path, storage = sys.argv[1:]
while True:
    try:
        client = TusClient(
            url,
            chunk_size=700_000,
            checksum="sha256",
            store_url=True,
            url_storage=FileURLStorage(storage),
            max_retries=5,
            retry_delay=0.1,
        )
        client.upload_file(path, parallel_uploads=4)
        break
    except (OSError, TusCommunicationError, TusUploadFailed) as error:
        print(f"{error}; once more", file=sys.stderr)
        time.sleep(0.2)
