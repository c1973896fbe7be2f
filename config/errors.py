"""The error hierarchy: everything flawline raises on purpose.

    FlawlineError
    ├── ConfigError      wrong configuration or usage: names the key or the file     exit code 2
    │   └── NoAnswer     no agent answers at the address that was named             exit code 1
    ├── BundleError      a model bundle is missing, corrupt or does not fit together exit code 2
    │   └── FetchError   its files could not be fetched this time: names the address exit code 1
    ├── ImageError       a picture cannot be read or judged: names the file
    ├── CameraError      a camera cannot be opened or delivers no frames: names the camera
    ├── RingError        the shared-memory ring is full, gone or of another shape
    ├── WorkerError      the worker process is lost, hangs, or refuses a frame
    └── JournalError     the verdict journal cannot be read or written: names the file

No exception of a vendor's library crosses a module's boundary: it is mapped once, with `raise ... from`.
"""


class FlawlineError(Exception):
    """Base of every error that flawline raises on purpose. Its text is one sentence for a person."""

    exit_code = 1


class ConfigError(FlawlineError):
    """Wrong configuration or usage. The text names the key, the file or the address."""

    exit_code = 2


class NoAnswer(ConfigError):
    """No agent answers at the address that was named: the wrong one, or the agent does not run."""

    exit_code = 1


class BundleError(FlawlineError):
    """A model bundle is missing, corrupt, or its parts do not fit together. The text names the file."""

    exit_code = 2


class FetchError(BundleError):
    """A bundle's files could not be fetched; the same command may succeed later. The text names the address."""

    exit_code = 1


class ImageError(FlawlineError):
    """A picture cannot be read, or has a form that cannot be judged. The text names the file or camera."""


class CameraError(FlawlineError):
    """A camera cannot be opened, vanished, or delivers no frames. The text names the camera."""


class RingError(FlawlineError):
    """The shared-memory frame ring is full, gone, or has another shape than expected."""


class WorkerError(FlawlineError):
    """The inference worker is lost, hangs, or answered with a failure.

    `reason` is the wire's word for it: `worker_lost`, `out_of_memory`, `bad_frame` or `internal`.
    """

    def __init__(self, message: str, reason: str = "internal") -> None:
        super().__init__(message)
        self.reason = reason


class JournalError(FlawlineError):
    """The verdict journal cannot be opened, read or written. The text names the file."""
