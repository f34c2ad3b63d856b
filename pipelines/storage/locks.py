"""Locks on files, which some file systems do not have."""

from __future__ import annotations

import errno
import fcntl
from typing import IO, Any

_NONE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


class NoLocks(OSError):
    """The file system of a file has no locks."""


def lock(file: IO[Any], *, shared: bool = False, wait: bool = True) -> None:
    """Lock an open file until it is closed.

    Raises:
        NoLocks: there is no such thing here.
        BlockingIOError: another process has it, and this one was not to wait.
    """
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno in _NONE:
            raise NoLocks(error.errno, error.strerror, file.name) from error
        raise
