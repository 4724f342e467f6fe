"""What follows from a scheme's file and its line in SCHEMES."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import re
from dataclasses import fields
from pathlib import Path

import pytest
from support.derived import DERIVED, renewed
from support.scheme_cases import (
    VARIANTS,
)

from embstore import schemes
from embstore.errors import ConfigError
from embstore.kernels import SHARED
from embstore.schemes import SCHEMES, scheme_class
from embstore.schemes.base import Scheme, SchemeConfig

PACKAGE = "embstore.schemes."


def test_every_scheme_has_cases() -> None:
    """The contract tests walk through the kinds that VARIANTS of tests/support/scheme_cases.py has of each scheme."""
    missing, gone = set(SCHEMES) - set(VARIANTS), set(VARIANTS) - set(SCHEMES)
    assert not missing, f"say in VARIANTS of tests/support/scheme_cases.py which kinds there are of {sorted(missing)}"
    assert not gone, f"VARIANTS of tests/support/scheme_cases.py has {sorted(gone)}, which are no schemes"


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_is_found_by_its_name(name: str) -> None:
    """The name in SCHEMES, in manifests, of the file and on the class is one; the class also comes from the package."""
    cls = scheme_class(name)
    assert issubclass(cls, Scheme)
    assert cls.name == name
    assert cls.__module__ == f"embstore.schemes.{name}"
    assert issubclass(cls.Config, SchemeConfig)
    assert getattr(schemes, cls.__name__) is cls


def test_every_file_of_schemes_is_registered() -> None:
    """A scheme's file has its line in SCHEMES: beside the schemes there are only the base class and the options."""
    files = {module.name for module in pkgutil.iter_modules(schemes.__path__)}
    assert files == {*SCHEMES, "base", "options", "parts"}


@pytest.mark.parametrize("path", DERIVED, ids=lambda path: path.name)
def test_texts_that_name_every_scheme_are_up_to_date(path: Path) -> None:
    """The imports for type checkers and the table of the docs are those of the schemes there are."""
    assert renewed(path) == path.read_text(), "run: python tests/support/derived.py"


@pytest.mark.parametrize("name", SCHEMES)
def test_a_schemes_kernels_are_found_by_its_name(name: str) -> None:
    """The loops of a scheme are in files of its name, or in files that embstore.kernels.SHARED lists for it."""
    files = {Path(inspect.getfile(cls)) for cls in scheme_class(name).__mro__ if cls.__module__.startswith(PACKAGE)}
    named = {found for file in files for found in re.findall(r'Loops\("(\w+)\.(\w+)"\)', file.read_text())}
    own = {name} | {kernel for kernel, users in SHARED.items() if name in users}
    assert {kernel for _, kernel in named} <= own, f"name the file after {name}, or list it in embstore.kernels.SHARED"
    assert {"cpu", "cuda"} == {folder for folder, _ in named}
    for folder, kernel in named:
        assert importlib.util.find_spec(f"embstore.kernels.{folder}.{kernel}")


def test_shared_kernels_are_used_by_the_schemes_listed() -> None:
    """Every scheme that SHARED lists for a file of loops exists and names that file."""
    for kernel, users in SHARED.items():
        for name in users:
            source = Path(inspect.getfile(scheme_class(name))).read_text()
            assert f'Loops("cpu.{kernel}")' in source, f"{name} does not use {kernel}"


@pytest.mark.parametrize("name", SCHEMES)
def test_a_constructors_signature_names_its_options(name: str) -> None:
    """`help` and `inspect.signature` show sizes, every field of Config and what all schemes take, each by its name."""
    parameters = inspect.signature(scheme_class(name)).parameters
    sizes = {field.name for field in fields(scheme_class(name).Config)}
    assert sizes | {"sparse", "init_std", "generator"} <= set(parameters)
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def test_an_unknown_scheme_is_answered_with_the_nearest() -> None:
    """The error lists the schemes and guesses the one meant."""
    with pytest.raises(ConfigError, match=r"no scheme named 'memcon': .*full.*; did you mean 'memcom'\?"):
        scheme_class("memcon")
    with pytest.raises(AttributeError, match="Nothing"):
        schemes.__getattr__("Nothing")
