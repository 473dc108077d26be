"""The errors a user can meet.

Every message says what was given, what was wanted and what to do. Each class also derives from the
built-in exception that fits, so ``except ValueError`` keeps working in programs that use them.
"""


class TinyGPTError(Exception):
    """Base of all errors raised on purpose; the command line prints them without a traceback."""

    exit_code = 1


class UsageError(TinyGPTError, ValueError):
    """A wrong argument or option: something the caller can put right by asking differently."""

    exit_code = 2


class ConfigError(UsageError):
    """A config field with a value that cannot work, or an unknown field."""


class DataError(TinyGPTError, ValueError):
    """Text or tokens that cannot be read or used."""


class TokenizerError(TinyGPTError, ValueError):
    """A vocabulary that is missing or damaged, or text that a tokenizer cannot hold."""


class CheckpointError(TinyGPTError, ValueError):
    """A checkpoint that is missing, damaged, of another model or of a newer format."""


class ChangedRunError(CheckpointError):
    """A run that would go on with other data or settings than it had."""

    def __init__(self, reason: str, fields: tuple[str, ...]) -> None:
        super().__init__(f"{reason}; or allow it knowingly: allow_change={fields!r}.")
        self.reason, self.fields = reason, fields


class InteropError(TinyGPTError, ValueError):
    """A model or file of another tool that cannot be taken over, or one of ours handed on."""


class TrainingError(TinyGPTError, RuntimeError):
    """Training that cannot go on, such as a loss that is no longer a number."""


class DeviceError(TinyGPTError, RuntimeError):
    """No usable device or compiler."""


class KernelError(TinyGPTError, RuntimeError):
    """A fast kernel that cannot run what it was given, where its plain twin is not wanted."""


class StreamError(TinyGPTError, OSError):
    """Standard input or output that is closed, full or broken."""


class MissingExtraError(TinyGPTError, ImportError):
    """An optional dependency that is not installed; the message names the extra."""


def nearest(name: str, known: list[str]) -> str:
    """`` Did you mean 'n_layer'?`` if a known name is close to ``name``, else an empty string."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
