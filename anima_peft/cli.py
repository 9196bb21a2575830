"""The `anima-peft` command.

Exit codes: 0 done, 1 the run could not go on, 2 a fault in what was given; 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Callable, Sequence

from .errors import InputError, Interrupted, TrainingError
from .launched import is_local_main, is_main
from .terminal import LINE_BREAK, prepare_terminal
from .texts import escaped

logger = logging.getLogger(__name__)

DONE, FAILED, FAULTY_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code. Heavy imports wait until the command is known."""
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = {
        "train": _train,
        "generate": _generate,
        "inspect": _inspect,
        "convert": _convert,
        "merge": _merge,
        "extract": _extract,
        "resize": _resize,
        "share": _share,
        "download": _download,
        "check": _check,
        "report": _report,
        "miniature": _miniature,
        "miniature-score": _miniature_score,
    }
    parser = argparse.ArgumentParser(prog="anima-peft", description=__doc__, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    subparsers.add_parser("train", help="train an adapter", add_help=False)
    subparsers.add_parser("generate", help="draw pictures, with or without adapters", add_help=False)
    subparsers.add_parser("inspect", help="say what is in adapter files", add_help=False)
    subparsers.add_parser("convert", help="write an adapter file in another style", add_help=False)
    subparsers.add_parser("merge", help="adapters into one, or into a checkpoint", add_help=False)
    subparsers.add_parser("extract", help="an adapter out of two checkpoints", add_help=False)
    subparsers.add_parser("resize", help="an adapter of lower rank", add_help=False)
    subparsers.add_parser("share", help="push an adapter with a model card to a hub", add_help=False)
    subparsers.add_parser("download", help="fetch the model or its tokenizers", add_help=False)
    subparsers.add_parser("check", help="look a dataset over before training", add_help=False)
    subparsers.add_parser("report", help="write the page about a run, also while it is at work", add_help=False)
    subparsers.add_parser("miniature", help="write a small Anima and pictures to try things out", add_help=False)
    subparsers.add_parser("miniature-score", help="what an adapter has taught the small Anima", add_help=False)
    known, rest = parser.parse_known_args(argv[:1])
    return report_faults(lambda: commands[known.command](rest + argv[1:]))


def report_faults(action: Callable[[], None]) -> int:
    """Run `action`; what the user can mend is printed as one message without a traceback.

    Of several processes on a machine, one speaks: the others know no more. Messages may repeat what stands in files of
    others: what a terminal would obey is escaped in them.

    Returns:
        The exit code.
    """
    prepare_terminal(logging.WARNING if is_local_main() else logging.ERROR)
    try:
        action()
    except InputError as error:
        _say(f"error: {error}")
        return FAULTY_INPUT
    except (TrainingError, OSError) as error:  # OSError: a full disk, a folder gone; its text names the file
        _say(f"error: {error}")
        return FAILED
    except Interrupted as end:
        _say(str(end))
        return end.exit_code
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    return DONE


def _say(text: str) -> None:
    if is_local_main():
        print(escaped(text, keep=LINE_BREAK), file=sys.stderr)


def train_from(argv: Sequence[str], prog: str) -> None:
    """Parse, train, and say what was written; with `--print_config`, only show what was parsed.

    The launchers and `anima-peft train` are this call.

    Raises:
        InputError: a fault in the configuration, the model, the pictures or the captions.
        TrainingError: the run cannot go on.
    """
    from .config import load

    config = load(argv, prog=prog)
    if config.print_config:
        for warning in config.warnings:
            logger.warning(warning)
        if not is_main():
            return
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # as TOML is; a redirection on Windows would not be
        print(config.resolved, end="")
        return
    from .training.outputs import written_text
    from .training.run import train

    result = train(config)
    if not is_main():
        return
    print(f"\n{result.steps} steps; the adapter's size is {result.relative_delta:.2%} of the adapted weights.")
    print(written_text(result.adapter, result.log_folder))


def _train(argv: Sequence[str]) -> None:
    train_from(argv, prog="anima-peft train")


def _miniature(argv: Sequence[str]) -> None:
    from .miniature.commands import write

    write(argv)


def _miniature_score(argv: Sequence[str]) -> None:
    from .miniature.commands import score_adapter

    score_adapter(argv)


def _generate(argv: Sequence[str]) -> None:
    from .generate_command import generate

    generate(argv)


def _inspect(argv: Sequence[str]) -> None:
    from .adapter_commands import inspect_command

    inspect_command(argv)


def _convert(argv: Sequence[str]) -> None:
    from .adapter_commands import convert_command

    convert_command(argv)


def _merge(argv: Sequence[str]) -> None:
    from .merge_command import merge_command

    merge_command(argv)


def _extract(argv: Sequence[str]) -> None:
    from .extract_command import extract_command

    extract_command(argv)


def _resize(argv: Sequence[str]) -> None:
    from .resize_command import resize_command

    resize_command(argv)


def _share(argv: Sequence[str]) -> None:
    from .share_command import share_command

    share_command(argv)


def _download(argv: Sequence[str]) -> None:
    from .download_command import download_command

    download_command(argv)


def _check(argv: Sequence[str]) -> None:
    from .check_command import check

    check(argv, prog="anima-peft check")


def _report(argv: Sequence[str]) -> None:
    from .report_command import report_command

    report_command(argv)


if __name__ == "__main__":
    sys.exit(main())
