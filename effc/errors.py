"""One family of errors, one exit code each, so that a script can tell what went wrong without reading text.

An error is a letter to someone in a hurry: `what` is wrong, `where` it is, and what to do next (`hint`).
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What somebody else's error says first, or its name where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def is_failure(error: BaseException) -> bool:
    """Whether an error is one of what was done, and no interrupt. Rust code panics with what is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class EffcError(Exception):
    """The system refuses a file, with its reason. A bug of effc ends with 1 too, and shows its traceback.

    All errors that effc can explain are of this family; `exit_code` is what the command line returns.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.hint = what, where, hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"in {self.where}")
        if self.hint:
            lines.append(self.hint)
        return "\n".join(lines)


class UsageError(EffcError):
    """The call itself is wrong: a missing argument, two options that exclude each other."""

    exit_code = 2


class RecipeError(EffcError):
    """The recipe names something unknown, or a value that is not allowed."""

    exit_code = 3


class SourceError(EffcError):
    """The model cannot be loaded: no directory, no weights, weights that are not numbers."""

    exit_code = 4


class TraceError(EffcError):
    """The model cannot be turned into a graph."""

    exit_code = 5


class PassError(EffcError):
    """A pass failed or broke its word."""

    exit_code = 6


class PreconditionError(PassError):
    """A pass was asked for something that the graph does not allow yet; the message says which pass would help."""


class PostconditionError(PassError):
    """A pass that promised to change nothing that can be seen from outside did."""


class CalibrationError(EffcError):
    """The calibration data is missing, empty, or does not fit the model's inputs."""

    exit_code = 7


class LoweringError(EffcError):
    """The graph cannot be written for the target, or the target refuses what was written."""

    exit_code = 8


class BackendUnavailable(EffcError):
    """The target needs a package or a device that is not here; the message has the pip line."""

    exit_code = 9


class VerifyError(EffcError):
    """The engine does not do what the model does, or the package is not what its manifest says."""

    exit_code = 10


class GateRefused(EffcError):
    """The engine works but does not pay, so it is not shipped."""

    exit_code = 11


class PackageError(EffcError):
    """The output directory cannot be written, replaced or read."""

    exit_code = 12


class TuneError(EffcError):
    """Training failed."""

    exit_code = 13


class DeltaError(EffcError):
    """A weight delta does not fit the package that it is applied to."""

    exit_code = 14


class LintError(EffcError):
    """Lint found something in a file, of which it has said what."""

    exit_code = 15


INTERRUPTED = 130
"""Exit code of a run that Ctrl-C ended."""
