"""Opens data sets by name, `hf:NAME`: of the Hugging Face hub, or a local folder."""

from pathlib import Path
from typing import Any

from nanogpt_jax.config import UserError
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
