"""Every setting as an option of a command, made when the command is run or asked for help."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from typer.core import TyperCommand, TyperOption

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_KINDS = {str: "text", Path: "path", int: "integer", float: "number"}


class SettingsCommand(TyperCommand):
    """A command that takes every server setting; those that were given are `context.obj`, as text by name."""

    def get_params(self, ctx: Any) -> list[Any]:
        from server.settings import Settings

        options = [
            TyperOption(
                param_decls=[f"--{name.replace('_', '-')}", name],
                metavar="VALUE",
                help=f"{field.description} ({shown_type(field)}, default {shown_default(field)})",
            )
            for name, field in Settings.model_fields.items()
        ]
        return [*options, *super().get_params(ctx)]

    def invoke(self, ctx: Any) -> Any:
        own = {parameter.name for parameter in self.params}
        ctx.obj = {name: ctx.params.pop(name) for name in [*ctx.params] if name not in own}
        return super().invoke(ctx)


def shown_type(field: FieldInfo) -> str:
    """The type of a setting, for people: `integer`, or the values that it may have."""
    values = get_args(field.annotation) or (field.annotation,)
    return "|".join(_KINDS.get(value, str(value)) for value in values if value is not type(None))


def shown_default(field: FieldInfo) -> str:
    """The default of a setting, for people."""
    return "none" if field.default is None else str(field.default)
