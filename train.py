"""Train BYOL on a folder of images, without labels.

    python train.py --data ./imgs --epochs 100              a folder of your own
    python train.py                                         the embedded sample, scikit-learn's digits
    python train.py --data ./imgs --epochs 100 --resume     go on after an interruption, exactly
    python train.py --data ./imgs --check                   look at the data, time a few steps, train nothing
"""

import contextlib
import io
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from byol_core.config import TrainConfig, parse_config

if TYPE_CHECKING:
    from byol_core.processes import Processes
    from byol_core.run import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 finished, 1 failed while running, 2 wrong input, 130 and 143 stopped by a signal after saving."""
    config = parse_config(arguments)
    processes: "Processes | None" = None
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name that the terminal cannot show stops nothing
    with contextlib.ExitStack() as stack:
        try:
            from byol_core.processes import join  # only now is torch loaded: --help and a mistyped flag need not wait

            processes = join(config.device)
            run = prepare(config, processes, stack)
        except ValueError as error:
            complain(config, processes, error)
            return 2
        except (OSError, RuntimeError, ArithmeticError) as error:
            complain(config, processes, error)
            return 1
        except KeyboardInterrupt:
            return 130
        return carry_out(run)


def prepare(config: TrainConfig, processes: "Processes", stack: contextlib.ExitStack) -> "Run":
    """Everything that can be wrong is found here, before any training."""
    from byol_core.data import look_at
    from byol_core.folder import scan
    from byol_core.plan import make_plan
    from byol_core.processes import restarted
    from byol_core.run import Run
    from byol_core.run_folder import RUNS, choose_out, goes_on_in_its_folder, open_run_folder
    from byol_core.sample import with_sample

    if restarted() and config.resume is None:  # torchrun --max-restarts runs the same command again
        config = replace(config, resume="")
    folder = choose_out(config)
    processes.on_first(lambda: stack.enter_context(open_run_folder(folder, goes_on_in_its_folder(config))))
    processes.on_first(lambda: with_sample(config))  # which writes the sample for the others
    config = with_sample(config)
    files = scan(config.data, leave_out=(folder, RUNS))
    plan = make_plan(config, look_at(files), processes.world_size)
    run = Run(config, plan, files, folder, processes)
    if config.resume is not None:
        run.resume()
    run.stop.listen()
    return run


def carry_out(run: "Run") -> int:
    from byol_core.signals import Stopped

    try:
        if run.is_complete():
            if run.processes.first:
                sys.stdout.write(f"already complete ({run.progress.epoch}/{run.plan.epochs} epochs)\n")  # nothing is touched
        elif run.config.check:
            run.describe()
            run.write_start()
            run.check()
        else:
            run.describe()
            run.write_start()
            run.measure_untrained()
            run.train()
            run.finish()
            run.summarise()
        run.processes.leave()
        return 0
    except Stopped as stopped:
        run.stop.ignore()
        run.write_end("stopped", str(stopped))
        run.log.say(f"{stopped}: stopped at epoch {run.progress.epoch}, update {run.progress.updates}; "
                    "the same command with --resume goes on")
        return stopped.code
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        run.log.note(traceback.format_exc())
        run.stop.ignore()
        run.write_end("failed", complain(run.config, run.processes, error))
        return 1


def complain(config: TrainConfig, processes: "Processes | None", error: Exception) -> str:
    """Say in one line, and in one process, why the run fails; that reason."""
    if config.debug:
        traceback.print_exc()
    reason, ours = (str(error), True) if processes is None else processes.fail(error)
    if ours:
        sys.stderr.write(f"error: {reason}\n")
    return reason


if __name__ == "__main__":
    sys.exit(main())
