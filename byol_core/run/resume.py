"""A whole run as one checkpoint, and a run gone on with from there."""

import contextlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from byol_core.run.config import TrainConfig, check_option
from byol_core.run.parts import IN_WORDS, Parts
from byol_core.run.plan import Plan, make_plan, with_min_scale
from byol_core.run.results import Outcome
from byol_core.system.files import LAST, CheckpointError, State, check_tensors, newest_checkpoint, read_checkpoint
from byol_core.training import Progress
from byol_core.version import __version__
from byol_core.views.pixels import BAD_LIMIT, Facts
from byol_core.views.recipes import ViewRecipe

# Options that are chosen where nothing is asked for.
RECIPE = ("arch", "image_size", "view_size", "small_stem", "hidden_dim", "projection_dim", "batch_size", "optimizer", "lr",
          "predictor_lr", "weight_decay", "warmup_epochs", "scheduler", "scheduler_interval", "tau_base", "tau_schedule")
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)  # what damage raises
NOT_LISTED = {"resume", "debug", "amp", "device", "compile"}  # options; of the last ones it is told what came of them


def snapshot(parts: Parts, outcome: Outcome) -> State:
    """All that a run needs to go on exactly."""
    return {
        "identity": json.dumps(parts.identity()), "version": __version__, "torch": str(torch.__version__),
        "progress": parts.progress.state_dict(), "model": parts.model.state_dict(),
        "optimizer": parts.optimizer.state_dict(), "scheduler": parts.scheduler.state_dict(),
        "scaler": parts.runtime.scaler.state_dict(), "precision": parts.precision, "log": parts.log.state_dict(),
        "device": parts.runtime.device.type, "compiled": parts.config.compile,
        "world_size": parts.processes.world_size, "bad_files": parts.data.bad.reasons, **outcome.state_dict(),
    }


def find_snapshot(parts: Parts) -> tuple[State | None, bool]:
    """(what --resume asks for, or None in a folder where there is nothing yet; whether the run's own last.pt is damaged).

    Raises: CheckpointError for a file that cannot be used.
    """
    asked = Path(parts.config.resume or parts.folder)
    if not asked.is_dir():
        return read_checkpoint(asked), False
    state, damaged = newest_checkpoint(asked)
    for line in damaged:
        parts.log.say(f"warning: {line}; using the checkpoint before it")
    if state is None and parts.config.resume:
        raise CheckpointError(f"no checkpoint in {asked}")
    if state is None:
        parts.log.say(f"nothing to resume in {asked}: starting afresh")
    return state, bool(damaged) and asked.resolve() == parts.folder.resolve()


def begun_as(config: TrainConfig, folder: Path) -> dict[str, object] | None:
    """The identity of the run that --resume asks for, in the words of its checkpoint; None where there is none to be read."""
    asked = Path(config.resume or folder)
    try:
        state = newest_checkpoint(asked)[0] if asked.is_dir() else read_checkpoint(asked)
        return None if state is None else _identity(state)
    except (CheckpointError, *MALFORMED):  # which `restore` will meet again, and tell
        return None


def _identity(state: State) -> dict[str, Any]:
    """Raises: one of MALFORMED for a state that is of no run."""
    identity = json.loads(str(state["identity"]))
    return {"view_size": identity["image_size"], **identity}  # of the same size, before there was a choice


def go_on(begun: dict[str, Any], config: TrainConfig, facts: Facts, world_size: int) -> Plan:
    """The plan for these options where they ask for something, and else that of the run that is gone on with.

    So a run keeps the recipe that it began with, whatever today's would be. Of a run that is not like this one it is the plan
    for these options alone, and `restore` says what differs. Raises: ValueError as `make_plan` does.
    """
    seen = None
    try:
        if config.minutes is not None:
            seen = max(1, begun["epochs"] * begun["updates_per_epoch"] * begun["batch_size"])
        if config.recipe in ("auto", "digits"):  # else it is asked for
            return _go_on(begun, config, facts, world_size, seen)
    except MALFORMED:
        pass
    return make_plan(config, facts, world_size, seen)


def _go_on(begun: dict[str, Any], config: TrainConfig, facts: Facts, world_size: int, seen: int | None) -> Plan:
    chosen = {name: begun[name] for name in RECIPE if getattr(config, name) is None and name in begun}
    if "lr" in chosen:
        check_option("lr", begun["lr"])
        chosen["lr"] = begun["lr"] * 256 / begun["batch_size"]
    for name, value in chosen.items():
        check_option(name, value)
    plan = make_plan(replace(config, **chosen), facts, world_size, seen)
    fields: list[dict[str, Any]] = [{key: tuple(value) if isinstance(value, list) else value for key, value in view.items()}
                                    for view in begun["views"]]
    views = ViewRecipe(**fields[0]), ViewRecipe(**fields[1])
    if {view.size for view in views} != {plan.view_size}:
        raise ValueError("its views are not of its view size")
    if config.min_scale is not None:
        views = with_min_scale(views, config.min_scale)
    kept = {"lr": begun["lr"]} if "lr" in chosen else {}  # not by way of the batch, which may round
    choices = [replace(choice, reason="as this run began") if choice.name in chosen else choice for choice in plan.choices]
    return replace(plan, **kept, views=views, choices=tuple(choices))


