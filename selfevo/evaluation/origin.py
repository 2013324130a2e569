"""What a stored result was computed from: the contents of backbones and adapters, and which request a name stands for.

A result is read back only for the request that it was computed for: the same name with anything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from selfevo.files import FileError, StrPath, folder_hash, locate
from selfevo.lora import CONFIG_FILE, WEIGHTS_FILE
from selfevo.models.tokenizer import FILES as TOKENIZER_FILES

_BACKBONE_FILES = ("config.json", "model*.safetensors", "*.index.json", *TOKENIZER_FILES)


def backbone_hash(source: StrPath, revision: str = "") -> str:
    """The SHA-256 of a backbone's configuration, weights and tokenizer: a folder, or a hub id."""
    folder = locate(source, patterns=_BACKBONE_FILES, revision=revision or None)
    return _content(folder, _BACKBONE_FILES, "config.json")


def adapter_hash(source: StrPath) -> str:
    """The SHA-256 of an adapter in PEFT's format: a folder, or a hub id."""
    files = (CONFIG_FILE, WEIGHTS_FILE)
    return _content(locate(source, patterns=files), files, CONFIG_FILE)


def _content(folder: Path, patterns: tuple[str, ...], needed: str) -> str:
    if not (folder / needed).is_file():
        raise FileError(f"{folder}: has no {needed}; is this the right folder?")
    found = {path: path.stat() for pattern in patterns for path in folder.glob(pattern)}
    stamp = sorted((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found.items())
    return _hash_once(folder, patterns, tuple(stamp))


@cache
def _hash_once(folder: Path, patterns: tuple[str, ...], stamp: tuple[Any, ...]) -> str:
    """Hashed once for each state of the files, as a command may ask for every one of its models."""
    return folder_hash(folder, patterns)


def first_difference(stored: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    """In words, the first entry of a request that differs from a stored one; empty where there is none."""
    for key, value in request.items():
        if stored.get(key) != value:
            return f"{key.replace('_', ' ')} was {stored.get(key)!r}, now {value!r}"
    return ""
