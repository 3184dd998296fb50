"""The secret by which a worker shows that it was started for this server."""

from __future__ import annotations

from trtserve.settings.errors import SettingsError
from trtserve.settings.schema import Settings


def given_token(settings: Settings) -> str | None:
    """From the environment or the file that the settings name; None if they name none. Raises SettingsError."""
    if settings.worker_token is not None:
        return settings.worker_token.get_secret_value()
    path = settings.worker_token_file
    if path is None:
        return None
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--worker-token-file {path}: cannot be read: {error}") from error
    if not token:
        raise SettingsError(f"--worker-token-file {path}: is empty; write a long random secret into it")
    return token


def worker_token(settings: Settings) -> str:
    """As `given_token`, for a worker, which needs one."""
    token = given_token(settings)
    if token is None:
        raise SettingsError("the server's worker token is needed: give --worker-token-file or TRTSERVE_WORKER_TOKEN")
    return token
