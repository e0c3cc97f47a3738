"""Files from the model hub: from its cache, else by download, else a clear error within seconds."""

from __future__ import annotations

import os
import queue
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from featstore.errors import InvalidInputError, NotFoundError

CONNECT_S = 6.0
"""How long the hub may take to answer before it counts as out of reach."""


def weight_names(filename: str) -> tuple[str, ...]:
    """List the names that weights may have on a page, the safer format first."""
    if not filename:
        return ("model.safetensors", "pytorch_model.bin")
    if filename == "open_clip_pytorch_model.bin":
        return ("open_clip_model.safetensors", filename)
    stem, dot, ending = filename.rpartition(".")
    return (f"{stem}.safetensors", filename) if dot and ending == "bin" else (filename,)


def fetch(page: str, filenames: Sequence[str], *, name: str) -> Path:
    """Give the local path of the first of `filenames` that a page of the hub has.

    A cached file is taken without asking the hub, so that a machine without network does not
    wait for it.

    Args:
        page: ``ORG/REPOSITORY``, with ``@REVISION`` where it matters.
        filenames: Names that will do, best first.
        name: The backbone, for the message.

    Raises:
        InvalidInputError: `page` is not the name of a page.
        NotFoundError: The file is not cached, and the hub does not give it.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = page.partition("@")
    try:
        for filename in filenames:
            found = huggingface_hub.try_to_load_from_cache(
                repository, filename, revision=revision or None
            )
            if isinstance(found, str):
                return Path(found)
    except HFValidationError as error:
        raise InvalidInputError(
            f"{page!r} is not the name of a page of the model hub. Write hf-hub:ORG/REPOSITORY."
        ) from error
    is_offline = constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") in ("1", "true")
    if is_offline or not _answers(constants.ENDPOINT):
        raise unreachable(name, page)
    return _download(repository, revision or None, filenames, name)


def _download(repository: str, revision: str | None, filenames: Sequence[str], name: str) -> Path:
    """Download the first of `filenames` that is there."""
    import huggingface_hub
    from huggingface_hub import errors

    for filename in filenames:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, filename, revision=revision))
        except errors.RemoteEntryNotFoundError:
            continue
        except errors.GatedRepoError as error:
            raise NotFoundError(
                f"The weights of {name} ({repository}) are given out to those who accept their "
                "licence: accept it on that page, run `hf auth login`, and run this again."
            ) from error
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            raise NotFoundError(
                f"The model hub has no page {repository}"
                f"{f' with a revision {revision}' if revision else ''}, or it is private."
            ) from error
        except (OSError, _client_error()) as error:
            raise unreachable(name, repository) from error
    raise NotFoundError(f"The page {repository} has none of {', '.join(filenames)}.")


def _client_error() -> type[Exception]:
    """Give the base of the errors of the HTTP client, which differs between hub versions."""
    from huggingface_hub import errors

    base: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    return base


def unreachable(name: str, page: str) -> NotFoundError:
    """Say that weights are not at hand, where they were looked for, and what to do."""
    from huggingface_hub import constants

    return NotFoundError(
        f"The weights of {name} ({page}) are not in the cache folder "
        f"{constants.HF_HUB_CACHE}, and the model hub cannot be reached. Give a file with "
        "--weights FILE, or take a backbone whose weights are installed: efficientnet_lite0."
    )


def _answers(endpoint: str) -> bool:
    """Ask the hub once, by way of the proxy where one is set; any answer counts.

    The hub's own client retries for most of a minute, and looking a name up cannot be timed out:
    so the question is asked in a thread that is not waited for longer than `CONNECT_S`.
    """
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(_ask(endpoint)), daemon=True).start()
    try:
        return answers.get(timeout=CONNECT_S)
    except queue.Empty:
        return False


def _ask(endpoint: str) -> bool:
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=CONNECT_S).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # A certificate that Python's defaults refuse may be one that the hub's client accepts.
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, ValueError):
        return False
    return True
