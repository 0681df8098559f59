"""Checkpoints of a stage in training: they count when their seal, written last, fits every byte."""

import json
import logging
import shutil
from pathlib import Path

from stages.store.digests import fsync, sha256_file

log = logging.getLogger(__name__)

SEAL = "lorapar-checkpoint.json"
KEPT = 2


class Checkpoints:
    """The checkpoints of one artifact to be, `FOLDER/checkpoint-N` after N optimizer steps, as Trainer names them."""

    def __init__(self, folder: Path, of: str) -> None:
        """of: digest of all they were made from; those of other inputs are set aside, never mixed in."""
        self.folder, self._of = folder, of

    def newest(self) -> Path | None:
        """The newest one that verifies; those that do not are renamed on the way."""
        for path in self._found():
            if reason := self._fault(path):
                log.warning("%s is left aside: %s", path.name, reason)
                aside = path.with_name(f"{path.name}.incomplete")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                continue
            return path
        return None

    def seal(self, path: Path) -> None:
        """Make a finished checkpoint count, and drop all but the newest KEPT."""
        files = {
            file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()
        }
        for file in files.values():
            fsync(file)
        text = json.dumps(
            {"of": self._of, "files": {name: sha256_file(file) for name, file in files.items()}}
        )
        (path / SEAL).write_text(text, encoding="utf-8")
        for part in (path / SEAL, path, path.parent):
            fsync(part)
        for old in self._found()[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _found(self) -> list[Path]:
        """Newest first."""
        numbers = {path: path.name.removeprefix("checkpoint-") for path in self.folder.glob("checkpoint-*")}
        return sorted(
            (p for p, n in numbers.items() if n.isdigit()), key=lambda p: int(numbers[p]), reverse=True
        )

    def _fault(self, path: Path) -> str | None:
        try:
            seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
            if seal["of"] != self._of:
                return "it was made from other inputs"
            bad = [name for name, digest in seal["files"].items() if sha256_file(path / name) != digest]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            return f"it is not whole ({type(error).__name__})"
        return f"{bad[0]} is damaged" if bad else None
