"""The memory of a process."""

from pathlib import Path


def memory() -> dict[str, int]:
    """Return this process's memory in bytes, now and at its highest, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    names = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
    return {name: int(fields[name].split()[0]) * 1024 for name in names}
