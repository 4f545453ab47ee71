"""The command `fusedkv`: one parser, one module of `cli/` per subcommand, errors as one clear sentence.

Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from fusedkv_ext.errors import ConfigError

COMMANDS = (
    "demo",
    "train",
    "generate",
    "eval",
    "export",
    "plan",
    "info",
    "plot",
    "compare",
    "probe",
    "grads",
    "convert",
    "uptrain",
    "compress",
)
# Commands that the processes of torchrun run as one.
TOGETHER = ("train", "generate", "eval", "compare", "uptrain")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"fusedkv_ext.cli.{name}")


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout, everything else on stderr"
    )
    common.add_argument("--debug", action="store_true", help="on an error, show the traceback")
    return common


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands.

    Each subcommand sets `run`, a function of the parsed arguments that returns the exit code.
    """
    parser = argparse.ArgumentParser(
        prog="fusedkv",
        description="Attention whose keys and values come from several layers: train it, run it, look at it.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = _module(name)
        first, _, more = (module.__doc__ or "").partition("\n\n")
        summary = first.replace("\n", " ").split(": ", 1)[-1]
        command = subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary}\n\n{more}".rstrip(),
            parents=[_common()],
            conflict_handler="resolve",  # a command may have a --json of its own
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
    return parser


def _sentence(error: BaseException) -> str:
    """The message of an error on one line."""
    text = " ".join(str(error).split())
    known = isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError))
    return text if text and known else f"{type(error).__name__}: {text}".rstrip(": ")


def _one_of_several() -> bool:
    """True if torchrun started this process and others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        args, unknown = build_parser().parse_known_args(argv)
        if unknown:  # the command's own parser reports it, and shows its options
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    except SystemExit as exit_:  # argparse: 0 after --help, 2 after a wrong argument
        return int(exit_.code or 0)
    if args.command not in TOGETHER and _one_of_several():  # all would write the same files
        if os.environ.get("RANK", "0") == "0":
            print(
                f"fusedkv: error: {args.command} runs in one process; start it without torchrun, which is "
                f"for {', '.join(TOGETHER)}",
                file=sys.stderr,
            )
        return 2
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("fusedkv: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the pipe is gone: print nothing, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        print(f"fusedkv: error: {_sentence(error)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
