"""Files of weights from anywhere: `.pth`, its `.zip` name, `.safetensors`, DeepSpeed's folders. Nothing in one is run.

torch's restricted reader builds tensors and plain containers, plain data of training scripts is read as `_Dropped`, and
any other class ends in one line that names it (unless the process has itself declared it safe to torch).
"""

from __future__ import annotations

import json
import os
import re
import struct
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from beit3.errors import ConfigError, DataMissingError

_WRAPPERS = ("model", "module")
_MOST_WRAPPERS = 8
"""Dictionaries around the weights that are opened; one that holds itself would have no end."""
_DEEPSPEED_FILE = "mp_rank_*_model_states.pt"
_MANIFESTS = "step-*/manifest.json"
"""Of checkpoints of this package's own runs, which are no models."""
_READING = threading.Lock()
"""The names that torch's reader knows belong to the whole process, so one file is read at a time."""


class _Dropped:
    """Stands for plain data beside the weights, such as training options: takes whatever it is given, keeps nothing."""

    def __init__(self, *parts: object) -> None:
        """Accept the arguments of any class."""

    def __setstate__(self, state: object) -> None:
        """Accept the content of any object."""


def _plain_dictionary(factory: object = None) -> dict[object, object]:
    """Stand for a default dictionary, whatever makes its defaults."""
    return {}


# No real class is named here: numpy's, for one, trust the sizes that a file gives them.
_STAND_INS: list[Callable[..., object] | tuple[Callable[..., object], str]] = [
    (_plain_dictionary, "collections.defaultdict"),
    *(
        (_Dropped, name)
        for name in (
            "argparse.Namespace",
            *(f"builtins.{kind}" for kind in ("bool", "dict", "float", "frozenset", "int", "list", "str", "tuple")),
            *(f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
            *(f"{module}.Pure{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
            *(f"numpy.{core}.multiarray.{make}" for core in ("core", "_core") for make in ("_reconstruct", "scalar")),
            "numpy.dtype",
            "numpy.ndarray",
        )
    ),
]
"""What training scripts store beside the weights, and what is built instead. torch's reader itself knows tensors,
`OrderedDict`, `Counter`, `set`, `torch.Size`, `torch.device` and `torch.dtype`."""


def read_official(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a released file, or of one in its layout, without running anything in it.

    Args:
        path: a `.pth` file, or the same file under the name `.zip` that some browsers give it; a `.safetensors` file;
            DeepSpeed's `mp_rank_00_model_states.pt`, its `checkpoint-N` folder, or the folder of its `latest` file.

    Returns:
        Weights under the file's names and in its types, on the CPU, mapped from disk where the format allows.

    Raises:
        DataMissingError: no such file.
        ConfigError: another folder, a file that is damaged or no checkpoint, or one that holds more than weights and
            plain data; the message names the class that is refused.
    """
    path = _find_file(Path(path))
    try:
        content = load_safetensors(path) if path.suffix == ".safetensors" else _load(path)
        if not isinstance(content, Mapping):
            raise ConfigError(f"it holds a {type(content).__name__}, not named weights")
        state = unwrap(content)
        _check_storage(state)
    except Exception as error:  # damaged bytes raise nearly anything
        raise ConfigError(f"{path} is not read: {_reason(error)}") from error
    return state


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors` file, mapped from disk.

    Raises:
        SafetensorError: it is damaged, or names a tensor twice, which safetensors itself does not mind.
    """
    state: dict[str, Tensor] = load_file(path)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        json.loads(file.read(length), object_pairs_hook=_refuse_doubles)
    return state


def _refuse_doubles(pairs: list[tuple[str, object]]) -> None:
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise SafetensorError(f"two entries are named {listed(twice)}")


def unwrap(content: Mapping[str, object]) -> dict[str, Tensor]:
    """Take the weights out of the dictionaries that training scripts wrap around them."""
    for _ in range(_MOST_WRAPPERS):
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if not isinstance(inner, Mapping):
            break
        content = inner
    others = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise ConfigError(f"it is no file of weights: no named tensors under {listed(others)}")
    # Parameters and tensors with attributes of their own become bare tensors.
    return {key: Tensor.detach(value) for key, value in content.items() if isinstance(value, Tensor)}


def listed(names: Mapping[str, object] | Sequence[object], most: int = 5) -> str:
    """Names out of a file, the first of them, for an error line."""
    items = list(names)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(shown, items[:most])) + more


def shown(name: object, most: int = 120) -> str:
    """A name out of a file, fit for one line of a terminal."""
    text = str(name)
    text = text if text.isprintable() else text.encode("unicode_escape").decode()
    return text if len(text) <= most else f"{text[:most]}..."


def _load(path: Path) -> object:
    """Read a file by torch's restricted reader: containers, tensors and stand-ins; no class is looked up by name."""
    archive = zipfile.is_zipfile(path)
    if archive:
        _check_archive(path)
    with _READING, warnings.catch_warnings(), torch.serialization.safe_globals(_STAND_INS):
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)


def _check_archive(path: Path) -> None:
    """Refuse zip files that torch has not written: their parts are not numbers as they lie in memory."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if not any(name.endswith("data.pkl") for name in names):
        raise ConfigError(
            f"it is a zip archive of {listed(names, 3) or 'nothing'}, not a checkpoint: "
            "if a .pth file is in it, unpack that and give it"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ConfigError("an archive program has unpacked and compressed it: download the .pth file again")


def _check_storage(state: Mapping[str, Tensor]) -> None:
    """Refuse tensors whose numbers are not all in the file: a few bytes could claim to be a model of any size."""
    absent = [
        key
        for key, value in state.items()
        if value.layout is not torch.strided
        or value.device.type != "cpu"
        or value.numel() * value.element_size() > value.untyped_storage().nbytes()
    ]
    if absent:
        raise ConfigError(f"it holds sparse, repeated or missing numbers, no plain tensors, under {listed(absent)}")


def _reason(error: Exception) -> str:
    """Why a file is not read, in one line: torch's own advice is long, and is to switch its protection off."""
    if isinstance(error, ConfigError):
        return str(error)
    if match := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"it holds '{shown(match[1])}', which is no plain data, so that reading it could run code; "
            "where the file was made, save {'model': model.state_dict()} with torch.save and give that file"
        )
    if isinstance(error, PermissionError):
        return "this user may not read it"
    return (
        "it is damaged, or no file of weights as torch.save and safetensors write them by default: "
        "download it, or save it, again"
    )


