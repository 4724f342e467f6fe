"""How a command line ends: errors of ours are one readable line on stderr and their exit code.

Exit codes: 0 ok, 1 failure, 2 usage, 3 verification failed, 4 not found, 5 conflict, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from embstore.errors import ConfigError, Conflict, EmbstoreError, NotFound, VerificationFailed

INTERRUPTED = 130
EXIT_CODES = ((ConfigError, 2), (VerificationFailed, 3), (NotFound, 4), (Conflict, 5))


def run(app: Callable[..., Any], program: str | None = None) -> NoReturn:
    """Run a Typer app with this process's arguments, then exit; `program` is its name in help, where it has another."""
    import typer

    try:
        code = app(prog_name=program, standalone_mode=False) or 0
        sys.stdout.flush()
    except EmbstoreError as error:
        code = fail(str(error), exit_code(error))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # nobody reads on; what Python would flush at its end has to go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        code = fail(error.format_message(), 2)  # a usage error; its text names the option, and is empty after help
    sys.exit(code)


def exit_code(error: EmbstoreError) -> int:
    """The exit code of an error."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)


def fail(message: str, code: int = 1) -> int:
    """One line on stderr, where there is something to say; returns the code."""
    if message:
        sys.stderr.write(f"embstore: {' '.join(message.split())}\n")
    return code
