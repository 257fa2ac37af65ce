"""Converts tokenizers: tokenizer.json, or vocab.json and merges.txt, to our rank file, and ours to theirs.

Their files list the pairs that may merge, in order. A rank file lists the tokens, in order: two neighbours may merge if
they form a token. Both give the same ids for all text if each token, spelled out and merged by the ranks below its own,
ends as exactly the pair that forms it. That is checked here, token by token, in both directions.

Whatever else in their files would give other ids or another text is refused by name.
"""

import base64
import heapq
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nanogpt_jax.config import UserError
from nanogpt_jax.data.tokenizer import END_OF_TEXT, CharTokenizer, GPT2Tokenizer, Tokenizer, WordTokenizer, byte_symbols
from nanogpt_jax.host.messages import first_line
from nanogpt_jax.interop.json_file import is_file, read_object, shown

Pair = tuple[bytes, bytes]

# ---- theirs to ours -------------------------------------------------------------------------------------------------

ONE_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": True}
# the classes of transformers that add nothing to the files
CLASSES = ("GPT2Tokenizer", "PreTrainedTokenizer", "TokenizersBackend", "CodeGenTokenizer", "GPTNeoXTokenizer")
# settings in tokenizer_config.json that change the ids of a text
SWITCHES = ("add_prefix_space", "add_bos_token", "add_eos_token", "do_lower_case", "auto_map")


def read_tokenizer(folder: Path, note: Callable[[str], object] = lambda _: None) -> Tokenizer | None:
    """The tokenizer in transformers' files; None if there are none.

    UserError if it is neither of GPT-2's kind nor a tokenizer of characters, as `tokenizer_files` writes them. `note`
    is called with a message about each setting that is ignored, as transformers ignores it too.
    """
    path, merges = folder / "tokenizer.json", folder / "merges.txt"
    ends = _ends_beside(folder)
    if is_file(path):
        about = read_object(path)
        _check_steps(path, about)
        for name in ("truncation", "padding"):
            if about.get(name) is not None:
                note(f"{path} sets {name}, which is ignored: texts are neither cut nor padded")
        ends |= _ends_in_list(path, about.get("added_tokens"))
        if about.get("pre_tokenizer") == ONE_CHARACTER:
            tokenizer = _characters(path, about, ends)
        else:
            tokenizer = _byte_pairs(path, about.get("model"), ends)
    elif is_file(path := folder / "vocab.json") and is_file(merges):
        vocab = read_object(path)
        ends |= {vocab[END_OF_TEXT]} if type(vocab.get(END_OF_TEXT)) is int else set()
        tokenizer = GPT2Tokenizer(_rank_file(_ranks(path, merges, vocab, _lines_of(merges), ends)))
    else:
        return None
    return tokenizer


def _refuse(path: Path, why: str) -> NoReturn:
    raise UserError(
        f"{path}: {why}\n       only byte-level BPE with GPT-2's pattern can be imported, and the characters that "
        "export-hf writes; --tokenizer DIR takes the tokenizer from another directory"
    )


def _ends_beside(folder: Path) -> set[int]:
    """The ids of end-of-text in the other files. UserError if those files change the ids of a text."""
    ends: set[int] = set()
    if is_file(path := folder / "added_tokens.json"):
        for token, rank in read_object(path).items():
            _check_token(path, "it", {"content": token})
            ends.add(_id(path, rank))
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        settings = read_object(path) if is_file(path) else {}
        for name in SWITCHES:
            if settings.get(name):
                value = "true" if settings[name] is True else shown(settings[name])
                _refuse(path, f"{name} is {value}, so that it differs from GPT-2's tokenizer")
        kind = settings.get("tokenizer_class")
        if kind is not None and (not isinstance(kind, str) or kind.removesuffix("Fast") not in CLASSES):
            _refuse(path, f"tokenizer_class is {shown(kind)}, whose own code takes part")
        if not isinstance(settings.get("added_tokens_decoder"), dict | None):
            raise UserError(f"{path} is damaged: its added_tokens_decoder is not an object")
        for name, value in settings.items():
            if name.endswith("_token") or "special_tokens" in name or name == "added_tokens_decoder":
                for token in _tokens_in(value):
                    _check_token(path, name, token)
        decoder = settings.get("added_tokens_decoder")
        ends |= {_id(path, int(rank) if rank.isdecimal() and len(rank) < 11 else rank) for rank in decoder or {}}
    return ends


