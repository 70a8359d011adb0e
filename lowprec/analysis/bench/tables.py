"""What was measured, as Markdown: a table for each group of cases, and below it what was not measured and why."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from lowprec.analysis.bench.case import CHECKED, MEASURED, Record
from lowprec.analysis.bench.runner import Results
from lowprec.analysis.bench.xla_products import BFLOAT16, COPY
from lowprec.analysis.table import markdown_table

# A column: its title, and a record -> its text.
Column = tuple[str, Callable[[Record, Results], str]]

_WORD = {"failed": "failed", "wrong": "WRONG", "impossible": "IMPOSSIBLE"}


def _number(key: str, digits: int, scale: float = 1.0) -> Callable[[Record, Results], str]:
    def text(record, _):
        value = record.get(key)
        return "" if value is None else f"{value * scale:,.{digits}f}"

    return text


def _percent(key: str) -> Callable[[Record, Results], str]:
    def text(record, _):
        return "" if record.get(key) is None else f"{100 * record[key]:.0f} %"

    return text


def _of_calibration(record: Record, results: Results) -> str:
    """The part of today's copy or product of bfloat16 that a kernel reaches: of whichever it waits for."""
    rate, name = ("tflops", BFLOAT16) if _waits_for_products(record, results) else ("gbps", COPY)
    best = results.measured(name, rate)
    return (
        "" if not best or rate not in record else f"{record[rate] / best:.2f} {'bf16' if rate == 'tflops' else 'copy'}"
    )


def _waits_for_products(record, results):
    copy, product = results.measured(COPY, "gbps"), results.measured(BFLOAT16, "tflops")
    if not record.get("tflops") or not copy or not product:
        return bool(record.get("tflops"))
    return record["work"]["flops"] / product > 1e3 * record["work"]["bytes"] / copy


def _beside_peers(record: Record, results: Results) -> str:
    """How many times as fast as each peer."""
    found = []
    for name in record.get("peers", ()):
        if name != COPY and (theirs := results.measured(name, "us")):
            found.append(f"{theirs / record['us']:.2f} × {_short(name)}")
    return ", ".join(found)


def _short(name):
    parts = name.split("/")
    if name == BFLOAT16:
        return "XLA bf16"
    return f"XLA {parts[1]}" if parts[0] == "xla" else f"{'XLA' if parts[-1] == 'xla' else parts[-1]}"


def _error(record: Record, _: Results | None) -> str:
    check = record.get("check")
    if check is None:
        return ""
    return f"{check.get('relative_error', check.get('codes_differing')):.1e}"


KERNEL_COLUMNS: tuple[Column, ...] = (
    ("µs", _number("us", 1)),
    ("quartiles", lambda r, _: f"{r['low_us']:,.1f} – {r['high_us']:,.1f}" if "low_us" in r else ""),
    ("TFLOP/s", _number("tflops", 0)),
    ("GB/s", _number("gbps", 0)),
    ("of its ceiling", _percent("of_ceiling")),
    ("of today's", _of_calibration),
    ("as fast as", _beside_peers),
    ("error", _error),
)
GROUPS: dict[str, tuple[Column, ...]] = {
    "recipes": (
        ("cpu", _number("cpu", 2)),
        ("wall", _number("wall", 2)),
        ("memory", _number("memory", 2)),
        ("cpu ms", _number("cpu_ms", 1)),
        ("compile s", _number("compile_s", 1)),
        ("steps", _number("steps", 0)),
    ),
    "optimizers": (
        ("cpu", _number("cpu", 2)),
        ("wall", _number("wall", 2)),
        ("cpu ms", _number("cpu_ms", 1)),
        ("state B/param", _number("state_bytes_each", 4)),
        ("temporary MB", _number("temporary_bytes", 1, 1e-6)),
        ("compile s", _number("compile_s", 1)),
    ),
    "llama": (
        ("ms", _number("ms", 2)),
        ("range", lambda r, _: f"{r['low_ms']:.2f} – {r['high_ms']:.2f}" if "low_ms" in r else ""),
        ("of bf16", lambda r, results: _of_bfloat16(r, results)),
        ("TFLOP/s", _number("tflops", 0)),
        ("temporary GB", _number("temporary_bytes", 2, 1e-9)),
        ("loss", _number("loss", 3)),
    ),
}
ABOUT = {
    "calibration": "What this device does today.",
    "recipes": "Four Dense(512) layers, batch 1024, plain SGD: ratios to float32, medians of steps timed in turn.",
    "optimizers": "A Llama's parameters: ratios to optax.adamw in float32, medians of steps timed in turn.",
    "llama": "A training step of Llama blocks, plain SGD; one batch of random tokens, its loss after the last step. "
    "TFLOP/s of the products with weights.",
    "correct": "Each kernel at a small shape, beside its reference.",
    "tune": "Configs of block_matmul.",
}


