"""Keeps libraries from loading others only because they are installed, which takes seconds."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("bitsandbytes", "sklearn")
"""What transformers and PEFT load at their own import, for functions that lorapar does not call.

Where lorapar itself wants bitsandbytes (4-bit weights, an 8-bit optimizer), they load it then.
"""


@contextmanager
def hidden(*names: str) -> Iterator[None]:
    """Within it these packages are not there, unless they are loaded already.

    What transformers has found out meanwhile about packages that are missing, it forgets at the end.
    """
    new = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(new))  # type: ignore[arg-type]  # None: see importlib.util.find_spec
    try:
        yield
    finally:
        for name in new:
            del sys.modules[name]
        for function in vars(sys.modules.get("transformers.utils.import_utils", object)).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()
