"""What a person sees while a run goes on: a live bar on a terminal, a line now and then elsewhere."""

import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import IO, Any

# Between two plain lines: often enough to see that it lives, seldom enough to read the log.
PLAIN_SECONDS = 10.0
BAR_SECONDS = 0.1
SHORT = {"token": "tok", "image": "img"}
MIN_BAR, MAX_BAR = 5, 30
# Steps come in bursts, as they are read back late: their rate is that of several.
RECENT_STEPS = 20


class Clock:
    """Time spent, resumable: all of it, and that of the steps alone (without compiling, evaluation, checkpoints)."""

    def __init__(self, seconds: float = 0.0, train_seconds: float = 0.0, timed_tokens: int = 0):
        self._before, self._start = seconds, time.monotonic()
        self.train_seconds, self.timed_tokens = train_seconds, timed_tokens
        self._mark, self._compiled = self._start, False
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> "Clock":
        """From what `state` gave."""
        return cls(state["seconds"], state["train_seconds"], state["timed_tokens"])

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._start

    def step_done(self, tokens: int) -> float:
        """Tokens a second over the last steps; of the first one, in which everything is compiled, over that alone."""
        now = time.monotonic()
        elapsed, self._mark = max(now - self._mark, 1e-9), now
        if not self._compiled:
            self._compiled = True
            return tokens / elapsed
        self.train_seconds += elapsed
        self.timed_tokens += tokens
        self._recent.append((tokens, elapsed))
        return sum(tokens for tokens, _ in self._recent) / sum(elapsed for _, elapsed in self._recent)

    def restart(self) -> None:
        """Leaves out what was not a step."""
        self._mark = time.monotonic()

    @property
    def tokens_per_second(self) -> float | None:
        """Over all steps but the first of each process."""
        return self.timed_tokens / self.train_seconds if self.train_seconds else None

    def state(self) -> dict[str, float]:
        return {"seconds": self.seconds, "train_seconds": self.train_seconds, "timed_tokens": self.timed_tokens}


class Progress:
    """Shows lines of metrics as they come.

    Args:
      steps: of the whole run.
      stream: standard error when None.
      unit: what "tokens" are, a `Task.unit`.
    """

    def __init__(self, steps: int, stream: IO[str] | None = None, unit: str = "token"):
        self._steps, self._unit = steps, SHORT[unit]
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._first_done: tuple[int, float] | None = None
        self._shown = -1e9

    def step(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        now = time.monotonic()
        if self._first_done is None:
            self._first_done = (line["step"], now)
        last = line["step"] == self._steps
        if not last and now - self._shown < (BAR_SECONDS if self._live else PLAIN_SECONDS):
            return
        self._shown = now
        parts = self._parts(line, now)
        if self._live:
            columns = shutil.get_terminal_size().columns
            text = _with_bar(parts, line["step"] / self._steps, columns - 1)
            self._stream.write(f"\r{text}\x1b[K" + "\n" * last)
            self._stream.flush()
        else:
            print("  ".join(parts.values()), file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """A remark that stays; a bar goes on below it."""
        print(f"\r\x1b[K{text}" if self._live else text, file=self._stream, flush=True)

    def _parts(self, line: dict[str, Any], now: float) -> dict[str, str]:
        step = line["step"]
        parts = {"step": f"step {step}/{self._steps}", "percent": f"{100 * step // self._steps:3d}%"}
        for name, key, fmt in (
            ("loss", "loss", ".4f"),
            ("bits/byte", "bits_per_byte", ".3f"),
            ("grad", "grad_norm", ".2f"),
            ("lr", "lr", ".1e"),
        ):
            if line.get(key) is not None:
                parts[name] = f"{name} {line[key]:{fmt}}"
        if line.get("tokens_per_second"):
            parts["rate"] = f"{_thousands(line['tokens_per_second'])} {self._unit}/s"
        parts["eta"] = f"eta {self._eta(step, now)}"
        return parts

    def _eta(self, step: int, now: float) -> str:
        if step >= self._steps:
            return "0:00"
        first, since = self._first_done or (step, now)
        if step <= first:
            return "?"
        return duration((now - since) / (step - first) * (self._steps - step))


def duration(seconds: float) -> str:
    """1:05, 12:40, 2:00:09."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _thousands(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _with_bar(parts: dict[str, str], fraction: float, columns: int) -> str:
    """One line with a bar in it; on a narrow terminal the details give way to it."""
    parts = dict(parts)
    for name in ("lr", "grad", "bits/byte"):
        room = columns - len(" ".join(parts.values())) - len(" ||")
        if room >= MIN_BAR:
            break
        parts.pop(name, None)
    room = columns - len(" ".join(parts.values())) - len(" ||")
    if room >= MIN_BAR:
        width = min(room, MAX_BAR)
        full, eighths = divmod(round(fraction * width * 8), 8)
        bar = "█" * full + (" ▏▎▍▌▋▊▉"[eighths] if full < width else "")
        parts["percent"] += f" |{bar.ljust(width)}|"
    return " ".join(parts.values())[:columns]
