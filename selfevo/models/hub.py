"""Finding a checkpoint: a folder, or a hub id that huggingface-hub downloads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded or written; the message names the file or tensor and what is wrong."""


def locate(source: str | Path, *, patterns: Sequence[str], revision: str | None) -> Path:
    """The folder of ``source``; for a hub id, the files that match ``patterns`` are downloaded unless in the cache."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder}: a checkpoint is a folder (with config.json in it), this is a file")
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"{source}: no such folder, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download  # slow to import, and not needed for folders
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:  # gated and missing repositories are explained there
        raise CheckpointError(f"{source}: no such folder here, and the hub says: {error}") from error
