"""Limits of time and memory of one program, as `sandbox.seconds` sets it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Resource limits of one program."""

    seconds: float = 5.0
    """Wall time for all tests of the program."""
    memory_mb: int = 512
    """Address space, in MiB."""

    def rlimits(self) -> dict[str, int]:
        """Limits of one process, by the name of setrlimit(2) without `RLIMIT_`."""
        mb = 2**20
        space = {"AS": self.memory_mb * mb, "FSIZE": 8 * mb, "STACK": 8 * mb}
        return {"CPU": int(self.seconds) + 1, **space, "NOFILE": 64, "CORE": 0}