def _tokens_in(value: Any) -> Iterator[dict[str, Any]]:
    """Tokens in any of transformers' forms: a text, an object with `content`, lists and objects of these."""
    if isinstance(value, dict) and "content" in value:
        yield value
    elif isinstance(value, dict | list):
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _tokens_in(inside)
    elif value is not None and not isinstance(value, bool):
        yield {"content": value}


def _check_token(path: Path, where: str, token: dict[str, Any]) -> None:
    """UserError unless an added token, which is searched for in a text before all else, is end-of-text."""
    if token["content"] != END_OF_TEXT:
        _refuse(path, f"{where} has the added token {shown(token['content'])}, and {END_OF_TEXT} is the only one here")
    for flag in ("lstrip", "rstrip", "single_word"):
        if token.get(flag):
            _refuse(path, f"{where} has {END_OF_TEXT} with {flag}, which would change the text beside it")


def _ends_in_list(path: Path, added: Any) -> set[int]:
    """The ids of end-of-text among tokenizer.json's `added_tokens`."""
    if not isinstance(added, list | None) or not all(isinstance(t, dict) and "content" in t for t in added or []):
        raise UserError(f"{path} is damaged: its added_tokens are {shown(added)}")
    for token in added or []:
        _check_token(path, "added_tokens", token)
    return {_id(path, token.get("id")) for token in added or []}


def _id(path: Path, rank: Any) -> int:
    if type(rank) is not int or not 0 <= rank < 1 << 31:
        raise UserError(f"{path} is damaged: a token has the id {shown(rank)}")
    return rank


def _check_steps(path: Path, about: dict[str, Any]) -> None:
    """UserError if a step before or after the model changes the ids of a text, or the text of ids."""
    before, pieces = _steps(about.get("pre_tokenizer"), "pretokenizers"), about.get("pre_tokenizer")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    plain = len(before) == 1 and isinstance(before[0], dict)
    if pieces != ONE_CHARACTER and not (plain and {n: before[0].get(n, True) for n in byte_level} == byte_level):
        _refuse(path, f"its pre_tokenizer is {shown(pieces)}")
    if _steps(about.get("normalizer"), "normalizers"):
        _refuse(path, f"it normalizes text ({shown(about['normalizer'])})")
    for step in _steps(about.get("post_processor"), "processors"):
        kind = step.get("type") if isinstance(step, dict) else None
        text_alone = kind == "TemplateProcessing" and step.get("single") == [{"Sequence": {"id": "A", "type_id": 0}}]
        if kind != "ByteLevel" and not text_alone:
            _refuse(path, f"its post_processor, {shown(step)}, adds tokens to each text")
    expected = "Fuse" if pieces == ONE_CHARACTER else "ByteLevel"
    decoder = _steps(about.get("decoder"), "decoders")
    if len(decoder) != 1 or not isinstance(decoder[0], dict) or decoder[0].get("type") != expected:
        _refuse(path, f"its decoder is {shown(about.get('decoder'))}, not {expected}: it would write another text")


def _steps(step: Any, inside: str) -> list[Any]:
    """The steps of a Sequence, as a list; a single step is one, and null is none."""
    if isinstance(step, dict) and step.get("type") == "Sequence" and isinstance(step.get(inside), list):
        return [x for part in step[inside] for x in _steps(part, inside)]
    return [] if step is None else [step]


def _characters(path: Path, about: dict[str, Any], ends: set[int]) -> CharTokenizer:
    model = about.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict) and (characters := [c for c in vocab if len(c) == 1 and not "\ud800" <= c <= "\udfff"]):
        tokenizer = CharTokenizer.make(["".join(characters)], END_OF_TEXT in vocab)
        end = set() if tokenizer.end_of_text is None else {tokenizer.end_of_text}
        if about.get("post_processor") is None and model == _word_level(tokenizer) and ends == end:
            return tokenizer
    _refuse(path, "it is not a tokenizer of characters as export-hf writes it, in the order of their code points")


def _byte_pairs(path: Path, model: Any, ends: set[int]) -> GPT2Tokenizer:
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "merges" not in model:
        _refuse(path, f"its model is {shown(model.get('type') if isinstance(model, dict) else model)}, not BPE")
    for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
        if model.get(name) and (name, model[name]) != ("unk_token", END_OF_TEXT):
            _refuse(path, f"its model has {name}={shown(model[name])}")
    vocab, merges = model.get("vocab"), model["merges"]
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise UserError(f"{path} is damaged: its model has no vocab, or no list of merges")
    return GPT2Tokenizer(_rank_file(_ranks(path, path, vocab, merges, ends)))