def restore(parts: Parts, outcome: Outcome, state: State) -> None:
    """Make of a run that has just been built the one that `state` was taken of.

    Raises: CheckpointError for a state that is of no such run, ValueError when it is of a different one; nothing has
    been changed then.
    """
    try:
        _check_identity(parts, state)
        _check_state(parts, state)
        _restore(parts, outcome, state)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError, json.JSONDecodeError, CheckpointError) as error:
        raise CheckpointError(f"the checkpoint to resume from is not one that this version makes ({type(error).__name__}: "
                              f"{error}) - take another, or start a new run in another --out") from error


def _check_identity(parts: Parts, state: State) -> None:
    saved, own = _identity(state), parts.identity()
    changed = [IN_WORDS.get(key, f"{key} {saved.get(key)} -> {own[key]}") for key in own if saved.get(key) != own[key]]
    if changed:
        raise ValueError(f"cannot resume exactly: {'; '.join(changed)} - repeat the options of the run, or start a new one in "
                         f"another --out, from these weights with --arch {parts.plan.arch} --init-from {parts.folder / LAST}")


def _check_state(parts: Parts, state: State) -> None:
    own, model, optimizer = parts.model.state_dict(), state["model"], state["optimizer"]
    if not isinstance(model, dict) or model.keys() != own.keys() or not all(isinstance(v, Tensor) for v in model.values()):
        raise CheckpointError("its networks are not like these")
    check_tensors(model, own)  # type: ignore[arg-type]
    parameters = [p for group in parts.optimizer.param_groups for p in group["params"]]
    check_tensors(optimizer["state"], dict(enumerate(parameters)))  # type: ignore[index]
    if not all(isinstance(text, str) and text.isidentifier() for text in (state["precision"], state.get("device", "cpu"))) \
            or not isinstance(state.get("compiled", False), bool):
        raise CheckpointError("what it was computed with is not told")
    progress, bad = Progress(**state["progress"]), state.get("bad_files", {})  # type: ignore[arg-type]
    if not (0 <= progress.epoch <= parts.plan.epochs and 0 <= progress.batch <= len(parts.batches)
            and progress.updates >= 0):
        raise CheckpointError("it stands where no run like this one can be")
    if not isinstance(bad, dict) or len(bad) > BAD_LIMIT * len(parts.data) or not all(
            isinstance(index, int) and isinstance(reason, str) for index, reason in bad.items()):
        raise CheckpointError("its list of bad files is none")


def _restore(parts: Parts, outcome: Outcome, state: State) -> None:
    say = parts.log.say
    parts.model.load_state_dict(state["model"])  # type: ignore[arg-type]
    parts.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
    parts.scheduler.load_state_dict(state["scheduler"])  # type: ignore[arg-type]
    if parts.runtime.scaler.is_enabled() and state["scaler"]:
        parts.runtime.scaler.load_state_dict(state["scaler"])  # type: ignore[arg-type]
    arithmetic = {"precision": parts.precision, "device": parts.runtime.device.type, "compiled": parts.config.compile}
    for name, here in arithmetic.items():
        if state.get(name, here) != here:
            say(f"note: {name} {state[name]} -> {here}, so this is not an exact resume")
    before, now = state.get("world_size", 1), parts.processes.world_size
    if before != now:
        say(f"note: {before} -> {now} processes: every update uses the same images and views as before, but sums and batch "
            "statistics are taken over other parts, so this is not an exact resume")
    parts.progress = Progress(**state["progress"])  # type: ignore[arg-type]
    parts.data.bad.reasons.update(state.get("bad_files", {}))  # type: ignore[call-overload]
    asked = Path(parts.config.resume or parts.folder)
    source = asked if asked.is_dir() else asked.parent
    _take_along(source, parts, state)
    outcome.load_state_dict(state)
    if not outcome.is_complete():
        parts.log.resume(state["log"], parts.progress, source)  # type: ignore[arg-type]
        say(f"resuming at epoch {parts.progress.epoch}, update {parts.progress.updates}{_other_changes(parts)}")


def _take_along(source: Path, parts: Parts, state: State) -> None:
    """What was made on the way, where a run goes on in another folder; the best network only if it is that of `state`."""
    if not parts.processes.first or source.resolve() == parts.folder.resolve():
        return
    names = ["views.png"]
    with contextlib.suppress(OSError, ValueError):
        about = json.loads((source / "best.json").read_text("utf-8"))
        best = cast(dict[str, float], state.get("best") or {})
        if best and all(about.get(key) == value for key, value in best.items()):
            names += ["best.pt", "best.json"]
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, parts.folder / name)


def _other_changes(parts: Parts) -> str:
    """Which options differ from those that the run was last started with and do not change its result."""
    try:
        before = json.loads((parts.folder / "config.json").read_text("utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    now = json.loads(json.dumps(asdict(parts.config)))
    changed = [f"{key} {before[key]} -> {now[key]}" for key in now
               if key in before and key not in NOT_LISTED and before[key] != now[key]]
    return f"; changed, without effect on the result: {', '.join(changed)}" if changed else ""
