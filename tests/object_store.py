"""A small local object store that speaks as Google's does: `python tests/object_store.py PORT BUCKET`.

It is gcp-storage-emulator, but a download tells the object's generation, as Google's does: tensorstore writes an index
again only if its generation is the one that it has read. The store does not refuse a write for that, as Google's would.
"""

import sys
from typing import Any

from gcp_storage_emulator.handlers import objects

plain = objects.download


def download(request: Any, response: Any, storage: Any, *more: Any, **options: Any) -> None:
    plain(request, response, storage, *more, **options)
    if response.status < 400:
        about = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = about["generation"]


objects.download = download  # before the server makes its table of them

from gcp_storage_emulator.server import create_server  # noqa: E402

if __name__ == "__main__":
    create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket=sys.argv[2]).run()
