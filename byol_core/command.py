"""What the commands that use a trained backbone share: options, one-line errors, exit codes (standard library only)."""

import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

from byol_core.config import AppendPaths, Parser, auto_or_workers, one_line
from byol_core.failures import is_out_of_memory, own_words, show

Prepared = TypeVar("Prepared")


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