def _lines_of(merges: Path) -> list[str]:
    try:
        lines = merges.read_text(encoding="utf-8-sig").split("\n")
    except OSError as e:
        raise UserError(f"cannot read {merges}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{merges} is damaged: it is not UTF-8 text ({first_line(e)})") from None
    return [line for line in lines if line and not line.startswith("#version")]


def _ranks(path: Path, place: Path, vocab: dict[str, Any], merges: Sequence[Any], ends: set[int]) -> dict[bytes, int]:
    """Token -> id: all ids from 0 except that of end-of-text. `place`: the file with the merges."""
    # a symbol without a byte becomes a character above U+00FF
    byte_of = dict.fromkeys(range(256), "\uffff") | {ord(symbol): chr(byte) for byte, symbol in byte_symbols().items()}

    def spelled(symbols: str) -> bytes:
        try:
            return symbols.translate(byte_of).encode("latin-1")
        except UnicodeEncodeError as e:
            _refuse(path, f"token {shown(symbols)} has a character {symbols[e.start]!r} that represents no byte")

    if not ends:
        _refuse(path, f"it has no {END_OF_TEXT}")
    if ends != {vocab.get(END_OF_TEXT, len(vocab))}:
        _refuse(path, f"the id of {END_OF_TEXT} is not one and the same in all its files, or not the next one")
    (end,) = ends
    ranks = {spelled(token): _id(path, rank) for token, rank in vocab.items() if token != END_OF_TEXT}
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent:
        _refuse(path, f"{len(absent)} of the 256 bytes have no token, so that it cannot encode every text")
    if sorted([*ranks.values(), end]) != list(range(len(ranks) + 1)):
        _refuse(path, f"the ids of its tokens and of {END_OF_TEXT} are not 0 to {len(ranks)}")
    pairs: dict[bytes, Pair] = {}
    before = -1
    for i, merge in enumerate(merges):
        two = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(two, list) or len(two) != 2 or not all(isinstance(part, str) and part for part in two):
            _refuse(place, f"merge {i}, {shown(merge)}, is not of two tokens")
        left, right = spelled(two[0]), spelled(two[1])
        rank = ranks.get(left + right, -1)
        if rank <= before:
            _refuse(place, f"its merges do not make its tokens one by one, in the order of their ids (merge {i})")
        before = rank
        if not _made_of(left, right, rank, ranks, pairs):
            _refuse(place, f"its merge {i}, {shown(merge)}, is not how its other merges would spell it")
        pairs[left + right] = left, right
    if len(pairs) != len(ranks) - 256:
        _refuse(place, f"its merges do not make its tokens one by one: {len(ranks) - 256 - len(pairs)} have none")
    return ranks


def _made_of(left: bytes, right: bytes, rank: int, ranks: dict[bytes, int], pairs: dict[bytes, Pair]) -> bool:
    """Whether the bytes of both, merged by the ranks below `rank`, end as `left` and `right`.

    `pairs` has the pair that forms each longer token of a lower rank, so the merges of each half are known. They are
    undone, the last one first. The answer is no if the two parts that meet in the middle would have merged earlier.
    """
    if any(len(half) > 1 and half not in pairs for half in (left, right)):
        return False
    limit = rank
    while ranks.get(left + right, limit) >= limit:
        if len(left) == 1 == len(right):
            return True
        if len(right) == 1 or (len(left) > 1 and ranks[left] > ranks[right]):
            limit, left = ranks[left], pairs[left][1]
        else:  # at equal rank, the left pair merges first
            limit, right = ranks[right] + 1, pairs[right][0]
    return False


def _rank_file(ranks: dict[bytes, int]) -> bytes:
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in in_order)


