"""Errors a user can act on: one line (what, where, what to do) and the exit code of the command `beit3`."""

from __future__ import annotations


class BeitError(Exception):
    """Base of all errors that end a command with one clear line."""

    exit_code = 1


class ConfigError(BeitError, ValueError):
    """A run, a recipe or an option is wrong: unknown name, contradiction, value out of range."""

    exit_code = 2


class DataMissingError(BeitError, FileNotFoundError):
    """A file or folder that the run needs does not exist."""

    exit_code = 3


class DivergedError(BeitError):
    """Training produced NaN or infinity too many times in a row."""

    exit_code = 4


class PreemptedError(BeitError):
    """The run was asked to stop, saved its state, and can be resumed."""

    exit_code = 75


class RankLostError(BeitError):
    """Another process of the run ended or does not answer; its own message, if any, says why."""


class BadDataError(BeitError):
    """More samples cannot be used than a run tolerates."""


class BadSampleError(BeitError):
    """One sample of a data set cannot be used; `reason` is the name it is counted under."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
