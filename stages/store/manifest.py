"""Checksum of a manifest; a manifest is trusted only if its checksum and its key are right."""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePosixPath
from typing import Any

from stages.store.digests import canonical_json, key_of

SCHEMA = 2
CHECKSUM = "seal"


def with_checksum(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest as JSON will read it back, plus the digest of its other fields."""
    plain = json.loads(json.dumps({"schema": SCHEMA, **manifest}))
    return {**plain, CHECKSUM: _checksum(plain)}


def manifest_error(manifest: dict[str, Any], key: str) -> str | None:
    """Return why this is not a valid manifest of `key`, or None if it is."""
    try:
        if manifest.get(CHECKSUM) != _checksum(manifest):
            return "its manifest was changed after it was written"
    except ValueError as error:  # NaN, which json reads but lorapar never writes
        return f"its manifest is invalid: {error}"
    if manifest["key"] != key or key_of(manifest["identity"]) != key:
        return f"its manifest is not that of key {key}"
    paths = map(PurePosixPath, manifest["files"])
    if outside := next((path for path in paths if path.is_absolute() or ".." in path.parts), None):
        return f"its manifest is invalid: {outside} leads out of the artifact"
    return None


def _checksum(manifest: dict[str, Any]) -> str:
    fields = {name: value for name, value in manifest.items() if name != CHECKSUM}
    return hashlib.sha256(canonical_json(fields)).hexdigest()
