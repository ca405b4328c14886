"""The ``polylora`` command: its arguments. Results go to stdout, progress and refusals to stderr.

Exit codes: 0 done, 1 the answer is no (an adapter refused, a bound missed), 2 the question makes no sense here (wrong
arguments, missing folder, no such device), 3 the command needs a GPU and cannot use one here.

A module beside the package, which loads torch and the ops: --help and --version must not wait for that.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

DONE, NO, USAGE, NO_GPU = 0, 1, 2, 3
VERSION = "0.1.0"  # of polylora


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. ``argv`` without the program's name; the process's own when None."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(argv).parse_args(argv)
    try:
        return arguments.run(arguments)
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="polylora", description="Multi-LoRA kernels: every row its own adapter.")
    parser.add_argument("--version", action="version", version=f"polylora {VERSION}",
                        help="print the version and exit")  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="run real adapters in one batch and hold each row against PEFT")
    demo.add_argument("--model", choices=("qwen", "nemotron", "both"), default="both")
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    demo.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    demo.add_argument("--tokens", type=positive, metavar="N", help="tokens to generate a row (default 64)")
    demo.add_argument("--json", metavar="FILE", help="write all numbers there ('-': to stdout instead of the tables)")
    demo.set_defaults(run=_command("demo"))

    info = commands.add_parser("info", help="versions, devices, ops, and whether the CUDA kernels are in")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_command("info"))

    check = commands.add_parser("check", help="say whether an adapter can be served on a model; needs no weights")
    check.add_argument("adapter", metavar="ADAPTER_DIR", help="PEFT folder")
    check.add_argument("--model", required=True, metavar="MODEL_DIR", help="folder with the model's config.json")
    check.add_argument("--json", action="store_true", help="as JSON")
    check.set_defaults(run=_command("check"))

    bench = commands.add_parser("bench", help="measure the ops on a GPU, beside other LoRA kernels where installed")
    if "bench" in argv:  # its arguments are the package's
        from polylora.bench.command import add_bench

        add_bench(bench.add_subparsers(required=True, metavar="WHAT"))
    return parser


def positive(text: str) -> int:
    """A number from 1 on, as argparse's ``type``."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    return lambda arguments: getattr(importlib.import_module("polylora.cli"), f"run_{name}")(arguments)


if __name__ == "__main__":
    sys.exit(main())