def _find_file(path: Path) -> Path:
    """The file that holds the weights: the path itself, or the one in a folder that DeepSpeed has written."""
    if os.path.isdir(path):  # unlike Path's, this answers for names of any length
        own = path / "manifest.json"
        if any(path.glob(_MANIFESTS)) or (own.match(_MANIFESTS) and own.is_file()):
            raise ConfigError(f"{path} holds checkpoints, for --resume alone: load the folder 'export' of their run")
        folder, latest = path, path / "latest"
        if latest.is_file() and not any(path.glob(_DEEPSPEED_FILE)):
            with latest.open(encoding="utf-8", errors="replace") as file:
                name = file.read(256).strip()
            if name not in [below.name for below in path.iterdir() if below.is_dir()]:
                raise ConfigError(f"{latest} names '{shown(name)}', which is no folder beside it: copy it again")
            folder = path / name
        path = next(folder.glob(_DEEPSPEED_FILE), folder)
        if path == folder:
            raise ConfigError(_explain_folder(folder))
    if not os.path.isfile(path):
        raise DataMissingError(f"{shown(path, 300)} does not exist: give the path of a downloaded .pth file")
    if path.match(_DEEPSPEED_FILE) and (ranks := len(list(path.parent.glob(_DEEPSPEED_FILE)))) > 1:
        raise ConfigError(
            f"{path.parent} holds a model cut into {ranks} parts (model parallelism of DeepSpeed): "
            "join them where it was trained, and save {'model': state_dict} with torch.save"
        )
    return path


def _explain_folder(path: Path) -> str:
    if any(path.glob("data.pkl")) or any(path.glob("*/data.pkl")):
        return (
            f"{path} is a checkpoint that a browser or an archive program has unpacked: "
            "download the .pth file again and do not open it (a .pth file is a zip archive)"
        )
    if any(path.glob("*zero_pp_rank_*")):
        return (
            f"{path} holds weights that DeepSpeed has divided among processes (ZeRO stage 3): "
            "run the zero_to_fp32.py that it put beside them, and give the file that this writes"
        )
    if steps := sorted(below.parent.name for below in path.glob(f"*/{_DEEPSPEED_FILE}")):
        return f"{path} holds checkpoints of DeepSpeed but no file 'latest': give one of the folders {listed(steps)}"
    return f"{path} is a folder without a checkpoint: give the path of the .pth file"
