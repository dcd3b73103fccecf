"""Named errors. Every message carries the offending values and the fix; the CLI exits with `exit_code`."""

from collections.abc import Sequence


class PopaxError(Exception):
    """Root of everything a user of popax can cause; the CLI prints it without a traceback and exits 2."""

    exit_code = 2


class ConfigError(PopaxError):
    """A configuration key is missing, unknown, or out of range."""


class CheckpointError(PopaxError):
    """Base weights or a training checkpoint are missing, truncated, or of the wrong shape."""


class SiteError(PopaxError):
    """A target rule names a site that the model does not have, or matches nothing."""


class BaseMismatchError(PopaxError):
    """An adapter was made for another base (its digest differs)."""


class PeftError(PopaxError):
    """A PEFT directory holds something popax cannot represent, or the other way round."""


class DataError(PopaxError):
    """An input record is malformed; names the file and the line."""


class UserTextError(DataError):
    """A record of one user cannot be laid out or tokenised: that user is set aside, and nobody else.

    record: the record's number in its file, from 1 (where they came from no file: among the user's); file: its path.
    """

    def __init__(self, message: str, *, record: int | None = None, file: str | None = None):
        super().__init__(message)
        self.record, self.file = record, file


class TokenizerError(PopaxError):
    """A tokenizer cannot be loaded, or lacks what was asked of it (a chat template, a special token)."""


class ComposeError(PopaxError):
    """Adapters that cannot be combined as asked."""


class PopulationError(PopaxError):
    """Members do not fit together: other shapes, other cohort, too many for the slots."""


class CatalogError(PopaxError):
    """The catalog cannot be opened, read or written."""


class RevisionNotFoundError(CatalogError):
    """No such user, or no such revision of that user."""


class NonFiniteError(CatalogError):
    """Adapters that hold what is not a finite number; nothing of the batch was written. users: all of it whose are so,
    in the order of the batch; user: the first."""

    def __init__(self, message: str, users: Sequence[str] = ()):
        super().__init__(message)
        self.users = tuple(users)

    @property
    def user(self) -> str | None:
        return self.users[0] if self.users else None


class ConflictError(CatalogError):
    """Another writer committed this user's next revision first."""


class CorruptRevisionError(CatalogError):
    """A stored row or manifest does not match its digest; names the user and the revision."""


class SignatureError(CatalogError):
    """A revision is not signed by a trusted key, or a key cannot be read."""


class GateError(CatalogError):
    """A revision was not scored, or not well enough, to be promoted; it stays a candidate."""


class StorageError(CatalogError):
    """The disk is full, or the store refused to write; nothing was committed."""


class ResidencyTimeoutError(PopaxError):
    """A request did not get its device slots in time: others hold them."""


class QueueFullError(PopaxError):
    """More requests wait than the server takes: ask again later."""


class UnavailableError(PopaxError):
    """The server is starting, closing, or broken: ask another one, or later."""


class ServingError(PopaxError):
    """A request that the server does not take as it is, or cannot answer now; its message says what would be taken."""


class PlanError(PopaxError):
    """A step cannot be compiled ahead of time: the compiler, or the process that runs it, gave up."""


class Preempted(PopaxError):
    """SIGTERM asked the run to stop, and it has saved all it had; the same command goes on from there."""

    exit_code = 143  # 128 + SIGTERM, as shells have it


class ProcessError(PopaxError):
    """Several processes run as one, and another one of them met an error; its message says which and what."""


class ProcessLostError(ProcessError):
    """Another process of the run ended or stopped answering; the run resumes when all are started again."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: the same command, repeated, goes on
