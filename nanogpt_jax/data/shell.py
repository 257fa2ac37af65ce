"""Shell commands that an error offers for a file: each writes a usable copy into the current directory.

They can be pasted into a shell. Names are quoted, and no name is mistaken for a flag.
"""

from pathlib import Path
from typing import BinaryIO

from nanogpt_jax.config import word

Source = Path | BinaryIO  # a stream has no name: commands call it FILE
GZIP = b"\x1f\x8b\x08"  # its first bytes


def named(source: Source) -> str:
    """The name of a file, quoted."""
    return word(source) if isinstance(source, Path) else "FILE"


def is_gzip(path: Path) -> bool:
    """Whether a file begins like a gzip; False if it cannot be read."""
    try:
        if path.is_file():  # a pipe may not open twice
            with path.open("rb") as file:
                return file.read(3) == GZIP
    except OSError:
        pass
    return False


def gunzip(source: Source) -> str:
    """The command that unpacks a gzip."""
    return f"gunzip -c < {named(source)} > {word(unpacked(source))}"


def filtered(tool: str, source: Source, into: str, packed: bool | None = None) -> str:
    """The command that pipes a file through `tool` into the file `into`, after unpacking a gzip.

    `packed`: whether it is a gzip; None: find out.
    """
    if packed or (packed is None and isinstance(source, Path) and is_gzip(source)):
        return f"gunzip -c < {named(source)} | {tool} > {word(into)}"
    return f"{tool} {named(source)} > {word(into)}"


def converted(source: Source) -> str:
    """The name of a converted file, with the suffix of its format. Not quoted."""
    path = source if isinstance(source, Path) else Path("text.txt")
    return f"{stem(path)}-utf8{Path(_without_gz(path)).suffix or '.txt'}"


def unpacked(source: Source) -> Path:
    """The name of an unpacked file, without the suffix of the packer."""
    path = source if isinstance(source, Path) else Path("text.txt")
    if path.suffix.lower() in (".gz", ".bz2", ".xz", ".zst", ".lz4", ".z"):
        return Path(path.stem)
    return Path(f"{stem(path)}-unpacked{path.suffix}")


def stem(path: Path) -> str:
    """The name of a file without folder, suffix and .gz. Not quoted."""
    return Path(_without_gz(path)).stem


def _without_gz(path: Path) -> str:
    return path.name[:-3] if path.name.lower().endswith(".gz") else path.name
