"""Which options a scheme takes: from a training config, or from the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from inspect import Parameter, signature

from embstore.errors import ConfigError
from embstore.schemes.base import Scheme

_GIVEN = frozenset().union(*(signature(make).parameters for make in (Scheme, Scheme.from_budget, Scheme.fit)))
"""What every scheme is given: sizes, gradients, generators, weights; not said in a config."""


def options_of(scheme: type[Scheme], make: Callable[..., Scheme]) -> dict[str, Parameter]:
    """The options that a way of making a scheme has: its class itself, `from_budget` or `fit`."""
    given = _GIVEN | scheme.uses | scheme.given_in_code
    parameters = signature(make).parameters
    return {n: p for n, p in parameters.items() if n not in given and p.kind is not Parameter.VAR_KEYWORD}


def check_options(scheme: type[Scheme], options: Iterable[str]) -> None:
    """ConfigError for an option that no way of making this scheme has; it names the close match and all there are."""
    known = options_of(scheme, scheme) | options_of(scheme, scheme.from_budget) | options_of(scheme, scheme.fit)
    for option in options:
        if option not in known:
            near = get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            valid = ", ".join(known) or "none"
            raise ConfigError(f"{scheme.name} has no option {option!r}{hint} (its options: {valid})")
