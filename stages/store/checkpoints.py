"""Checkpoints of a training stage. A checkpoint is valid only if the digests in its seal match all files.

The seal is a JSON file that is written last.
"""

import logging
import shutil
import time
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel

from stages.errors import ConfigError
from stages.runtime import ranks
from stages.store.digests import files_in, fsync, sha256_file

log = logging.getLogger(__name__)

SEAL = "lorapar-checkpoint.json"
SAVE_TOTAL_LIMIT = 2
FORCED = "forced"
"""Empty file that says that the checkpoints beside it are those of a forced build."""


class _Seal(BaseModel):
    of: str
    conditions: dict[str, str] = {}
    seconds: float = 0.0
    files: dict[str, str]


class Checkpoints:
    """Checkpoints of an unfinished artifact: `FOLDER/checkpoint-N`, after N optimizer steps."""

    def __init__(self, folder: Path, inputs: str, conditions: dict[str, str] | None = None) -> None:
        """inputs: digest of all inputs. Checkpoints made from other inputs are renamed and never used.

        conditions: name → value of what training was started under and must go on under, to end with the
        same bits, although no input depends on it.
        """
        self.folder, self._inputs, self._conditions = folder, inputs, conditions or {}
        self._start, self._earlier = time.monotonic(), 0.0
        """Also the seconds that earlier processes took up to the checkpoint from which this one goes on."""

    def spent(self) -> float:
        """Seconds so far, with those of the processes whose checkpoint was resumed."""
        return self._earlier + time.monotonic() - self._start

    def newest(self) -> Path | None:
        """Return the newest valid checkpoint; newer ones that are invalid are renamed.

        ConfigError if it was made under other conditions: it is whole, and under those it can be continued.
        """
        for path in self._newest_first():
            seal = self._read_seal(path)
            if isinstance(seal, _Seal):
                if seal.conditions != self._conditions:
                    both = (seal.conditions, self._conditions)
                    before, now = (", ".join(map(" ".join, conditions.items())) for conditions in both)
                    raise ConfigError(
                        f"{path} was made with {before}, and this run has {now}",
                        "resume under the same conditions, or start this stage over with --force",
                    )
                self._earlier = seal.seconds
                return path
            log.warning("%s is ignored: %s", path.name, seal)
            if ranks.is_main():
                aside = path.with_name(f"{path.name}.incomplete")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        return None

    def seal(self, path: Path) -> None:
        """Write the seal of a finished checkpoint, then delete all but the newest SAVE_TOTAL_LIMIT."""
        files = files_in(path)
        for file in files.values():
            fsync(file)
        digests = {name: sha256_file(file) for name, file in files.items()}
        seal = _Seal(of=self._inputs, conditions=self._conditions, seconds=self.spent(), files=digests)
        (path / SEAL).write_text(seal.model_dump_json(), encoding="utf-8")
        for written in (path / SEAL, path, path.parent):
            fsync(written)
        for old in self._newest_first()[SAVE_TOTAL_LIMIT:]:
            shutil.rmtree(old, ignore_errors=True)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def end_forced_build(self) -> None:
        """Let the next forced build begin anew, even if a kill leaves the checkpoints of this one."""
        (self.folder / FORCED).unlink(missing_ok=True)

    def start_over(self) -> None:
        """Clear the checkpoints, but keep those of a forced build that was interrupted, which then goes on.

        If they were made under other conditions, begin anew.
        """
        marker = self.folder / FORCED
        if marker.exists():
            with suppress(ConfigError):
                self.newest()
                return
        self.clear()
        self.folder.mkdir(parents=True)
        marker.touch()

    def _newest_first(self) -> list[Path]:
        numbers = {path: path.name.removeprefix("checkpoint-") for path in self.folder.glob("checkpoint-*")}
        found = [path for path, number in numbers.items() if number.isdecimal()]
        return sorted(found, key=lambda path: int(numbers[path]), reverse=True)

    def _read_seal(self, path: Path) -> _Seal | str:
        """Return the seal of a checkpoint, or why it is invalid."""
        try:
            seal = _Seal.model_validate_json((path / SEAL).read_bytes())
            if seal.of != self._inputs:
                return "it was made from other inputs"
            damaged = [name for name, digest in seal.files.items() if sha256_file(path / name) != digest]
        except (OSError, ValueError) as error:
            return f"it is incomplete ({type(error).__name__})"
        damaged += sorted(files_in(path).keys() - {SEAL} - seal.files.keys())
        return f"{damaged[0]} is damaged" if damaged else seal
