"""An index of embedded pictures, searched exactly.

Shapes: n pictures, D width, q queries.

An index is a folder: `vectors.npy` (n, D) float32 of unit length, `pictures.jsonl` (one row for each vector, by path),
`index.faiss` (exact inner products), `settings.json` (model and folder), `left_out.jsonl` if a picture could not be
read. `beit3.search.embed` makes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from beit3.config import config, require
from beit3.data.shards import IMAGE_SUFFIXES
from beit3.data.source import find_source
from beit3.errors import ConfigError, DataMissingError
from beit3.predict import Predictor
from beit3.search.pictures import LeftOut, Picture, suffix_of

Vectors = npt.NDArray[np.float32]
FORMAT_VERSION = 1

SETTINGS_FILE, LEFT_OUT_FILE = "settings.json", "left_out.jsonl"
_VECTORS, _PICTURES, _FAISS = "vectors.npy", "pictures.jsonl", "index.faiss"
FILES = frozenset({_VECTORS, _PICTURES, _FAISS, SETTINGS_FILE, LEFT_OUT_FILE})
_NOISE = 1e-5
"""Bound of the rounding error of an inner product of float32 unit vectors."""


class Hit(NamedTuple):
    """A picture that was found."""

    score: float
    """Inner product with the query, from -1 to 1."""
    path: Path


@config
class IndexSettings:
    """What an index was made of."""

    model: str
    """Source as `beit3.load` takes it; a path is absolute."""
    fingerprint: str
    """Of the model, see `fingerprint`."""
    width: int
    count: int
    folder: str
    """Where the pictures lay, absolute."""
    beit3: str
    """Version that wrote the index."""
    stamp: str = ""
    """Of the model's files, see `stamp`; empty: unknown."""
    image_size: int | None = None
    """Side in pixels that the model was loaded with, and queries are; None: its own."""
    tokenizer: str | None = None
    """`.spm` file that the model was loaded with, absolute; None: its own."""
    format_version: int = FORMAT_VERSION


class Index:
    """Vectors of pictures, searched exactly.

    Args:
        settings: what it was made of.
        pictures: n files, by path.
        vectors: (n, D) float32, unit length.
        inner_products: faiss index of the vectors.
    """

    def __init__(
        self, settings: IndexSettings, pictures: Sequence[Picture], vectors: Vectors, inner_products: Any
    ) -> None:
        self.settings = settings
        self.pictures = pictures
        self.vectors = vectors
        self._inner_products = inner_products

    @classmethod
    def load(cls, folder: Path | str) -> Index:
        """Open an index.

        Args:
            folder: written by `embed_folder` or `beit3 embed`.

        Raises:
            DataMissingError: there is no index.
            ConfigError: it is damaged or of another version, or faiss is not installed.
        """
        folder = Path(folder)
        faiss = import_faiss()
        if not (folder / SETTINGS_FILE).is_file():
            raise DataMissingError(f"{folder} holds no index: make one with beit3 embed PICTURES --out {folder}")
        try:
            raw = json.loads((folder / SETTINGS_FILE).read_text("utf-8"))
            version = raw.get("format_version")
            require(version == FORMAT_VERSION, f"{folder} is an index of format {version}: embed the folder again")
            settings = IndexSettings(**raw)
            lines = (folder / _PICTURES).read_text("utf-8").splitlines()
            pictures = [Picture(**json.loads(line)) for line in lines]
            vectors = np.asarray(np.load(folder / _VECTORS, mmap_mode="r"))
            inner_products = faiss.read_index(str(folder / _FAISS))
        except ConfigError:
            raise
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            first = str(error).partition("\n")[0]
            raise ConfigError(f"{folder} is damaged ({first}): delete it and embed the folder again") from error
        shape = (settings.count, settings.width)
        shapes = (vectors.shape, (len(pictures), settings.width), (inner_products.ntotal, inner_products.d))
        require(all(found == shape for found in shapes), f"{folder} is damaged: its files do not belong together")
        return cls(settings, pictures, vectors, inner_products)

    def write(self, folder: Path) -> None:
        """Write the index into an empty folder."""
        np.save(folder / _VECTORS, self.vectors)
        write_rows(folder / _PICTURES, self.pictures)
        import_faiss().write_index(self._inner_products, str(folder / _FAISS))
        (folder / SETTINGS_FILE).write_text(json.dumps(dataclasses.asdict(self.settings), indent=2) + "\n", "utf-8")

    def __len__(self) -> int:
        return len(self.pictures)

    def path(self, row: int) -> Path:
        """Where the picture of a row lies."""
        return Path(self.settings.folder, self.pictures[row].path)

    def made_with(self, predictor: Predictor, source: str | Path) -> bool:
        """Whether this is the model of the index; another one's vectors are of another space, though as wide.

        Files that nobody touched since hold the same weights; of others the weights are compared.

        Args:
            predictor: loaded with the `image_size` of the settings.
            source: what it was loaded from.
        """
        untouched = bool(self.settings.stamp) and self.settings.stamp == stamp(source)
        return untouched or fingerprint(predictor) == self.settings.fingerprint

    def search(self, vectors: Tensor | Vectors, k: int = 10) -> list[list[Hit]]:
        """Find the pictures with the largest inner products.

        Scores equal to six places count as ties; these stand in the order of their paths, whatever the number of
        queries or threads.

        Args:
            vectors: (q, D) float32 on the CPU, unit length.
            k: hits of each query; fewer if the index is smaller.

        Returns:
            for each query its hits, best first.

        Raises:
            ConfigError: `k` is below 1, or the vectors are of another width.
        """
        queries = np.ascontiguousarray(vectors, dtype=np.float32)
        width = self.settings.width
        require(
            queries.ndim == 2 and queries.shape[1] == width,
            f"the index holds vectors of width {width}, the query has shape {queries.shape}: search with the model "
            f"it was made with ({self.settings.model})",
        )
        require(k >= 1, f"the number of hits must be at least 1, not {k}")
        wanted = min(k, len(self))
        asked = wanted
        while True:  # until the last candidate is clearly worse: which of equal ones faiss keeps is left to chance
            asked = min(2 * asked, len(self))
            scores, rows = self._inner_products.search(queries, asked)
            if asked == len(self) or (scores[:, wanted - 1] - scores[:, -1] > _NOISE).all():
                break
        found = []
        for query, candidates in zip(queries, rows, strict=True):
            exact = (self.vectors[candidates].astype(np.float64) * query).sum(-1).round(6)
            best = np.lexsort((candidates, -exact))[:wanted]
            found.append([Hit(float(exact[place]), self.path(int(candidates[place]))) for place in best])
        return found


