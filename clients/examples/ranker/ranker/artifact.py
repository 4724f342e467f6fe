"""What training leaves and serving needs, in one folder: `ranker.json` and `ranker.safetensors`, no pickle."""

# Shapes: D embedding_dim, G golden ids.

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ranker.model import Scorer

FORMAT = 1
DESCRIPTION = "ranker.json"
TENSORS = "ranker.safetensors"
Key = int | str


class ArtifactError(Exception):
    """The artifact cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Side:
    """One of the two tables: users or items.

    keys: what its ids are. golden: a few ids whose vectors, `golden_GD`, tell whether the release that is served is
    the one that was trained with. default_D: the mean vector of training, for ids without one and for bad days.
    """

    table: str
    version: int
    keys: Literal["int64", "string"]
    golden: list[Key]
    golden_GD: Tensor
    default_D: Tensor


@dataclass(frozen=True)
class Artifact:
    """A trained ranker: its model, the release that it belongs to, and how good it was offline."""

    release: str
    user: Side
    item: Side
    scorer: Scorer
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, int] = field(default_factory=dict)


def save(artifact: Artifact, folder: Path) -> None:
    """Write both files; the description comes last and names the digest of the tensors."""
    tensors = {f"scorer.{name}": tensor.contiguous() for name, tensor in artifact.scorer.state_dict().items()}
    sides = {"user": artifact.user, "item": artifact.item}
    for name, side in sides.items():
        tensors |= {f"{name}.golden": side.golden_GD.contiguous(), f"{name}.default": side.default_D.contiguous()}
    data = safetensors.torch.save(tensors)
    description = {
        "format": FORMAT,
        "release": artifact.release,
        "tables": {name: _described(side) for name, side in sides.items()},
        "embedding_dim": len(artifact.user.default_D),
        "hidden": artifact.scorer.hidden.out_features,
        "metrics": dict(artifact.metrics),
        "evaluation": dict(artifact.evaluation),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TENSORS).write_bytes(data)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", "utf-8")


def load(folder: Path) -> Artifact:
    """The artifact in a folder; ArtifactError when it is not there, not whole or not what it says."""
    try:
        description = json.loads((folder / DESCRIPTION).read_text("utf-8"))
        data = (folder / TENSORS).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{error.filename}: {error.strerror}; `ranker train` writes it") from error
    except ValueError as error:
        raise ArtifactError(f"{folder / DESCRIPTION}: not JSON: {error}") from error
    try:
        return _read(description, data)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"{folder}: not a ranker's artifact: {error!r}") from error
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from error


def _read(description: dict[str, Any], data: bytes) -> Artifact:
    if description["format"] != FORMAT:
        raise ArtifactError(f"format is {description['format']!r}, this program reads {FORMAT}; train again")
    if hashlib.sha256(data).hexdigest() != description["sha256"]:
        raise ArtifactError(f"{TENSORS} is damaged, or of another {DESCRIPTION}; train again")
    tensors = safetensors.torch.load(data)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{name} has numbers that are not finite; train again")
    scorer = Scorer(description["embedding_dim"], description["hidden"])
    scorer.load_state_dict({k.removeprefix("scorer."): t for k, t in tensors.items() if k.startswith("scorer.")})
    sides = {
        name: Side(
            **description["tables"][name], golden_GD=tensors[f"{name}.golden"], default_D=tensors[f"{name}.default"]
        )
        for name in ("user", "item")
    }
    return Artifact(
        description["release"],
        sides["user"],
        sides["item"],
        scorer.eval(),
        description["metrics"],
        description["evaluation"],
    )


def _described(side: Side) -> dict[str, Any]:
    return {"table": side.table, "version": side.version, "keys": side.keys, "golden": side.golden}
