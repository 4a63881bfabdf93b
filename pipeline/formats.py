"""Times and sizes as a person reads them: the one place where they become text."""


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as 0:01:30."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"


def duration(seconds: float | None) -> str:
    """Seconds with one decimal up to 100, then `clock`; a dash if it is not known."""
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds < 100 else clock(seconds)


def hours(seconds: float) -> str:
    """Hours, to a few digits."""
    return f"{seconds / 3600:,.4f}" if seconds < 36_000 else f"{seconds / 3600:,.1f}"


def size(count: float) -> str:
    """Bytes, in units of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if count else "–"
        count /= 1000
    return f"{count:,.3g} TB"
