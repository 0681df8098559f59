"""Stops libraries from importing optional packages that happen to be installed, which takes seconds."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
