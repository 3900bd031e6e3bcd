"""`python -m byol_core.report`: write the report of a run again, or compare several.

    python -m byol_core.report runs/imgs                    write runs/imgs/report.html again
    python -m byol_core.report runs/a runs/b [--out FILE]   compare runs: curves overlaid, differences in tables
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from byol_core.system.command import Parser, file_to_write, run_in_two_parts
from byol_core.system.console import show


def build_parser() -> Parser:
    parser = Parser(prog="python -m byol_core.report", allow_abbrev=False,
                    description="Write the report of a run again, or compare several runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", metavar="FILE", help="where to write the comparison (default: compare.html)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    return run_in_two_parts(lambda: prepare(options), carry_out, options.debug)


def prepare(options: Namespace) -> Namespace:
    for folder in options.runs:
        if not (folder / "config.json").exists():
            raise ValueError(f"{folder} is not a run folder: no config.json in it")
    if options.out is not None:
        file_to_write("--out", options.out)
    return options


def carry_out(options: Namespace) -> None:
    from byol_core.report.compare import compare  # only now is torch loaded: --help need not wait
    from byol_core.report.page import write_report

    folders, out = options.runs, Path(options.out or "compare.html")
    try:
        if len(folders) == 1 and options.out is None:
            out = folders[0] / "report.html"
            write_report(folders[0])
        else:
            compare(folders, out)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # what no run has written
        raise RuntimeError(f"{' or '.join(map(str, folders))} has a damaged file, most likely config.json "
                           f"({type(error).__name__}: {error})") from error
    show(sys.stdout, f"{out}\n")


if __name__ == "__main__":
    sys.exit(main())
