"""`lowprec <command>`: each command a thin function over the packages, which are imported when it runs.

Exit status: 0 done, 1 failed, 2 bad usage (the message says what would be valid), 3 diverged.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lowprec.errors import UsageError, unknown

DONE, FAILED, BAD_USAGE, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 130
STATUS_CODES = {"done": DONE, "interrupted": DONE, "failed": FAILED, "diverged": DIVERGED}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; never raises."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = argparse.Namespace(workdir=None)
    try:
        arguments, extra = _parse(argv)
        return arguments.command(arguments, extra)
    except SystemExit as end:  # argparse has said its message
        return end.code if isinstance(end.code, int) else BAD_USAGE
    except UsageError as error:
        print(f"lowprec: {error}", file=sys.stderr)
        return BAD_USAGE
    except KeyboardInterrupt:
        print("lowprec: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        return _failed(error, arguments.workdir)


def _failed(error: Exception, workdir: Path | None) -> int:
    from lowprec.training.failures import explain, keep_traceback

    # Tasks that failed with it, or were given up, would tell of it once more at the end of the process.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    message = explain(error, workdir)
    if message is None:
        kept = keep_traceback(error, Path(workdir or ".") / "traceback.txt")
        what = str(error).strip().partition("\n")[0]
        message = f"{type(error).__name__}: {what} (traceback: {kept or 'could not be written'})"
    print(f"lowprec: failed: {message}", file=sys.stderr)
    return FAILED


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from lowprec.training.config import resolve
    from lowprec.training.config_file import config_name, load_config
    from lowprec.training.host_memory import keep_freed_memory
    from lowprec.training.launch import train
    from lowprec.training.run_directory import RunDirectory

    config = resolve(load_config(arguments.config, overrides))
    workdir = arguments.workdir or Path("runs") / f"{config_name(arguments.config)}-{config.hash()[:8]}"
    arguments.workdir = workdir
    before = RunDirectory(workdir).finished()
    keep_freed_memory()
    summary = train(config, workdir)
    print(_outcome(summary, workdir, repeated=before is not None))
    return STATUS_CODES[summary["status"]]


def _outcome(summary: dict, workdir: Path, repeated: bool) -> str:
    """The line that stays on the screen."""
    from lowprec.training.evaluation import describe
    from lowprec.training.progress import duration

    unit = summary.get("unit", "token")
    parts = [f"{summary['status']}{' before' if repeated else ''}: {workdir}", f"{summary['recipe']}"]
    if summary["status"] == "diverged":
        parts.append(f"{summary['diverged']}; step {summary['step']} was the last good one")
    evaluation = summary.get("evaluation")
    if evaluation:
        parts.append(
            f"loss {evaluation['eval_loss']:.4f} nats/{unit}, {describe(evaluation)} at step {evaluation['step']}"
        )
    parts.append(f"{summary['tokens']:,} {unit}s in {duration(summary['seconds'])}")
    if summary.get("tokens_per_second"):
        parts.append(f"{summary['tokens_per_second']:,.0f} {unit}s/s")
    return "; ".join(parts)


def _eval(arguments: argparse.Namespace, extra: list[str]) -> int:
    _refuse(extra)
    from lowprec.training.standalone_evaluation import evaluate_run

    print(evaluate_run(arguments.workdir, step=arguments.step, recipe=arguments.recipe, batches=arguments.batches))
    return DONE


def _allocate(arguments: argparse.Namespace, extra: list[str]) -> int:
    _refuse(extra)
    from lowprec.analysis.allocate_run import allocate_run, split_formats

    names = ("bits", "increase", "measure", "solver", "order", "samples", "batches", "step", "rule")
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    print(allocate_run(arguments.directory, formats=split_formats(arguments.formats), **options))
    return DONE


def _report(arguments: argparse.Namespace, extra: list[str]) -> int:
    _refuse(extra)
    from lowprec.analysis.report import default_output, draw_curves, report_table
    from lowprec.analysis.runs import find_runs

    runs = find_runs(arguments.directories)
    print(report_table(runs))
    output = arguments.output or default_output(runs)
    draw_curves(runs, output)
    print(f"\ncurves: {output}")
    return DONE


def _formats(arguments: argparse.Namespace, extra: list[str]) -> int:
    names = [*arguments.names, *(text for text in extra if not text.startswith("-"))]  # those after an option
    _refuse([text for text in extra if text.startswith("-")])
    if names[:1] == ["compare"]:
        _refuse_options(arguments, "plot")
        return _compare_formats(names[1:], arguments)
    _refuse(names[1:])
    _refuse_options(arguments, "output", "size", "seed", *([] if names else ["plot"]))
    from lowprec.analysis.format_table import format_details, format_table

    text = format_details(names[0]) if names else format_table()
    if arguments.plot:
        from lowprec.analysis.format_plots import draw_format

        draw_format(names[0], arguments.plot)
        text += f"\n\nnumber line: {arguments.plot}"
    print(text)
    return DONE


def _compare_formats(names: list[str], arguments: argparse.Namespace) -> int:
    from lowprec.analysis.format_comparison import compare, comparison_table
    from lowprec.analysis.format_plots import draw_comparison

    given = {name: value for name in ("size", "seed") if (value := getattr(arguments, name)) is not None}
    results = compare(names, **given)
    text = comparison_table(results)
    if arguments.output:
        draw_comparison(results, arguments.output)
        text += f"\n\nerrors: {arguments.output}"
    print(text)
    return DONE


def _refuse_options(arguments: argparse.Namespace, *options: str) -> None:
    for option in options:
        if getattr(arguments, option) is not None:
            raise UsageError(f"--{option} has no meaning here (lowprec formats --help shows where it has)")


def _recipes(arguments: argparse.Namespace, extra: list[str]) -> int:
    _refuse(extra)
    from lowprec import recipes

    if arguments.names[:1] == ["compare"]:
        print(recipes.comparison(arguments.names[1:]))
        return DONE
    if arguments.names:
        _refuse(arguments.names[1:])
        print(recipes.parse(arguments.names[0]).describe())
        return DONE
    width = max(map(len, recipes.names()))
    for name in recipes.names():
        print(f"{name.ljust(width)}  {recipes.get(name).source}".rstrip())
    return DONE


def _optimizers(arguments: argparse.Namespace, extra: list[str]) -> int:
    _refuse(extra)
    from lowprec.analysis.optimizer_table import optimizer_details, optimizers_table

    print(optimizer_details(arguments.name) if arguments.name else optimizers_table())
    return DONE


def _refuse(extra: list[str]) -> None:
    if extra:
        raise UsageError(f"unknown argument {extra[0]!r} (--help lists what this command takes)")


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    import lowprec

    parser = argparse.ArgumentParser(prog="lowprec", description="Low-precision training, recipe by recipe.")
    parser.add_argument("--version", action="version", version=f"lowprec {lowprec.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    adders = (_train_parser, _eval_parser, _allocate_parser, _report_parser)
    for add in (*adders, _formats_parser, _recipes_parser, _optimizers_parser):
        add(commands)
    names = list(commands.choices)
    if argv and not argv[0].startswith("-") and argv[0] not in names:
        raise unknown("command", argv[0], names)
    return parser.parse_known_args(argv)


def _add(commands, name: str, command: Callable, summary: str, **options) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False, **options)
    parser.set_defaults(command=command, workdir=None)
    return parser


def _train_parser(commands) -> None:
    parser = _add(
        commands,
        "train",
        _train,
        "train the run of a config, or go on with it",
        usage="lowprec train [--config=FILE[:ARG]] [--config.KEY=VALUE ...] [--workdir=DIR]",
        epilog="Ctrl-C or SIGTERM saves and ends; the same command goes on from there.",
    )
    parser.add_argument("--config", metavar="FILE[:ARG]", help="a file with get_config(ARG); without it, the defaults")
    parser.add_argument(
        "--config.KEY", metavar="VALUE", dest="key", help="another value of a key, e.g. --config.recipe=nvfp4"
    )
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="of the run; runs/<config>-<hash> if not given")


def _eval_parser(commands) -> None:
    parser = _add(commands, "eval", _eval, "evaluate a checkpoint on held-out data, quantized and in full precision")
    parser.add_argument("--workdir", type=Path, metavar="DIR", required=True, help="of the run")
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest if not given")
    parser.add_argument("--recipe", help="quantize the forward pass by this recipe instead of the run's own")
    parser.add_argument("--batches", type=int, help="of the run's batch size; as in the run if not given")


def _allocate_parser(commands) -> None:
    parser = _add(
        commands,
        "allocate",
        _allocate,
        "a format for each layer of a trained run, within a budget of bits or of loss, as a recipe",
        epilog="The last line is the recipe, as config.recipe takes it.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="of the run")
    parser.add_argument("--formats", metavar="NAME,NAME,...", required=True, help="the candidates: int4@row,int8@row")
    limit = parser.add_mutually_exclusive_group(required=True)
    limit.add_argument("--bits", type=float, help="stored for a weight on average, with its scales")
    limit.add_argument(
        "--increase", type=float, metavar="NATS", help="of the loss, at most: the smaller of two formats in more layers"
    )
    parser.add_argument("--measure", help="of sensitivity: hessian (if not given), eigenvalue, fisher or path")
    parser.add_argument("--solver", help="with --bits: milp (if not given; needs scipy) or greedy")
    parser.add_argument("--order", help="of layers, with --increase: cost (if not given) or interactions of pairs")
    parser.add_argument(
        "--samples", type=int, help="draws of the trace, power iterations or points of the path; 16 if not given"
    )
    parser.add_argument("--batches", type=int, help="of held-out data; as in the run if not given")
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest if not given")
    parser.add_argument(
        "--rule", metavar="RULE", help='of a layer, {} for its format: "fwd={}"; the weights alone if not given'
    )


def _report_parser(commands) -> None:
    parser = _add(commands, "report", _report, "a table of runs, and their loss curves as a PNG")
    parser.add_argument("directories", nargs="+", metavar="DIR", help="of a run, or with runs in it")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.png", help="the curves; report.png beside the runs if not given"
    )


def _formats_parser(commands) -> None:
    parser = _add(
        commands,
        "formats",
        _formats,
        "all named number formats, everything about one, or several compared",
        usage=(
            "lowprec formats [NAME [--plot=FILE.png]]\n"
            "       lowprec formats compare NAME NAME ... [--output=FILE.png] [--size=ROWS] [--seed=SEED]"
        ),
        epilog="compare rounds the same data to each format. A format without scales stands twice: as it is, a cast, "
        "and as NAME@tensor, scaled by the largest magnitude of the tensor.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="e.g. nvfp4, or any format that can be written, e.g. e3m2fn@1x32/e8m0.ceil",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="the number line and the error of rounding")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="SQNR against bits per value")
    parser.add_argument("--size", type=int, metavar="ROWS", help="of 1024 values in the data; 1024 if not given")
    parser.add_argument("--seed", type=int, help="of the data; 0 if not given")


def _recipes_parser(commands) -> None:
    parser = _add(
        commands,
        "recipes",
        _recipes,
        "all named recipes, who rounds what and how in one, or several compared",
        usage="lowprec recipes [NAME]\n       lowprec recipes compare NAME NAME ...",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help='e.g. nvfp4, or a short form, e.g. "fwd=int4@row wgrad=bf16"'
    )


def _optimizers_parser(commands) -> None:
    parser = _add(commands, "optimizers", _optimizers, "all named optimizers, or what one does and can be told")
    parser.add_argument("name", nargs="?", metavar="NAME", help="e.g. stable_adam4")
