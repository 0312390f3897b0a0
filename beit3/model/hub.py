"""Models on the Hugging Face Hub: `hf-hub:organisation/name[@revision]` to a local folder, and back.

Caches and switches are the Hub library's own: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from beit3.errors import BeitError, ConfigError, DataMissingError

PREFIX = "hf-hub:"
_FILES = ("*.json", "*.safetensors", "*.spm", "README.md")


def local_path(source: str | Path, **options: Any) -> Path:
    """Where a source lies on this machine; what is named `hf-hub:...` is downloaded first, or found in the cache.

    Args:
        source: path, or name of a repository.
        **options: of `huggingface_hub.snapshot_download`, such as `token` and `cache_dir`.

    Raises:
        ConfigError: not the name of a repository.
        DataMissingError: no such repository or revision, or the Hub cannot be reached and the cache lacks it.
    """
    if not str(source).startswith(PREFIX):
        return Path(source)
    name, _, revision = str(source).removeprefix(PREFIX).partition("@")
    try:
        place = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=list(_FILES), **options
        )
        return Path(str(place))
    except HFValidationError as error:
        raise ConfigError(f"'{source}' is no name of a repository: write {PREFIX}organisation/name") from error
    except LocalEntryNotFoundError as error:
        raise DataMissingError(
            f"{source} is not in the local cache and the Hub cannot be reached: check the connection and HF_HUB_OFFLINE"
        ) from error
    except Exception as error:  # those of the HTTP client have no base that all its versions share
        raise DataMissingError(f"{source} cannot be read from the Hub: {_reason(error)}") from error


def check_name(name: str) -> None:
    """Refuse what is not the name of a repository, with a `ConfigError`."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"'{name}' is no name of a repository: write organisation/name") from error


def publish(folder: Path, name: str, *, private: bool) -> str:
    """Upload an exchange folder as the repository `name`, which is made if need be; returns the commit's address.

    Raises:
        BeitError: the Hub refused, or cannot be reached.
    """
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(name, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Upload {folder.name}"))
    except Exception as error:  # as above
        raise BeitError(
            f"{name} was not published: {_reason(error)}; log in with `hf auth login`, and check the connection"
        ) from error


def _reason(error: Exception) -> str:
    """First line of an error, or what kind it is."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
