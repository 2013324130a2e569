"""The folder of a run: whose it is, what it was begun with, and whether it is still as the run wrote it.

``config.json`` has all that a run depends on: settings, hashes of its data and of its backbone, versions. The ledger
(``selfevo.files``) has the hash of every file that the run made. A run goes on only where all of these agree.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from selfevo import __version__
from selfevo.evolve.run import DTYPES, BackboneSettings, RunConfig, RunError, dtype_of
from selfevo.evolve.settings import compose, flatten, leaves
from selfevo.files import (
    LEDGER,
    LOCK,
    check_ledger,
    file_hash,
    hold_folder,
    locate,
    read_object,
    start_ledger,
    write_json,
)
from selfevo.models.checkpoint import INDEX
from selfevo.models.tokenizer import FILES as TOKENIZER_FILES

DRAWS = 2  # how seeds are derived; a run that was begun under another rule cannot be continued
# Settings that may differ when a run is continued: results differ in their rounding at most.
FREE = ("out", "device", "slots", "max_tokens", "checkpoint_activations", "shard")
DATA = ("esconv", "synthetic", "replay", "test", "prompts_file")  # settings whose contents count, not their spelling
_BACKBONE = ("config.json", "model*.safetensors", INDEX, *TOKENIZER_FILES)
_BLOCK, _BLOCKS = 2**16, 2**12  # of a file of the backbone beyond 256 MiB, so much is hashed
C = TypeVar("C", bound=RunConfig)
S = TypeVar("S")


def read_settings(run: Path, kind: type[S]) -> S:
    """The settings of a run folder, of this version or another: those that ``kind`` has, others are ignored."""
    stored = read_object(run / "config.json")
    try:
        return compose(kind, stored.take("settings", dict))
    except ValueError as error:
        raise stored.fail(str(error)) from error


def is_finished(config: RunConfig) -> bool:
    """Whether the run has all its results, so that nothing is left to be done."""
    return all((Path(config.out) / name).is_file() for name in config.results)


def check_run(config: C, *, resume: bool) -> C:
    """Refuses, before anything is loaded or written, a folder that is not this run's, or not as the run wrote it.

    Returns the settings with which the run goes on: those given, but that a run which is continued keeps the dtype and
    the name of its backbone, and one that is extended what ``RunConfig.continued`` keeps.
    """
    run = Path(config.out)
    if not os.path.lexists(run / "config.json"):
        if run.exists() and not (run.is_dir() and all(_is_leftover(path) for path in run.iterdir())):
            raise RunError(f"{run}: exists, but is not a run folder (it has no config.json); choose another --out")
        return config
    if not resume:
        raise RunError(f"{run}: already holds a run; continue it with --resume, or choose another --out")
    stored = read_object(run / "config.json")
    settings, backbone = stored.take("settings", dict), stored.take("backbone", dict, None)
    if (run / LEDGER).is_file():
        with hold_folder(run):
            check_ledger(run)
    elif backbone is not None:
        raise RunError(f"{run / LEDGER}: is missing, so nothing in {run} can be checked; put it back, or start anew")
    if backbone is not None:  # what earlier versions did not note
        settings = settings | {"dtype": stored.take("dtype", str)}
    config = _as_begun(config, settings).continued(settings)
    _compare_settings(config, settings)
    _compare_files(config, settings, stored.take("data", dict), backbone)
    if stored.take("draws", int, 0) != DRAWS and not is_finished(config):
        was = stored.take("versions", dict, {}).get("selfevo", "another version")
        raise RunError(
            f"{run}: was begun by selfevo {was}, which splits data and draws replies differently; finish it there, or "
            "choose another --out"
        )
    return config


def _is_leftover(path: Path) -> bool:
    """Whether a file is of a run that was killed before it had its config.json."""
    return path.name in (LEDGER, LOCK) or path.suffix == ".partial"


def _as_begun(config: C, stored: Mapping[str, Any]) -> C:
    backbone = replace(config.backbone, name=str(stored.get("backbone", "")))
    if backbone.dtype == "auto" and stored.get("dtype") in DTYPES:
        backbone = replace(backbone, dtype=stored["dtype"])
    return replace(config, backbone=backbone)


def _compare_settings(config: RunConfig, stored: Mapping[str, Any]) -> None:
    """A setting that the run's version did not have must have its default; one that we do not have must be off."""
    current = _settings(config)
    for name, leaf in leaves(type(config)).items():
        known = stored.get(name, _as_json(leaf.default))
        if name in DATA:
            same = list(map(_file_name, _listed(known))) == list(map(_file_name, _listed(current[name])))
        else:
            same = name in (*FREE, *config.grows, "backbone") or known == current[name]
        if not same:
            message = f"holds a run with other settings ({name} was {known!r}, now {current[name]!r})"
            raise RunError(f"{config.out}: {message}; choose another --out")
    unknown = sorted(name for name in set(stored) - set(current) if stored[name] not in (None, False, 0, "", []))
    if unknown:
        raise RunError(f"{config.out}: holds a run with settings unknown to this version ({', '.join(unknown)})")


