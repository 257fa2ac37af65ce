"""A path in a bucket of Google Cloud Storage (gs://), with as much of pathlib as checkpoints need.

It needs the package gcsfs, which finds the user's credentials as all of Google's tools do. A bucket has objects and no
folders: a folder is there while the name of an object begins with it.
"""

import contextlib
import errno
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

SCHEME = "gs://"


@dataclass(frozen=True)
class BucketPath:
    """`url`: gs://BUCKET/NAME, without a slash at its end. Whatever fails is an OSError that names it."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "BucketPath":
        return BucketPath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "BucketPath":
        return BucketPath(self.url.rpartition("/")[0])

    def exists(self) -> bool:
        try:
            self._about()
        except FileNotFoundError:
            return False
        return True

    def size(self) -> int:
        return self._about()["size"]

    def modified(self) -> float:
        """When the object was written, in seconds since 1970."""
        with self._named() as store:
            return store.modified(self.url).timestamp()

    @contextlib.contextmanager
    def open(self, mode: str, buffering: int = 0) -> Iterator[IO[bytes]]:
        """The object, as a file for reading. `buffering`: as in pathlib; it is buffered anyway."""
        with self._named() as store, store.open(self.url, mode) as file:
            yield file

    def read_bytes(self) -> bytes:
        with self._named() as store:
            return store.cat_file(self.url)

    def write_bytes(self, content: bytes) -> None:
        with self._named() as store:
            store.pipe_file(self.url, content)

    def unlink(self, missing_ok: bool = False) -> None:
        with contextlib.suppress(*[FileNotFoundError] * missing_ok), self._named() as store:
            store.rm_file(self.url)

    def folders(self) -> list[str]:
        """The names of the folders in this one."""
        with self._named() as store:
            found = store.ls(self.url, detail=True)
        return [entry["name"].rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "directory"]

    def files(self) -> list[str]:
        """All objects in this folder, at any depth: their names from here."""
        with self._named() as store:
            found = store.find(self.url)
        start = self.url.removeprefix(SCHEME) + "/"
        return sorted(name.removeprefix(start) for name in found if name.startswith(start) and not name.endswith("/"))

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        with contextlib.suppress(FileNotFoundError), self._named() as store:
            store.rm(self.url, recursive=True)

    def _about(self) -> dict[str, Any]:
        with self._named() as store:
            return store.info(self.url)

    @contextlib.contextmanager
    def _named(self) -> Iterator[Any]:
        """The store. Its errors, which are of many classes, become an OSError with this path as its file name."""
        try:
            yield _store()
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", self.url) from None
        except Exception as e:  # of gcsfs, of Google's authentication, or of the network
            raise OSError(getattr(e, "errno", None) or errno.EIO, f"{type(e).__name__}: {e}", self.url) from e


@functools.cache
def _store() -> Any:
    import fsspec

    # orbax and tensorstore write through other connections, so a list must not be remembered
    return fsspec.filesystem("gs", use_listings_cache=False)
