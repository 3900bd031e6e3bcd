"""What the commands share: kinds of options, one-line errors, exit codes (standard library only)."""

import argparse
import difflib
import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from byol_core.system.console import is_out_of_memory, one_line, own_words, show

Prepared = TypeVar("Prepared")


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def checked(kind: type[int] | type[float], accept: Callable[[float], bool], allowed: str,
            auto: bool = False) -> Callable[[str], float | None]:
    """A parser of one value that names what is allowed when it gets something else; "auto" reads as None where given."""

    def parse(text: str) -> float | None:
        if auto and text == "auto":
            return None
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not accept(number):  # NaN fails every comparison
            raise argparse.ArgumentTypeError(f"must be {'auto or ' if auto else ''}{allowed}, got {text}")
        return number

    return parse


natural = checked(int, lambda n: n >= 0, "a whole number, 0 or more")
passes = checked(int, lambda n: 0 <= n <= 10**9, "a whole number from 0 to 1000000000")
count = checked(int, lambda n: n >= 1, "a whole number, 1 or more")
amount = checked(float, lambda x: 0 <= x < math.inf, "a finite number, 0 or more")
positive = checked(float, lambda x: 0 < x < math.inf, "a finite number above 0")
share = checked(float, lambda x: 0 < x <= 1, "a number above 0 and up to 1")
unit = checked(float, lambda x: 0 <= x <= 1, "a number in [0, 1]")
auto_or_workers = checked(int, lambda n: 0 <= n <= 256, "a whole number from 0 to 256", auto=True)
auto_or_pixels = checked(int, lambda n: n >= 8, "a whole number of pixels, 8 or more", auto=True)


class AppendPaths(argparse.Action):
    """`--data A B` and `--data A --data B` alike, as a tuple; what is given takes the place of the default."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (*(() if before is self.default else before), *values))


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, with the nearest flag where one was mistyped."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split() if message.startswith("unrecognized") else []
        flags = [flag for action in self._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1) if unknown else []
        hint = f" - did you mean {near[0]}?" if near else " - see --help" if unknown else ""
        alone = os.environ.get("WORLD_SIZE", "1") == "1"  # of the processes that torchrun starts, one is enough to say it
        first = alone or os.environ.get("RANK", "0") == "0"
        self.exit(2, f"error: {one_line(message + hint)}\n" if first else None)


def backbone_parser(prog: str, description: str, with_images: bool = True) -> Parser:
    """A parser with the options that say which backbone is used, and, if wanted, on which images and on what machine."""
    parser = Parser(prog=prog, allow_abbrev=False, description=description)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="run folder, its backbone.pt, best.pt or last.pt")
    parser.add_argument("--network", default="online", choices=("online", "target"),
                        help="which of the two networks; the target is in last.pt only (default: online)")
    if with_images:
        parser.add_argument("--data", required=True, nargs="+", action=AppendPaths, metavar="PATH",
                            help="folders of images, a .txt list, or .tar shards")
        parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
        parser.add_argument("--workers", type=auto_or_workers, metavar="auto|N", help="data worker processes (default: auto)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def file_to_write(flag: str, name: str) -> Path:
    """Raises: ValueError when its folder is not there."""
    if not Path(name).absolute().parent.is_dir():
        raise ValueError(f"{flag} {name}: there is no such folder - create it, or give another place")
    return Path(name)


def run_in_two_parts(prepare: Callable[[], Prepared], carry_out: Callable[[Prepared], None], debug: bool) -> int:
    """The exit code: 0 done, 1 failed while running, 2 what was asked for cannot be done, 130 stopped by Ctrl-C."""
    code = 2
    try:
        prepared = prepare()
        code = 1
        carry_out(prepared)
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        line = "out of memory - try --device cpu, or a part of the images" if is_out_of_memory(error) else own_words(error)
        show(sys.stderr, f"error: {one_line(line)}\n")
        return code if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        return 130


def say(line: str) -> None:
    """A remark or a warning, on stderr, so that stdout holds results alone."""
    show(sys.stderr, line + "\n")