def _compare_files(
    config: RunConfig, stored: Mapping[str, Any], hashes: Mapping[str, Any], backbone: Mapping[str, Any] | None
) -> None:
    """The files of data and backbone have to be those that the run was begun with, wherever they are now."""
    current = _settings(config)
    for setting in DATA:
        for was, now in zip(_listed(stored.get(setting)), _listed(current.get(setting))):
            if (was in hashes or setting != "prompts_file") and file_hash(now) != hashes.get(was):
                raise RunError(f"{now}: has changed since {config.out} was started; choose another --out")
    if backbone is None:
        known, source = stored.get("backbone"), config.backbone.source
        if known != source:
            message = f"holds a run with other settings (backbone was {known!r}, now {source!r})"
            raise RunError(f"{config.out}: {message}; choose another --out")
        return
    found = backbone_hashes(config.backbone)
    for name in sorted(found.keys() | backbone.keys()):
        if found.get(name) != backbone.get(name):
            raise RunError(
                f"{config.backbone.source}: {name} has changed since {config.out} was started; put it back as it was, "
                "or choose another --out"
            )


@contextmanager
def open_run(config: RunConfig) -> Iterator[Path]:
    """The run folder, held by this process: stamped with all that a run depends on where it is new, cleared of
    half-written files where it is old; what is other than when it was begun is noted in ``config.json``."""
    run = Path(config.out)
    path = run / "config.json"
    with hold_folder(run):
        for leftover in run.rglob("*.partial"):
            leftover.unlink()
        stored = read_object(path).values if path.is_file() else None
        if stored is None:
            (run / LEDGER).unlink(missing_ok=True)  # of a run that was killed before it had settings
        start_ledger(run)
        stamp = _stamp(config) if stored is None else _continued(config, stored)
        if stamp != stored:
            write_json(path, stamp)
        for sentence in other_versions(run)[-1:]:
            tqdm.write(f"warning: {sentence}", file=sys.stderr)
        yield run


def _stamp(config: RunConfig) -> dict[str, Any]:
    """Everything a run depends on: settings, the hashes of its data and of its backbone, the dtype, versions."""
    current = _settings(config)
    return {
        "settings": current,
        "data": {name: file_hash(name) for setting in DATA for name in _listed(current.get(setting))},
        "backbone": backbone_hashes(config.backbone),
        "dtype": dtype_of(config.backbone),
        "versions": _versions(),
        "draws": DRAWS,
    }


def _continued(config: RunConfig, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The stamp of a run that goes on: with what has grown, and a note of what is other than when it was begun."""
    current, begun = _settings(config), stored["settings"]
    grown = {name: current[name] for name in config.grows}
    settings = {name: current[name] for name in FREE[1:] if name in begun and begun[name] != current[name]}
    versions = {name: new for name, new in _versions().items() if stored.get("versions", {}).get(name) != new}
    note = {kind: values for kind, values in (("settings", settings), ("versions", versions)) if values}
    notes = [*stored.get("continued", []), *([note] if note and note not in stored.get("continued", []) else [])]
    return {**stored, "settings": begun | grown, **({"continued": notes} if notes else {})}


def other_versions(run: Path) -> list[str]:
    """A sentence for each set of versions that a run was continued with, other than those that it was begun with."""
    stored = read_object(run / "config.json")
    begun = stored.take("versions", dict, {})
    return [
        f"The run was begun with {_named(begun, note['versions'])} and continued with "
        f"{_named(note['versions'], note['versions'])}: its results may differ from those of either."
        for note in stored.take_list("continued", dict, [])
        if note.get("versions")
    ]


def _named(versions: Mapping[str, Any], names: Iterable[str]) -> str:
    return ", ".join(f"{name} {versions.get(name, '?')}" for name in names)


def _versions() -> dict[str, str]:
    versions = {"selfevo": __version__, "python": platform.python_version()}
    return versions | {name: version(name) for name in ("torch", "tokenizers", "safetensors", "numpy")}


def backbone_hashes(settings: BackboneSettings) -> dict[str, str]:
    """The hash of each file that a backbone is loaded from, by its name."""
    folder = locate(settings.source, patterns=_BACKBONE, revision=settings.revision or None)
    files = {path for pattern in _BACKBONE for path in folder.glob(pattern)}
    return {path.name: _sampled_hash(path) for path in sorted(files)}


def _sampled_hash(path: Path) -> str:
    """The SHA-256 of a file; of one beyond 256 MiB, that of its size and of blocks that lie evenly over it."""
    if not path.is_file() or path.stat().st_size <= _BLOCK * _BLOCKS:
        return file_hash(path)
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(_BLOCKS):
            file.seek(number * (size - _BLOCK) // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _settings(config: RunConfig) -> dict[str, Any]:
    return {name: _as_json(value) for name, value in flatten(config).items()}


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _listed(value: Any) -> list[str]:
    """The paths of a setting: one, several or none."""
    return [str(path) for path in (value if isinstance(value, (list, tuple)) else [value]) if path]


def _file_name(path: str) -> str:
    return Path(path).name
