"""What `beit3 info` says of a run's checkpoints. Files are hashed, and nothing in them is unpickled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from beit3.errors import BeitError
from beit3.train.checkpoint import list_checkpoints
from beit3.train.manifest import MANIFEST, damaged_files, read_manifest


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """One or several checkpoints, as found on disk."""

    lines: list[str]
    damaged: list[Path]
    """Files that are missing or not as they were written."""

    def require_whole(self) -> None:
        """Make sure that every file verifies.

        Raises:
            BeitError: names those that do not.
        """
        if self.damaged:
            names = ", ".join(map(str, self.damaged))
            raise BeitError(f"damaged or missing: {names}; --resume takes the newest checkpoint that is whole")


def holds_checkpoints(source: Path) -> bool:
    """Whether a folder is a checkpoint, whole or not, or holds some."""
    return source in list_checkpoints(source.parent) or bool(list_checkpoints(source)) or bool(read_manifest(source))


def describe_checkpoints(source: Path) -> CheckpointReport:
    """Describe a checkpoint file by file, or all checkpoints of a folder in a line each.

    Raises:
        ConfigError: one was written by a newer version of this package, in a form not known here.
    """
    found = list_checkpoints(source)
    model = "  model       none here: load the folder 'export' of the run"
    if not found:
        one = _describe_one(source)
        return CheckpointReport([*one.lines, model], one.damaged)
    parts = [_describe_one(path) for path in found]
    whole = [path.name for path, part in zip(found, parts, strict=True) if not part.damaged]
    newest = f"--resume takes {whole[-1]}" if whole else "none is whole"
    return CheckpointReport(
        [f"{source}: {len(found)} checkpoints, {newest}", *(f"  {part.lines[0]}" for part in parts), model],
        [path for part in parts for path in part.damaged],
    )


def _describe_one(path: Path) -> CheckpointReport:
    manifest = read_manifest(path)
    if manifest is None:
        return CheckpointReport([f"{path}: its manifest is damaged or missing"], [path / MANIFEST])
    damaged = damaged_files(path)
    files = manifest["files"]
    total = sum(entry["size"] for entry in files.values())
    verdict = f"{len(damaged)} damaged or missing" if damaged else "every file verifies"
    ranks = f"{manifest['world_size']} {'rank' if manifest['world_size'] == 1 else 'ranks'}"
    width = max(map(len, files))
    marks = {name: "damaged" if (path / name).exists() else "missing" for name in damaged}
    return CheckpointReport(
        [
            f"{path}: step {manifest['step']:,} of {ranks}, {total:,} bytes in {len(files)} files, {verdict}",
            f"  written by  beit3 {manifest['beit3']}, torch {manifest['torch']}, form {manifest['schema']}",
            f"  run         {manifest['run'] or 'not named'}",
            f"  data        {manifest['data']}",
            *(
                f"  {name:{width}}  {entry['size']:>15,}  {marks.get(name, '')}".rstrip()
                for name, entry in files.items()
            ),
        ],
        [path / name for name in damaged],
    )
