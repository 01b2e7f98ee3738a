"""How many files a process may have open at once."""

from __future__ import annotations

import resource

MANY = 65_536  # more than any process here has; what systems and containers allow is often 1024


def allow_open_files(wanted: int = MANY) -> int:
    """Raises the soft limit of this process, and of those that it starts from now on, to `wanted`,
    as far as the hard limit goes. Returns how many it may have open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(soft, most)
