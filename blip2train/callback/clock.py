"""Seconds as people read them."""


def format_seconds(seconds: float) -> str:
    """`75.4` -> `1:15`, `7325` -> `2:02:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
