"""How far a command is: a bar on a terminal; elsewhere a plain line now and then. All on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType

SECONDS = 10.0  # between two lines


class Progress:
    """A context in which `update` tells how much is done.

    Args:
        what: "reading", "step": what comes before the numbers.
        total: in all; may be set later.
        unit: what is counted.
        done: what is done already.
        shown: whether anything is.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0, shown: bool = True) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._shown, self._bar, self._last = shown, None, time.monotonic()
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                desc=what, total=total, initial=done, unit=unit, unit_scale=unit == "B", dynamic_ncols=True
            )

    def update(self, done: int, note: str = "") -> None:
        """So much is done in all; `note` says more."""
        self.done = done
        if self._bar is not None:
            self._bar.set_description(self.what, refresh=False)
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.total = self.total
            self._bar.update(done - self._bar.n)
        elif self._shown and (time.monotonic() - self._last >= SECONDS or done == self.total):
            self._last = time.monotonic()
            print(f"{self.what}: {done:,} of {self.total:,} {self.unit}{', ' if note else ''}{note}", file=sys.stderr)

    def line(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._shown:
            print(text, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
