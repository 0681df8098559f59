"""Spares libraries what takes seconds: optional packages that are installed, and a hub out of reach."""

import functools
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

log = logging.getLogger(__name__)

UNUSED = ("bitsandbytes", "sklearn")
"""Packages that transformers and PEFT import when available, for functions that lorapar does not call.

Where lorapar uses bitsandbytes (4-bit weights, 8-bit optimizers), they import it at that point.
"""


@contextmanager
def hide_packages(*names: str) -> Iterator[None]:
    """Make packages look uninstalled in this context, unless they are loaded already.

    On exit the availability checks that transformers has cached meanwhile are cleared.
    """
    unloaded = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(unloaded))  # type: ignore[arg-type]  # None: see importlib.util.find_spec
    try:
        yield
    finally:
        for name in unloaded:
            sys.modules.pop(name, None)  # another thread may have been in this context, too
        for function in vars(sys.modules.get("transformers.utils.import_utils", object)).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


@functools.cache
def offline_without_network() -> None:
    """Let the hub's libraries read their cache alone where the hub's host has no address.

    They would ask again for each file, six times in 23 s. A proxy resolves names itself, so behind one they
    are left alone.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():
        return
    host = urlsplit(constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        log.warning("%s has no address here: only what was downloaded before can be read", host)
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that this one starts