def _of_bfloat16(record, results):
    theirs = results.measured(record["plain"], "ms") if "plain" in record else None
    return "" if theirs is None else f"{record['ms'] / theirs:.2f}"


def results_tables(results: Results, left: Iterable[str] = ()) -> str:
    """All of it.

    Args:
      left: names of cases that were not run.
    """
    parts = [_head(results)]
    for group in dict.fromkeys(name.partition("/")[0] for name in results.records):
        parts.append(_group(group, results))
    missing = [name for name in left if name not in results.records]
    if missing:
        groups = Counter(name.partition("/")[0] for name in missing)
        counts = ", ".join(f"{count} of {group}" for group, count in groups.items())
        parts.append(f"## Not run\n\nFor lack of time: {counts}.")
    return "\n\n".join(parts) + "\n"


def one_line(name: str, record: Record) -> str:
    """A case that has just ended, for the screen."""
    if record["status"] in _WORD:
        return f"{name}: {_WORD[record['status']]}: {_line(record)}"
    shown = {"us": "µs", "ms": "ms", "tflops": "TFLOP/s", "gbps": "GB/s", "cpu": "of the base's CPU time"}
    numbers = [f"{record[key]:,.4g} {unit}" for key, unit in shown.items() if key in record]
    return f"{name}: {', '.join(numbers) or _error(record, None) or record['status']} ({record['seconds']:.1f} s)"


def _head(results):
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    clocks = ", ".join(f"{name} {value}" for name, value in machine.get("clocks", {}).items())
    lines = [
        f"# {machine.get('device', 'unknown device')}, {machine.get('date', '')}".rstrip(", "),
        "",
        f"{versions}; {machine.get('runtime', '')}. Host: {machine.get('host', '')}. {clocks}".rstrip(),
        *(f"\n**{note}**" for note in results.notes),
    ]
    return "\n".join(lines)


def _group(group, results):
    records = {name: each for name, each in results.records.items() if name.partition("/")[0] == group}
    shown = {name: each for name, each in records.items() if each["status"] in (MEASURED, CHECKED)}
    parts = [f"## {group}"]
    if group in ABOUT:
        parts.append(ABOUT[group])
    if shown:
        columns = [c for c in GROUPS.get(group, KERNEL_COLUMNS) if any(c[1](each, results) for each in shown.values())]
        cells: list[list[Any]] = [
            [name.partition("/")[2] or name, *(text(each, results) for _, text in columns)]
            for name, each in shown.items()
        ]
        if not columns:
            columns, cells = [("", lambda *_: "")], [[row[0], "checked"] for row in cells]
        parts.append(markdown_table([group, *(title for title, _ in columns)], cells))
    bad = [f"- {name}: {_WORD[r['status']]}: {_line(r)}" for name, r in records.items() if r["status"] in _WORD]
    if bad:
        parts.append("\n".join(bad))
    return "\n\n".join(parts)


def _line(record):
    return record.get("error", "").partition("\n")[0][:300]
