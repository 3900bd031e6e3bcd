"""`python -m byol_core.report`: write the report of a run again, or compare several.

    python -m byol_core.report runs/imgs                    write runs/imgs/report.html again
    python -m byol_core.report runs/a runs/b [--out FILE]   compare runs: curves overlaid, differences in tables
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from byol_core.system.console import one_line, show


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m byol_core.report", allow_abbrev=False,
                                     description="Write the report of a run again, or compare several runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", metavar="FILE", help="where to write the comparison (default: compare.html)")
    asked = parser.parse_args(arguments)

    from byol_core.report.compare import compare  # only now is torch loaded: --help need not wait
    from byol_core.report.page import write_report

    folders = [Path(run) for run in asked.runs]
    for folder in folders:
        if not (folder / "config.json").exists():
            show(sys.stderr, f"error: {folder} is not a run folder: no config.json in it\n")
            return 2
    try:
        if len(folders) == 1 and asked.out is None:
            write_report(folders[0])
            show(sys.stdout, f"{folders[0] / 'report.html'}\n")
        else:
            out = Path(asked.out or "compare.html")
            compare(folders, out)
            show(sys.stdout, f"{out}\n")
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        show(sys.stderr, f"error: {one_line(error)}\n")
        return 1
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # what no run has written
        show(sys.stderr, f"error: {one_line(' or '.join(asked.runs))} has a damaged file, most likely config.json "
                         f"({one_line(f'{type(error).__name__}: {error}')})\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
