"""Checkpoints of a training stage. A checkpoint counts only if its seal, written last, fits every byte."""

import json
import logging
import shutil
from pathlib import Path

from pydantic import BaseModel

from stages.runtime import distributed
from stages.store.digests import fsync, sha256_file

log = logging.getLogger(__name__)

SEAL = "lorapar-checkpoint.json"
KEPT = 2


class _Seal(BaseModel):
    of: str
    files: dict[str, str]


class Checkpoints:
    """The checkpoints of an unfinished artifact: `FOLDER/checkpoint-N`, after N optimizer steps."""

    def __init__(self, folder: Path, of: str) -> None:
        """of: digest of all inputs. Checkpoints made from other inputs are set aside and never used."""
        self.folder, self._of = folder, of

    def newest(self) -> Path | None:
        """The newest checkpoint that is valid; newer ones that are not are renamed."""
        for path in self._found():
            if reason := self._fault(path):
                log.warning("%s is left aside: %s", path.name, reason)
                if distributed.is_main():
                    aside = path.with_name(f"{path.name}.incomplete")
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
                continue
            return path
        return None

    def seal(self, path: Path) -> None:
        """Seal a finished checkpoint, and delete all but the newest KEPT."""
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        for file in files:
            fsync(file)
        digests = {file.relative_to(path).as_posix(): sha256_file(file) for file in files}
        (path / SEAL).write_text(json.dumps({"of": self._of, "files": digests}), encoding="utf-8")
        for part in (path / SEAL, path, path.parent):
            fsync(part)
        for old in self._found()[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _found(self) -> list[Path]:
        """The folders of checkpoints, newest first."""
        numbers = {}
        for path in self.folder.glob("checkpoint-*"):
            number = path.name.removeprefix("checkpoint-")
            if number.isdecimal():
                numbers[path] = int(number)
        return sorted(numbers, key=numbers.__getitem__, reverse=True)

    def _fault(self, path: Path) -> str | None:
        try:
            seal = _Seal.model_validate_json((path / SEAL).read_bytes())
            if seal.of != self._of:
                return "it was made from other inputs"
            bad = [name for name, digest in seal.files.items() if sha256_file(path / name) != digest]
            there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
        except (OSError, ValueError) as error:
            return f"it is not whole ({type(error).__name__})"
        bad += sorted(there - {SEAL} - seal.files.keys())
        return f"{bad[0]} is damaged" if bad else None
