"""Tokenizers across the border: tokenizer.json, or vocab.json and merges.txt, to our rank file, and ours to theirs.

They list the pairs that may merge, in order; a rank file lists the tokens, in order, and any two neighbours that make
one of them merge. Both give the same ids for all text if each token, spelled out and merged by the ranks below its own,
ends as the very pair that makes it. That is checked here, token by token, in both directions.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nanogpt_jax.config import UserError
from nanogpt_jax.data.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, byte_symbols

END_OF_TEXT = "<|endoftext|>"
Pair = tuple[bytes, bytes]

# ---- theirs to ours -------------------------------------------------------------------------------------------------

ONE_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": True}


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in transformers' files; None where there are none.

    UserError where it is neither of GPT-2's kind nor a tokenizer of characters, as `tokenizer_files` writes them.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        about = _json(path)
        if about.get("pre_tokenizer") == ONE_CHARACTER:
            return _characters(path, about)
        vocab, merges, added = _from_tokenizer_json(path, about)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        path = folder / "vocab.json"
        vocab, merges, added = _from_vocab_and_merges(path, folder / "merges.txt")
    else:
        return None
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and _json(settings).get("add_prefix_space"):
        _refuse(settings, "add_prefix_space is true, so that it is another tokenizer than GPT-2's")
    return GPT2Tokenizer(_rank_file(_ranks(path, vocab, merges, added)))


def _refuse(path: Path, why: str) -> NoReturn:
    raise UserError(
        f"{path}: {why}\n       only byte-level BPE with GPT-2's pattern can be imported, and the characters that "
        "export-hf writes; --tokenizer DIR takes the tokenizer from another directory"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged: {e}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return found


def _characters(path: Path, about: dict[str, Any]) -> CharTokenizer:
    model = about.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict) and (characters := [c for c in vocab if len(c) == 1 and not "\ud800" <= c <= "\udfff"]):
        tokenizer = CharTokenizer.make(characters, END_OF_TEXT in vocab)
        ours = json.loads(tokenizer_files(tokenizer, 0)["tokenizer.json"])
        if all(about.get(name) == ours[name] for name in ("normalizer", "post_processor", "model")):
            return tokenizer
    _refuse(path, "it is no tokenizer of characters as export-hf writes it, in the order of their code points")


def _from_tokenizer_json(
    path: Path, about: dict[str, Any]
) -> tuple[dict[str, int], list[Sequence[str]], dict[int, str]]:
    model, before = about.get("model"), about.get("pre_tokenizer")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "merges" not in model:
        _refuse(path, f"its model is {model.get('type') if isinstance(model, dict) else model!r}, not BPE")
    for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
        if model.get(name) and model[name] != END_OF_TEXT:
            _refuse(path, f"its model has {name}={model[name]!r}")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if not isinstance(before, dict) or {name: before.get(name, True) for name in byte_level} != byte_level:
        _refuse(path, f"its pre_tokenizer is {json.dumps(before)}")
    if about.get("normalizer"):
        _refuse(path, f"it normalizes text ({json.dumps(about['normalizer'])})")
    try:
        merges: list[Sequence[str]] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        added = {int(token["id"]): str(token["content"]) for token in about.get("added_tokens") or []}
        return dict(model["vocab"]), merges, added
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path} is damaged: it describes no tokenizer ({e})") from None


def _from_vocab_and_merges(path: Path, merges: Path) -> tuple[dict[str, int], list[Sequence[str]], dict[int, str]]:
    vocab = _json(path)
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {merges}: {e}") from None
    pairs: list[Sequence[str]] = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    added = {vocab[END_OF_TEXT]: END_OF_TEXT} if END_OF_TEXT in vocab else {}
    return vocab, pairs, added


def _ranks(
    path: Path, vocab: dict[str, int], merges: Iterable[Sequence[str]], added: dict[int, str]
) -> dict[bytes, int]:
    """Token -> id, all ids from 0 but one, which is the end of the text."""
    byte_of = {symbol: byte for byte, symbol in byte_symbols().items()}

    def spelled(symbols: str) -> bytes:
        try:
            return bytes(byte_of[symbol] for symbol in symbols)
        except KeyError as e:
            _refuse(path, f"token {symbols!r} has a character {e} that stands for no byte")

    ranks = {spelled(token): rank for token, rank in vocab.items() if rank not in added}
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent:
        _refuse(path, f"{len(absent)} of the 256 bytes have no token, so that it cannot say every text")
    end = [rank for rank, token in added.items() if token == END_OF_TEXT]
    if not end:
        _refuse(path, f"it has no {END_OF_TEXT}")
    if sorted([*ranks.values(), *end]) != list(range(len(ranks) + 1)):
        _refuse(path, f"the ids of its tokens and of {END_OF_TEXT} are not 0 to {len(ranks)}")
    pairs = [(spelled(pair[0]), spelled(pair[1])) for pair in merges if len(pair) == 2]
    order = [ranks.get(left + right, -1) for left, right in pairs]
    if len(pairs) != len(ranks) - 256 or order != sorted(set(order)) or -1 in order:
        _refuse(path, "its merges do not make its tokens one by one, in the order of their ids")
    for pair in pairs:
        if (own := _merge_of(pair[0] + pair[1], ranks)) != pair:
            _refuse(path, f"its merge {pair} is not how its other merges would spell it ({own})")
    return ranks


def _rank_file(ranks: dict[bytes, int]) -> bytes:
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in in_order)


def _merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, ...]:
    """`token` spelled out and merged, lowest rank first, by the ranks below its own: the pair that makes it."""
    parts, most = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        found = [ranks.get(parts[i] + parts[i + 1], most) for i in range(len(parts) - 1)]
        least = min(found)
        if least >= most:
            break
        i = found.index(least)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


# ---- ours to theirs -------------------------------------------------------------------------------------------------


def tokens_and_merges(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Of byte pairs: byte-level symbols -> id, without the end of the text, and the pairs that merge, in order."""
    symbol = byte_symbols()

    def symbols(token: bytes) -> str:
        return "".join(symbol[byte] for byte in token)

    ranks = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.n_vocab) if i != tokenizer.end_of_text}
    pairs = []
    for token in (t for t in sorted(ranks, key=lambda t: ranks[t]) if len(t) > 1):
        pair = _merge_of(token, ranks)
        if len(pair) != 2:
            raise UserError(f"token {ranks[token]} ({token!r}) cannot be merged from two others: no BPE, no export")
        pairs.append((symbols(pair[0]), symbols(pair[1])))
    return {symbols(token): rank for token, rank in ranks.items()}, pairs


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, str]:
    """Name -> content of the files from which `AutoTokenizer.from_pretrained` makes a tokenizer with the same ids."""
    files: dict[str, Any] = {}
    settings: dict[str, Any] = {"model_max_length": block_size, "clean_up_tokenization_spaces": False}
    about: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None}
    if isinstance(tokenizer, CharTokenizer):
        vocab, end = {tokenizer.decode([i]): i for i in range(tokenizer.n_vocab)}, tokenizer.end_of_text
        about |= {
            "added_tokens": [] if end is None else [{"id": end, "content": END_OF_TEXT, **SPECIAL}],
            "pre_tokenizer": ONE_CHARACTER,
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            # no token says "unknown": a character that the vocabulary lacks is an error, there as here
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unknown>"},
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
