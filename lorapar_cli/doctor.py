"""`lorapar doctor`: checks what works on this machine."""

import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from stages.errors import first_line
from stages.pipeline.run import versions
from stages.runtime import gpu, resources

COMMIT = Path(__file__).with_name("commit.txt")  # `make dist` writes it into the wheel
Finding = tuple[str, str, bool | None]
"""Name, text, and whether it is good; None for a plain fact."""


def command() -> None:
    """Print each finding as it comes, and end with 1 if one is bad."""
    complete = True
    for name, text, good in examine():
        print(f"{ {None: ' ', True: '+', False: '-'}[good] } {name:<20} {text}", flush=True)
        complete &= good is not False
    raise typer.Exit(0 if complete else 1)


def examine() -> Iterator[Finding]:
    """Yield the findings; the slow ones (torch, the sandboxes' self-test) come last."""
    installed = dict(versions())
    lorapar = installed.pop("lorapar")
    commit = f" of commit {COMMIT.read_text(encoding='utf-8').strip()}" if COMMIT.is_file() else ""
    yield "lorapar", f"{lorapar}{commit}, Python {platform.python_version()}, {sys.executable}", None
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "system", f"{system}, {resources.usable_cores()} of {os.cpu_count()} cores usable", None
    for package, version in installed.items():
        optional = None if "vllm" in package else False  # voters can run in process
        yield package, version or "not installed", True if version else optional
    try:
        yield _device()
    except (ImportError, OSError) as error:  # a library of CUDA that is missing, or half an installation
        yield "torch", f"does not load: {first_line(error)}", False
    from stages import sandbox

    usable = []
    for name, problems in sandbox.backend_problems().items():
        text = "; ".join(problems) or f"passes a good program, contains {len(sandbox.HOSTILE)} hostile ones"
        yield f"sandbox {name}", text, None if problems else True
        usable += [] if problems else [name]
    choice = f"{usable[0]} is used" if usable else f"none works, so code is not run: {sandbox.HINT}"
    yield "sandbox", choice, bool(usable)


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory / 2**30
        cards = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}, {size:.0f} GiB"
        return "device", f"{cards}, driver {gpu.driver_version()}, CUDA {torch.version.cuda}", None
    if reason := gpu.unusable_reason():
        return "device", f"torch cannot use the NVIDIA GPU: {reason}; {gpu.MEND}", False
    capability = torch.backends.cpu.get_cpu_capability()
    return "device", f"CPU, {torch.get_num_threads()} threads, {capability}", None
