"""`--label NAME=VALUE`, as every command that has it takes it."""

import re
from collections.abc import Callable
from typing import Any

import click

from gateway_addon.names import LABEL_NAME, safe_name


class Label(click.ParamType[tuple[str, str]]):
    """NAME=VALUE, as (name, value)."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, _, text = str(value).partition("=")
        if re.fullmatch(LABEL_NAME, name) is None or not text.strip():
            self.fail(f"{value!r} is not a label; write NAME=VALUE like client=acme", param, ctx)
        if safe_name(text.strip()) != text.strip():
            self.fail(f"the value of label {name} is longer than 200 characters, or not printable", param, ctx)
        return name, text.strip()


def label_option[F: Callable[..., Any]](help: str) -> Callable[[F], F]:
    """Return the option, which may be given for several names; the command gets the pairs by name, each name once."""

    def once(ctx: click.Context, param: click.Parameter, pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        labels = dict(pairs)
        if len(labels) < len(pairs):
            raise click.BadParameter("each label once, with one value", ctx, param)
        return tuple(sorted(labels.items()))

    return click.option("--label", "labels", type=Label(), multiple=True, callback=once, help=help)
