"""Whether the hub can be reached."""

from __future__ import annotations

import functools
import logging
import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

log = logging.getLogger(__name__)


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