def _merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, ...]:
    """`token` spelled out and merged, lowest rank first, by the ranks below its own: the pair that forms it."""
    n, most = len(token), ranks[token]
    end, before = list(range(1, n + 1)), list(range(-1, n - 1))  # of the part that begins here; 0: none does
    found: list[tuple[int, int, int]] = []  # rank, begin and end of two neighbours that may merge

    def find(start: int, stop: int) -> None:
        if (rank := ranks.get(token[start:stop], most)) < most:
            heapq.heappush(found, (rank, start, stop))

    for i in range(n - 1):
        find(i, i + 2)
    while found:
        _, start, stop = heapq.heappop(found)
        middle = end[start]
        if not start < middle < stop or end[middle] != stop:  # one of the two has merged meanwhile
            continue
        end[start], end[middle] = stop, 0
        if stop < n:
            before[stop] = start
            find(start, end[stop])
        if start:
            find(before[start], stop)
    starts = [i for i in range(n) if end[i]]
    return tuple(token[i : end[i]] for i in starts)


# ---- ours to theirs -------------------------------------------------------------------------------------------------


def tokens_and_merges(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """For byte pairs: byte-level symbols -> id, without end-of-text, and the pairs that merge, in order."""
    symbol = byte_symbols()

    def symbols(token: bytes) -> str:
        return token.decode("latin-1").translate(symbol)

    ranks = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.n_vocab) if i != tokenizer.end_of_text}
    pairs = []
    for token in (t for t in sorted(ranks, key=lambda t: ranks[t]) if len(t) > 1):
        pair = _merge_of(token, ranks)
        if len(pair) != 2:
            raise UserError(
                f"token {ranks[token]} ({shown(token)}) is not made of two others; only BPE can be exported"
            )
        pairs.append((symbols(pair[0]), symbols(pair[1])))
    if (rank := ranks.get(END_OF_TEXT.encode())) is not None:
        raise UserError(
            f"token {rank} is the text {END_OF_TEXT}, which is the name of token {tokenizer.end_of_text}, too\n"
            "       their files cannot have two tokens of one name, so this cannot be exported"
        )
    return {symbols(token): rank for token, rank in ranks.items()}, pairs


def _word_level(tokenizer: CharTokenizer) -> dict[str, Any]:
    """The `model` in tokenizer.json for a tokenizer of characters."""
    end = tokenizer.end_of_text
    vocab = {c: i for i, c in enumerate(tokenizer.decode(range(tokenizer.n_vocab - (end is not None))))}
    vocab |= {} if end is None else {END_OF_TEXT: end}
    # no token for unknown characters: they are errors, as in ours
    return {"type": "WordLevel", "vocab": vocab, "unk_token": "<unknown>"}


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, str]:
    """Name -> content of the files from which `AutoTokenizer.from_pretrained` makes a tokenizer with the same ids."""
    if isinstance(tokenizer, WordTokenizer):
        raise UserError(
            "the run's tokenizer is of words (data.tokenizer=word); transformers splits text by rules of its own\n"
            "       to export a model, train it with --data.tokenizer=char or bpe:1024"
        )
    files: dict[str, Any] = {}
    settings: dict[str, Any] = {"model_max_length": block_size, "clean_up_tokenization_spaces": False}
    about: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None}
    if isinstance(tokenizer, CharTokenizer):
        end = tokenizer.end_of_text
        about |= {
            "added_tokens": [] if end is None else [{"id": end, "content": END_OF_TEXT, **SPECIAL}],
            "pre_tokenizer": ONE_CHARACTER,
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": _word_level(tokenizer),
        }
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= {} if end is None else {"eos_token": END_OF_TEXT}
    else:
        vocab, merges = tokens_and_merges(tokenizer)
        assert tokenizer.end_of_text is not None
        vocab = dict(sorted([*vocab.items(), (END_OF_TEXT, tokenizer.end_of_text)], key=lambda item: item[1]))
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        about |= {
            "added_tokens": [{"id": tokenizer.end_of_text, "content": END_OF_TEXT, **SPECIAL}],
            "pre_tokenizer": byte_level,
            "post_processor": {**byte_level, "trim_offsets": False},
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": vocab,
                "merges": [list(pair) for pair in merges],
            },
        }
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        settings |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **special}
        files["vocab.json"] = vocab
        files["special_tokens_map.json"] = special
    texts = {name: json.dumps(content, ensure_ascii=False) + "\n" for name, content in files.items()}
    for name, content in {"tokenizer.json": about, "tokenizer_config.json": settings}.items():
        texts[name] = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    if not isinstance(tokenizer, CharTokenizer):
        pairs = about["model"]["merges"]
        texts["merges.txt"] = "".join(["#version: 0.2\n", *(f"{left} {right}\n" for left, right in pairs)])
    return texts
