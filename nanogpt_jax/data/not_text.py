"""Errors for files that are not UTF-8 text: the kind of file, the place, and a command that converts it to text.

The commands never read UTF-16, packed or binary files as Latin-1, which would yield a text, but a wrong one.
"""

import codecs
import itertools
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from nanogpt_jax.config import UserError, word
from nanogpt_jax.data.shell import Source, converted, filtered, gunzip, is_gzip, named, stem, unpacked

GIVE = "give the text itself"
RENAME = "rename it: mv {file} {parquet}"
CODES = rb"(?=[\s\S]{0,60}[\x00-\x08\x0e-\x1a])"  # in a text, no control codes follow soon
AGAIN = "write its texts as .jsonl with the program that made it"


class Kind(NamedTuple):
    """A kind of file that is not text."""

    magic: bytes  # a pattern for its beginning that no text matches
    name: str  # what it is
    remedy: str  # a template with the {names} of `_names`


KINDS = [
    Kind(b"PAR1" + CODES, "Parquet", RENAME),
    Kind(b"\x1f\x8b", "a gzip", "unpack it first: gunzip -c < {file} > {unpacked}"),
    Kind(b"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", "packed by bzip2", "unpack it first: bunzip2 -c < {file} > {unpacked}"),
    Kind(b"\xfd7zXZ\0", "packed by xz", "unpack it first: xz -dc < {file} > {unpacked}"),
    Kind(b"\\x28\xb5\x2f\xfd", "packed by Zstandard", "unpack it first: zstd -dc < {file} > {unpacked}"),
    Kind(b"\x04\x22\x4d\x18", "packed by LZ4", "unpack it first: lz4 -dc < {file} > {unpacked}"),
    Kind(b"\x1f\x9d", "packed by compress", "unpack it first: gunzip -c < {file} > {unpacked}"),
    Kind(b"PK\x03\x04", "a ZIP archive, or a .docx, .xlsx, .odt or .epub, which are such",
         "unpack it: unzip {file} -d {folder}\n       or, if it is a document, save it as .txt or .csv"),
    Kind(b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it: 7z x -o{folder} {file}"),
    Kind(b"Rar!\x1a\x07", "a RAR archive", "unpack it: unrar x {file} {folder}/"),
    Kind(b"SQLite format 3\0", "an SQLite database",
         "write a table as .csv: sqlite3 -csv -header {file} 'SELECT * FROM mytable' > {csv}"),
    Kind(b"\xd0\xcf\x11\xe0", "a Word, Excel or PowerPoint document", "save it as .txt or .csv in its program"),
    Kind(b"\x89PNG\r?\n", "a PNG image", GIVE),
    Kind(b"\xff\xd8\xff", "a JPEG image", GIVE),
    Kind(b"GIF8[79]a" + CODES, "a GIF image", GIVE),
    Kind(b"RIFF[\\s\\S]{4}(?:WAVE|WEBP|AVI )", "a WebP, WAV or AVI file", GIVE),
    Kind(b"\x7fELF", "a program", GIVE),
    Kind(b"ARROW1" + CODES, "an Arrow file", AGAIN),
    Kind(b"\x89HDF\r?\n", "an HDF5 file", AGAIN),
    Kind(b"\x93NUMPY[\x00-\x08]", "a NumPy array", AGAIN),
    Kind(b"Obj\x01", "an Avro file", AGAIN),
    Kind(b"ORC" + CODES, "an ORC file", AGAIN),
]  # fmt: skip
EVEN_AS_TEXT = [
    Kind(b"%PDF-[0-9][.][0-9] *[\r\n]", "a PDF", "take its text out: pdftotext {file} {txt}"),
    Kind(
        b"version https://git-lfs[.]github[.]com/spec/v[0-9]+\r?\n",
        "a pointer of Git LFS, not the file itself",
        "git lfs pull",
    ),
]
TAR = Kind(b"", "a tar archive", "unpack it: mkdir {folder} && tar -xf {file} -C {folder}")
HIGH = re.compile(b"[\x80-\xff]+")  # bytes beyond ASCII
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a]")
WORDY = frozenset(b" \n\r\t0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
EASTERN = {"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL", "BOPOMOFO", "FULLWIDTH", "HALFWIDTH", "IDEOGRAPHIC"}
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark is a prefix of it
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


# ---- by the beginning -----------------------------------------------------------------------------------------------


def check_beginning(head: bytes, source: Source, what: str, packed: bool) -> None:
    """UserError if a file that begins with `head` is not UTF-8. `packed`: it is inside the gzip `source`."""
    kinds = EVEN_AS_TEXT
    if not is_text(head):
        for mark, encoding in MARKS.items():
            if head.startswith(mark):
                raise _other_encoding(encoding, source, what, packed)
        kinds = [*EVEN_AS_TEXT, *KINDS]
        if head[257:262] == b"ustar":
            raise _other_kind(TAR, source, what, packed)
    for kind in kinds:
        if re.match(kind.magic, head):
            raise _other_kind(kind, source, what, packed)
    if encoding := wide(head):
        raise _other_encoding(encoding, source, what, packed)


def is_text(some: bytes) -> bool:
    """Whether these bytes are UTF-8 without NULs; the last character may be incomplete."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(some)
    except UnicodeDecodeError:
        return False
    return b"\0" not in some


def wide(some: bytes) -> str:
    """UTF-16LE, UTF-16BE, UTF-32LE or UTF-32BE if these bytes have NULs and are text in that encoding; else "".

    In UTF-16, the more regular half holds the high bytes. A text in another encoding with stray NULs has two similar
    halves.
    """
    some = some[:4096]
    if b"\0" not in some or (len(some) < 64 and len(some) % 2):
        return ""
    for guess in ("UTF-32LE", "UTF-32BE"):
        if len(some) >= 4 and _plausible(some[: len(some) & ~3], guess):
            return guess
    some = some[: len(some) & ~1]
    halves = [Counter(some[i::2]) for i in range(2)]
    regular = [sum(n * n for n in half.values()) for half in halves]
    order = ["UTF-16LE", "UTF-16BE"] if regular[1] >= regular[0] else ["UTF-16BE", "UTF-16LE"]
    rest = some.replace(b"\0", b"")
    if is_text(rest) and not CONTROL.search(rest):
        if not rest.isascii() and 4 * len(rest) > 3 * len(some):
            return ""  # bytes beyond ASCII are unlikely to be UTF-8 by chance
        short = len(some) < 16  # a few characters may be any bytes
        most = max(sum(n for _, n in half.most_common(1 if short else 2)) for half in halves)
        wordy = sum(byte in WORDY for byte in rest) >= 0.9 * len(rest)
        if most < (0.9 if short else 0.75) * len(some) / 2 and (wordy or not short):
            return ""
    return next((guess for guess in order if _plausible(some, guess)), "")


def _plausible(some: bytes, encoding: str) -> bool:
    """Whether these bytes decode to printable characters whose script seldom changes within a word."""
    found = codecs.getincrementaldecoder(encoding)(errors="replace").decode(some)
    odd = sum(unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") and c not in "\n\r\t\f" for c in found)
    if not found or odd + found.count("\ufffd") > len(found) / 50:
        return False
    scripts = [unicodedata.name(c, "?").split()[0] if c.isalpha() else "" for c in found]
    scripts = ["CJK" if script in EASTERN else script for script in scripts]
    pairs = [(a, b) for a, b in itertools.pairwise(scripts) if a and b]
    return sum(a != b for a, b in pairs) <= len(pairs) / 4


def _other_kind(kind: Kind, source: Source, what: str, packed: bool) -> UserError:
    file = unpacked(source) if packed else source
    # a file that has the name by which its rows are read was given where no rows are wanted
    is_named_so = kind.remedy == RENAME and isinstance(file, Path) and file.suffix.lower() == ".parquet"
    remedy = GIVE if is_named_so else kind.remedy.format(**_names(file))
    if packed:
        remedy = f"unpack it first: {gunzip(source)}; then {remedy}"
    return UserError(f"{what} is not text but {kind.name}\n       {remedy}")


def _names(source: Source) -> dict[str, str]:
    path = source if isinstance(source, Path) else Path("FILE")
    return {
        "file": named(source),
        "unpacked": word(unpacked(source)),
        "csv": word(f"{stem(path)}.csv"),
        "txt": word(f"{stem(path)}-text.txt"),
        "folder": word(f"{stem(path)}.d"),
        "parquet": word(path.with_name(f"{path.stem}.parquet")),
    }


def _other_encoding(encoding: str, source: Source, what: str, packed: bool) -> UserError:
    return UserError(f"{what} is {encoding}, not UTF-8 text\n       convert it: {_iconv(encoding, source, packed)}")


# ---- by a byte further on -------------------------------------------------------------------------------------------


def wrong_byte(
    source: Source, what: str, title: str, offset: int, before: bytes, after: bytes, foreign: bool
) -> UserError:
    """The error for the first byte of `after`. `foreign`: the file has UTF-8 beyond ASCII before it."""
    packed = isinstance(source, Path) and is_gzip(source)
    wrong = f"{title}: byte {after[0]:#04x} at offset {offset}"
    some = after[:1024]
    if some.startswith(tuple(MARKS)) or (some.count(0) > 4 and (wide(some) or wide(some[1:]))):
        return UserError(
            f"{what} is UTF-16 or UTF-32 from offset {offset} on: files in several encodings were joined\n"
            "       make UTF-8 of each before you join them: iconv -f UTF-16 -t UTF-8 PART > part-utf8.txt"
        )
    if b"\0" in before[-1024:] + some:
        if after[0] or not is_text(some.replace(b"\0", b"")):
            return UserError(f"{wrong}\n       it is a binary file; give its text, or leave it out")
        tool = "tr -d '\\000'" if packed else "tr -d '\\000' <"  # tr takes no file names
        return UserError(f"{wrong}\n       take such bytes out: {filtered(tool, source, converted(source), packed)}")
    begun = 0xC2 <= after[0] <= 0xF4 and 1 < len(after) < 4 and all(0x80 <= byte < 0xC0 for byte in after[1:])
    if foreign or begun or after in (b"\xc2", b"\xc3"):  # the last character is incomplete
        without = _iconv("UTF-8", source, packed, "-c ")
        return UserError(
            f"{wrong}\n       all before it is UTF-8, so the file is damaged\n"
            f"       fetch it again, or leave out what is wrong: {without}"
        )
    some = before[-1024:] + some
    runs = HIGH.findall(some)
    high = b"".join(runs)
    in_words = sum(len(run) for run in runs if len(run) > 2)  # western texts have at most two in a row
    if not {0x81, 0x8D, 0x8F, 0x90, 0x9D}.isdisjoint(high) or (len(high) > 3 and 2 * in_words > len(high)):
        command = _iconv("ENCODING", source, packed)
        return UserError(f"{wrong}\n       convert it, ENCODING being one that iconv -l lists: {command}")
    western = "CP1252" if any(byte < 0xA0 for byte in high) else "LATIN1"
    return UserError(f"{wrong}\n       convert it first, for example: {_iconv(western, source, packed)}")


def _iconv(encoding: str, source: Source, packed: bool, flags: str = "") -> str:
    """The command that converts a file to UTF-8."""
    return filtered(f"iconv {flags}-f {encoding} -t UTF-8", source, converted(source), packed)