def embed_queries(predictor: Predictor, queries: Sequence[str]) -> Tensor:
    """Embed sentences and pictures; a query that is the path of a picture is a picture.

    Args:
        predictor: of the model that the index was made with.
        queries: q sentences or paths.

    Returns:
        (q, D) float32 on the CPU, unit length.

    Raises:
        DataMissingError: a query reads like the path of a picture that does not exist.
        ConfigError: a query is empty, a picture cannot be read, or the model reads no text.
    """
    require(all(query.strip() for query in queries), "a query is empty: give a sentence or the path of a picture")
    rows = torch.empty(len(queries), predictor.model.vector_width)
    pictures = torch.tensor([names_picture(query) for query in queries], dtype=torch.bool)
    for chosen, embed in ((pictures, predictor.embed_images), (~pictures, predictor.embed_texts)):
        if chosen.any():
            rows[chosen] = embed([query for query, taken in zip(queries, chosen.tolist(), strict=True) if taken])
    return rows


def names_picture(query: str) -> bool:
    """Whether a query is the path of a picture, existing or not, rather than a sentence."""
    return suffix_of(query) in IMAGE_SUFFIXES and (os.path.isfile(query) or " " not in query)


def fingerprint(predictor: Predictor) -> str:
    """Hash what decides a picture's vector, weights and preprocessing; 16 hexadecimal digits."""
    seen = predictor.preprocess
    digest = hashlib.sha256(repr((seen.image_size, seen.resize, seen.interpolation, seen.mean, seen.std)).encode())
    for name, tensor in sorted(predictor.model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def stamp(source: str | Path) -> str:
    """Hash of which files a model lies in, their sizes and times of change; 16 hexadecimal digits.

    Nothing of the files is read, so this is quick; a copy of a model has another stamp. Empty for other folders than
    exchange folders.
    """
    found = find_source(source)
    files = [found.path]
    if found.is_folder:
        files = sorted(file for file in found.path.iterdir() if file.suffix in (".json", ".safetensors"))
    elif found.path.is_dir():
        return ""
    seen = [
        (file.name, status.st_ino, status.st_size, status.st_mtime_ns) for file in files for status in [file.stat()]
    ]
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


def import_faiss() -> Any:
    """The library that searches, or a line that says how to get it."""
    if sys.platform == "darwin":
        os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")  # PyTorch and faiss bring an OpenMP each
    try:
        import faiss
    except ImportError as error:
        raise ConfigError("searching needs faiss: pip install beit3[index]") from error
    if sys.platform == "darwin":
        faiss.omp_set_num_threads(1)  # two OpenMP runtimes with threads crash
    return faiss


def write_rows(path: Path, rows: Sequence[Picture] | Sequence[LeftOut]) -> None:
    """Write a row a line."""
    path.write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows), "utf-8")
