"""Data sets by name, `hf:NAME`: of the Hugging Face hub, or a local folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanogpt_jax.config import UserError
from nanogpt_jax.data.corpus import Block, Corpus, safe, sha256_of_json, text_of
from nanogpt_jax.data.text_file import OnProgress
from nanogpt_jax.host import messages


class SourceFailed(UserError):
    """The source has become unreachable; what was read so far is valid."""


def open_dataset(
    what: str, name: str, config: str = "", *, split: str | None = None, streaming: bool = False, instead: str
) -> Any:
    """The result of `datasets.load_dataset`. Errors name the data set `what`, and `instead`, local files that would do.

    Asks the hub first, for at most 10 s: without a network, `datasets` itself would try for half a minute. Runs no code
    of others. SourceFailed if the hub cannot be reached, UserError for everything else.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it raises whatever it would print
    advice = f"connect to the network, or give {instead}"
    revision = None
    if Path(name).is_dir():
        name = str(Path(name).resolve())  # else `datasets` takes a folder called json for the format
    else:
        try:
            revision = huggingface_hub.HfApi().dataset_info(name, timeout=10).sha
        except OfflineModeIsEnabled:
            pass  # `datasets` may have it in its cache
        except (HfHubHTTPError, huggingface_hub.errors.HFValidationError) as e:
            reason = messages.first_line(e, 300)
            raise UserError(f"{what} is not a data set that the hub offers: {reason}\n       {advice}") from None
        except Exception as e:  # the HTTP library's own
            raise SourceFailed(
                f"{what} cannot be reached: {type(e).__name__}: {messages.first_line(e, 300)}\n       {advice}"
            ) from None
    try:
        return datasets.load_dataset(name, config or None, split=split, streaming=streaming, revision=revision)
    except Exception as e:  # from the libraries of the file formats
        reason = messages.cut(" ".join(str(e).split()) or type(e).__name__, 500)
        raise UserError(f"{what} cannot be opened: {reason}\n       {advice}") from None


# ---- as text


def corpus(source: str, field: str) -> Corpus:
    """`hf:NAME[:CONFIG][:FIELD]`: the split "train" of a data set, streamed. NAME may be a local folder.

    A data set of the hub is identified by its name, so that prepared tokens open without a network.
    """
    parts = source.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 3:
        raise UserError(f"data.source={source} must read hf:NAME[:CONFIG][:FIELD], like hf:allenai/c4:en:text")
    name, config, own_field = (*parts, "", "")[:3]
    field = own_field or field

    def blocks(on_progress: OnProgress) -> Iterator[Block]:
        stream, rows = _open_stream(source, name, config)
        for number, row in enumerate(_reachable(source, stream), start=1):
            yield text_of(row, field, f"data.source={source}, row {number}"), True
            if rows:
                on_progress(number / rows)

    local = [(str(f), s.st_size, s.st_mtime_ns) for f in sorted(Path(name).rglob("*")) if (s := f.lstat())]
    identity = sha256_of_json(["hf", name, config, field, local])
    return Corpus(safe(Path(name).name), identity, {"source": source, "field": field}, True, blocks)


def _open_stream(source: str, name: str, config: str) -> tuple[Any, int | None]:
    """The rows of the split "train", and how many they are if that is known."""
    files = "local .parquet or .jsonl files"
    stream = open_dataset(f"data.source={source}", name, config, split="train", streaming=True, instead=files)
    split = (stream.info.splits or {}).get("train")
    return stream, split.num_examples if split else None


def _reachable(source: str, stream: Any) -> Iterator[dict[str, Any]]:
    rows = iter(stream)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as e:  # the network's or a file's, from many libraries
            raise SourceFailed(
                f"data.source={source} broke off: {type(e).__name__}: {' '.join(str(e).split())[:500]}"
            ) from e
        yield row
