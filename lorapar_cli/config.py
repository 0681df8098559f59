"""`lorapar config`: every setting with its default and meaning."""

import sys

from stages.config.yaml import annotated


def command() -> None:
    """Print every setting with its default and meaning, in each section the advanced ones last."""
    sys.stdout.write("\n".join(annotated()) + "\n")
