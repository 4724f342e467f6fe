"""How a command line ends."""

from __future__ import annotations

from embstore import errors
from embstore.common.command_line import exit_code


def test_every_error_has_its_exit_code() -> None:
    """The documented codes, by class: conflicts too."""
    expected = {errors.ConfigError: 2, errors.VerificationFailed: 3, errors.NotFound: 4, errors.Conflict: 5}
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.EmbstoreError):
            code = next((code for base, code in expected.items() if issubclass(kind, base)), 1)
            assert exit_code(kind.__new__(kind)) == code
