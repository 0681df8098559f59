"""Schema and checksum of a manifest; a manifest is trusted only if both are valid."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from stages.errors import validation_messages
from stages.store.digests import digest_of, key_of

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
CHECKSUM = "seal"


def _stays_inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError("leads out of the artifact")
    return name


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _File(_Strict):
    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class _Input(_Strict):
    key: str
    content: str


class _Provenance(BaseModel):
    """The circumstances of a step that are read; further fields are for people."""

    model_config = ConfigDict(strict=True)
    config: dict[str, Any]
    seconds: Amount
    finished: str
    versions: dict[str, str]
    dtype: str = ""
    peak_mib: dict[str, Amount] = {}


class _Manifest(_Strict):
    schema_: Literal[2] = Field(alias="schema")
    stage: str
    key: str
    variant: str
    identity: dict[str, Any]
    inputs: dict[str, _Input]
    summary: dict[str, Any]
    provenance: _Provenance
    files: dict[Annotated[str, AfterValidator(_stays_inside)], _File]
    seal: str


def with_checksum(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest as JSON will read it back, plus the digest of its other fields."""
    plain = json.loads(json.dumps({"schema": 2, **manifest}))
    return {**plain, CHECKSUM: _checksum(plain)}


def manifest_error(manifest: Any, key: str) -> str | None:
    """Return why this is not a valid manifest of `key`, or None if it is."""
    try:
        _Manifest.model_validate(manifest)
        if manifest["key"] != key or key_of(manifest["identity"]) != key:
            return f"its manifest is not that of key {key}"
        if manifest[CHECKSUM] != _checksum(manifest):
            return "its manifest was changed after it was written"
    except ValidationError as error:
        return f"its manifest is invalid: {validation_messages(error)[0]}"
    except ValueError as error:  # NaN, which json reads but lorapar never writes
        return f"its manifest is invalid: {error}"
    return None


def _checksum(manifest: dict[str, Any]) -> str:
    return digest_of({name: value for name, value in manifest.items() if name != CHECKSUM})
