"""Which options a scheme takes: from a training config, or from the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any

from embstore.errors import ConfigError
from embstore.schemes.base import Scheme

_NOT_OPTIONS = {
    *("self", "num_embeddings", "embedding_dim", "num_bytes", "sparse", "init_std", "generator"),
    *("vectors_ND", "weights_N", "progress"),
    *("frequencies", "histories", "vectors", "signatures", "memory"),  # learned from events, not said in a config
}


def options_of(function: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters of a constructor, of `from_budget` or of `fit` that may be set by name."""
    parameters = signature(function).parameters
    return {n: p for n, p in parameters.items() if n not in _NOT_OPTIONS and p.kind is not Parameter.VAR_KEYWORD}


def check_options(scheme: type[Scheme], options: Iterable[str]) -> None:
    """ConfigError for an option that no way of making this scheme has; it names the close match and all there are."""
    known = options_of(scheme.__init__) | options_of(scheme.from_budget) | options_of(scheme.fit)
    for option in options:
        if option not in known:
            near = get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            valid = ", ".join(known) or "none"
            raise ConfigError(f"{scheme.name} has no option {option!r}{hint} (its options: {valid})")
