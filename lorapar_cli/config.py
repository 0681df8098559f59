"""`lorapar config`: prints every setting with its default and meaning."""

import sys

from stages.config.yaml import annotated


def command() -> None:
    sys.stdout.write("\n".join(annotated()) + "\n")
