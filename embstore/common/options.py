"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_STORE = Path("store")

TableArgument = Annotated[str, typer.Argument(help="Name of the table.")]
StoreOption = Annotated[Path, typer.Option("--store", envvar="EMBSTORE_STORE", help="Folder of the store.")]
VersionOption = Annotated[str, typer.Option("--version", help="A version number or a label.")]
DtypeOption = Annotated[str, typer.Option(help="How rows are stored: float32, float16, bfloat16, int8 or int4.")]
LabelOption = Annotated[str, typer.Option(help="Label to move to the new version.")]
NoPromoteOption = Annotated[bool, typer.Option("--no-promote", help="Publish without moving any label.")]
NewIdTypeOption = Annotated[
    bool, typer.Option("--new-id-type", help="Move the label even from string ids to integers, or back.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table for people.")]
