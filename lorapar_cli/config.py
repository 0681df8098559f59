"""`lorapar config`: prints every setting with its default and meaning, or the JSON schema of a config."""

import json
import sys
from typing import Annotated

from lorapar_cli.options import flag
from stages.config.listing import annotated, json_schema


def command(schema: Annotated[bool, flag("--schema", "Print the JSON schema of a config.")] = False) -> None:
    text = json.dumps(json_schema(), indent=1, ensure_ascii=False) if schema else "\n".join(annotated())
    sys.stdout.write(text + "\n")
