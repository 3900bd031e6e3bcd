"""The command that trains: what it does with options, errors and signals, and in which order."""

import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from byol_core.run.options import TrainConfig, parse_config
from byol_core.system.console import SELF_EXPLAINING, in_plain_words, is_out_of_memory, one_line, show
from byol_core.system.signals import Stopped, StopRequest

if TYPE_CHECKING:
    from byol_core.images.image_set import ImageSet
    from byol_core.run.run import Run
    from byol_core.system.distributed import Processes


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 finished, 1 failed while running, 2 wrong input, 130 and 143 stopped by a signal after saving."""
    config = parse_config(arguments)
    request = StopRequest()
    request.listen()
    open_missing_streams()
    processes: "Processes | None" = None
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name that the terminal cannot show stops nothing
    with contextlib.ExitStack() as stack:
        try:
            from byol_core.system.distributed import join  # only now is torch loaded: --help and a mistyped flag need not wait

            processes = join(config.device)
            run = prepare(config, processes, stack)
            if request.signal is not None:  # and what it interrupted has swallowed the exception
                raise Stopped(request.signal)
        except (Exception, Stopped) as error:  # nothing was begun
            request.ignore()  # such as the one that torchrun sends when another process fails
            if isinstance(error, Exception) and request.signal is None:
                code = 2 if isinstance(error, ValueError) else 1
                complain(config, processes, error, "" if code == 2 else in_plain_words(error, config.device))
            else:  # a library whose loading a signal broke off may fail in any way
                stopped = error if isinstance(error, Stopped) else Stopped(request.signal or signal.SIGTERM)
                code = stopped.code
                if processes is not None:
                    processes.fail(stopped)
        else:
            code = carry_out(run)
    return code if processes is None else processes.end(code)


def prepare(config: TrainConfig, processes: "Processes", stack: contextlib.ExitStack) -> "Run":
    """Everything that can be wrong is found here, before any training."""
    from byol_core.backbones import check_torchvision

    check_torchvision()
    from byol_core.images.image_set import scan
    from byol_core.run.folder import RUNS, choose_out, goes_on_in_its_folder, launch_of, open_run_folder
    from byol_core.run.options import with_sample
    from byol_core.run.plan import make_plan
    from byol_core.run.resume import begun_as, go_on
    from byol_core.run.run import Run, fit_into
    from byol_core.system.distributed import launch
    from byol_core.views.pixels import look_at

    folder = choose_out(config)
    if config.resume is None and processes.from_first(lambda: launch_of(folder) == launch() != ""):
        config = replace(config, resume="")  # torchrun --max-restarts runs the same command again
    processes.on_first(lambda: stack.enter_context(open_run_folder(folder, goes_on_in_its_folder(config), launch())))
    processes.on_first(lambda: with_sample(config))  # which writes the sample for the others
    asked, config = config, with_sample(config)

    def look() -> "ImageSet":
        return scan(config.data, leave_out=(folder, RUNS), keep_in=folder)

    files = processes.on_first(look) or look()  # the others find the index of shards that it has kept
    facts, world_size = look_at(files), processes.world_size
    begun = processes.from_first(lambda: begun_as(config, folder)) if config.resume is not None else None
    loaded = None
    if begun is not None:
        plan = go_on(begun, config, facts, world_size)
    elif config.minutes is None:
        plan = make_plan(config, facts, world_size)
    else:
        plain = replace(config, eval=False, tensorboard=False, warmup_epochs=None)
        seen, network, loaded = fit_into(config.minutes, partial(make_plan, plain, facts, world_size),
                                         lambda plan, loaded: Run(plain, plan, files, folder, processes, loaded))
        plan = make_plan(config, facts, world_size, seen, network)
    run = Run(config, plan, files, folder, processes, loaded, asked)
    if config.resume is not None:
        run.resume()
    run.stop.listen()
    return run


def open_missing_streams() -> None:
    """Started without stdin, stdout or stderr, files of the run would get their numbers, and what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))


def carry_out(run: "Run") -> int:
    try:
        work(run)
        return 0
    except Stopped as stopped:
        run.stop.ignore()
        reason, _, is_stop = run.processes.fail(stopped)  # or those that lose this one would take it for dead
        with contextlib.suppress(OSError):  # on a full disk
            if is_stop:
                end_as_stopped(run, str(stopped))
            else:  # it is the signal by which torchrun answers the failure of another process
                run.write_end("failed", reason)
        return stopped.code
    except Exception as error:  # a mistake of the program's own is told in a line too; train.log has the rest
        run.stop.ignore()
        run.log.note(traceback.format_exc())
        plan, runtime = run.setup.plan, run.setup.runtime
        line = in_plain_words(error, str(runtime.device), plan.batch_size, plan.accum_steps, runtime.amp_dtype is not None)
        if is_out_of_memory(error) or not isinstance(error, SELF_EXPLAINING):
            line += f"; {run.what_is_saved()}"
        reason, is_stop = complain(run.setup.config, run.processes, error, line)
        with contextlib.suppress(Exception):  # on a full disk, or of what made it fail
            if is_stop:  # another process was asked, outside of a step, and so this one has lost it
                end_as_stopped(run, reason)
            else:
                run.write_end("failed", reason, error)
        return 1
    finally:
        run.stop.ignore()  # all is written
        run.data.views.close()  # workers left over would be waited for at the exit, and never end


def work(run: "Run") -> None:
    if run.results.is_complete():
        if run.processes.first:  # nothing is touched
            show(sys.stdout, f"already complete ({run.progress.epoch}/{run.setup.plan.epochs} epochs)\n")
    elif run.setup.config.check:
        run.describe()
        run.check()
    else:
        run.describe()
        run.write_start()
        run.measure_untrained()
        run.train()
        run.finish()
    run.processes.leave()


def end_as_stopped(run: "Run", why: str) -> None:
    run.log.say(f"{why}: the check was broken off" if run.setup.config.check else
                f"{why}: stopped at epoch {run.progress.epoch}, update {run.progress.updates}; {run.what_is_saved()}; "
                "the same command with --resume goes on")
    run.write_end("stopped", why)


def complain(config: TrainConfig, processes: "Processes | None", error: Exception, line: str = "") -> tuple[str, bool]:
    """Say in one line, and in one process, why the run fails: (that reason, whether it is a stop). line: that, if given."""
    if config.debug:
        traceback.print_exc()
    line = one_line(line or str(error))
    reason, ours, is_stop = (line, True, False) if processes is None else processes.fail(error, line)
    if ours:
        show(sys.stderr, f"error: {reason}\n")
    return reason, is_stop
