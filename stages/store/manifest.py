"""The shape and the seal of a manifest: it is believed only when both are right."""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from stages.errors import faults
from stages.store.digests import canonical, key_of

SCHEMA = 2
SEAL = "seal"


def _inside(name: str) -> str:
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


class _Manifest(_Strict):
    schema_: Literal[2] = Field(alias="schema")
    stage: str
    key: str
    variant: str
    identity: dict[str, Any]
    inputs: dict[str, _Input]
    summary: dict[str, Any]
    provenance: dict[str, Any]
    files: dict[Annotated[str, AfterValidator(_inside)], _File]
    seal: str


def with_checksum(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest as it is read back, with the digest of all the rest as its seal."""
    plain = json.loads(json.dumps({"schema": SCHEMA, **manifest}, allow_nan=False))
    return {**plain, SEAL: _digest(plain)}


def manifest_error(manifest: Any, key: str) -> str | None:
    """What is wrong with a manifest that is to be that of `key`, or None."""
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        return f"its manifest is not one: {faults(error)[0]}"
    try:
        if manifest["key"] != key or key_of(manifest["identity"]) != key:
            return f"its manifest is not that of key {key}"
        if manifest[SEAL] != _digest(manifest):
            return "its manifest was changed after it was written"
    except ValueError as error:  # NaN, which is read and never written
        return f"its manifest is not one: {error}"
    return None


def _digest(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != SEAL}
    return hashlib.sha256(canonical(rest)).hexdigest()
