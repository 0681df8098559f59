"""Says whether this machine has an NVIDIA GPU, and why torch cannot use it."""

import os
from pathlib import Path

from stages.errors import first_line

DEVICE_FILE = Path("/dev/nvidiactl")
"""The driver's file, which tells of a GPU; torch would have to be loaded for every command."""
DRIVER_VERSION_FILE = Path("/sys/module/nvidia/version")
VISIBLE = "CUDA_VISIBLE_DEVICES"
MEND = "update its driver, or install a torch that it can run"


def driver_version() -> str:
    """Version of the loaded NVIDIA driver; `of unknown version` if the system does not tell."""
    try:
        return DRIVER_VERSION_FILE.read_text(encoding="utf-8").strip()
    except OSError:
        return "of unknown version"


def is_visible() -> bool:
    """Whether this machine has an NVIDIA GPU that is not hidden from this process."""
    return DEVICE_FILE.exists() and os.environ.get(VISIBLE) not in ("", "-1")


def unusable_reason() -> str | None:
    """Reason why torch cannot use the GPU; None if it can, or if there is none or it is hidden."""
    if not is_visible():
        return None
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:  # its first sentence names driver and version
        return first_line(error).partition(". ")[0]
    return "torch sees none"
