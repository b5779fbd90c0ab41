"""How many more executables this process can map.

A CPU executable is hundreds of small memory mappings, and Linux grants a process a fixed number of them
(`vm.max_map_count`, 65,530 by default); past that the compiler fails and the process dies. What it is not: a bound on
memory in bytes, or of use on other systems, where it always says yes.
"""

from pathlib import Path

_LIMIT = Path("/proc/sys/vm/max_map_count")
_MAPS = Path("/proc/self/maps")
RESERVE = 8192
"""Mappings left for all else: threads, buffers, libraries, and the largest executable."""


def num_mappings() -> int | None:
    """Mappings of this process; None where the system does not tell."""
    try:
        return _MAPS.read_bytes().count(b"\n")
    except OSError:
        return None


def max_mappings() -> int | None:
    try:
        return int(_LIMIT.read_text())
    except (OSError, ValueError):
        return None


def room_for_executable() -> bool:
    used, limit = num_mappings(), max_mappings()
    return used is None or limit is None or used + RESERVE <= limit
