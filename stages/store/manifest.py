"""Checksum of a manifest, which is believed only if it is what a stage wrote under its key."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

from stages.store.digests import digest_of, key_of

CHECKSUM = "seal"
SCHEMA = 2
"""Version of what a manifest has."""


def with_checksum(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest as JSON will read it back, plus the digest of its other fields."""
    plain = json.loads(json.dumps({"schema": SCHEMA, **manifest}))
    return {**plain, CHECKSUM: _checksum(plain)}


def manifest_error(manifest: Any, key: str) -> str | None:
    """Return why this is not a valid manifest of `key`, or None if it is."""
    try:
        if manifest["schema"] != SCHEMA:
            return f"its manifest has schema {manifest['schema']}, not {SCHEMA}"
        if manifest["key"] != key or key_of(manifest["identity"]) != key:
            return f"its manifest is not that of key {key}"
        if manifest[CHECKSUM] != _checksum(manifest):
            return "its manifest was changed after it was written"
        for path in map(PurePosixPath, manifest["files"]):
            if path.is_absolute() or ".." in path.parts:
                return f"its manifest names {path}, which leads out of the artifact"
    except (KeyError, TypeError, ValueError) as error:  # ValueError: NaN, which lorapar never writes
        return f"its manifest is not what a stage writes: {error}"
    return None


def _checksum(manifest: dict[str, Any]) -> str:
    return digest_of({name: value for name, value in manifest.items() if name != CHECKSUM})
