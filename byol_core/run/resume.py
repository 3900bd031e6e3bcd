"""Save and restore a whole run."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from byol_core.report.facts import parse_object, read_text
from byol_core.run.log import RunLog
from byol_core.run.options import TrainConfig, check_option
from byol_core.run.plan import Choice, Plan, make_plan, with_min_scale
from byol_core.run.results import Results
from byol_core.run.setup import Setup
from byol_core.run.state import TrainingState
from byol_core.system.files import LAST, CheckpointError, State, newest_checkpoint, read_checkpoint
from byol_core.version import __version__
from byol_core.views.pixels import BAD_LIMIT, Facts, ImageData
from byol_core.views.recipes import ViewRecipe

IN_WORDS = {"views": "the view recipe", "image names": "the names of the image files"}  # of keys of `identity`
# Options that are chosen where nothing is asked for.
RECIPE = ("arch", "image_size", "view_size", "small_stem", "hidden_dim", "projection_dim", "batch_size", "optimizer", "lr",
          "predictor_lr", "weight_decay", "warmup_epochs", "scheduler", "scheduler_interval", "tau_base", "tau_schedule")
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)  # what damage raises
NOT_LISTED = {"resume", "debug", "amp", "device", "compile"}  # options; of the last ones it is told what came of them


def identity(setup: Setup, images: ImageData) -> dict[str, object]:
    """What must be equal for a resumed run to be the same run."""
    plan = asdict(setup.plan)
    del plan["choices"], plan["micro_batch"]  # the latter follows from the number of processes
    return json.loads(json.dumps({
        "images": len(images), "image names": images.files.fingerprint, **plan, "seed": setup.config.seed,
        **({} if setup.config.minutes is None else {"minutes": setup.config.minutes}),
        "views made": ("on the device" if images.pixels is not None else
                       "on the cpu" if setup.config.views == "cpu" else "of worker crops")}))


def compare_processes(setup: Setup, images: ImageData) -> None:
    """Raises: ValueError when the processes of the run were not given the same images and options."""
    config = setup.config
    schedule = {"--resume": config.resume is not None, "--check": config.check, "--save-every": config.save_every,
                "--eval-every": config.eval_every}  # what decides when processes meet
    identities = setup.processes.gather({**identity(setup, images), "precision": setup.precision, **schedule})
    for rank, other in enumerate(identities):
        for key, value in identities[0].items():
            if other[key] != value:
                raise ValueError(f"{IN_WORDS.get(key, key)} differ: {value} in rank 0, {other[key]} in rank {rank} - "
                                 "all processes of a run need the same images and options")


def find_saved(setup: Setup, say: Callable[[str], None]) -> tuple[State | None, bool]:
    """(what --resume asks for, or None in a folder where there is nothing yet; whether the run's own last.pt is damaged).

    Raises: CheckpointError for a file that cannot be used.
    """
    asked = Path(setup.config.resume or setup.folder)
    if not asked.is_dir():
        return read_checkpoint(asked), False
    state, damaged = newest_checkpoint(asked)
    for line in damaged:
        say(f"warning: {line}; using the checkpoint before it")
    if state is None and setup.config.resume:
        raise CheckpointError(f"no checkpoint in {asked}")
    if state is None:
        say(f"nothing to resume in {asked}: starting afresh")
    return state, bool(damaged) and asked.resolve() == setup.folder.resolve()


def begun_as(config: TrainConfig, folder: Path) -> dict[str, object] | None:
    """The identity of the run that --resume asks for, in the words of its checkpoint; None where there is none to be read."""
    asked = Path(config.resume or folder)
    try:
        state = newest_checkpoint(asked)[0] if asked.is_dir() else read_checkpoint(asked)
        return None if state is None else _identity(state)
    except (CheckpointError, *MALFORMED):  # which `Saveable` will meet again, and tell
        return None


def _identity(state: State) -> dict[str, Any]:
    """Raises: one of MALFORMED for a state that is of no run."""
    identity = json.loads(str(state["identity"]))
    return {"view_size": identity["image_size"], **identity}  # of the same size, before there was a choice


def go_on(begun: dict[str, Any], config: TrainConfig, facts: Facts, world_size: int) -> Plan:
    """The plan for these options where they ask for something, and else that of the run that is gone on with.

    So a run keeps the recipe that it began with, whatever today's would be. Of a run that is not like this one it is the plan
    for these options alone, and `Saveable` says what differs. Raises: ValueError as `make_plan` does.
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
    for name, value in chosen.items():
        check_option(name, value)
    plan = make_plan(replace(config, **{**chosen, "lr": config.lr}), facts, world_size, seen)
    fields: list[dict[str, Any]] = [{key: tuple(value) if isinstance(value, list) else value for key, value in view.items()}
                                    for view in begun["views"]]
    views = ViewRecipe(**fields[0]), ViewRecipe(**fields[1])
    if {view.size for view in views} != {plan.view_size}:
        raise ValueError("its views are not of its view size")
    if config.min_scale is not None:
        views = with_min_scale(views, config.min_scale)
    scaled = {"lr": f"{chosen['lr']:.6g} after scaling by the batch"} if "lr" in chosen else {}
    choices = [Choice(choice.name, chosen[choice.name], "as this run began", shown=scaled.get(choice.name, ""))
               if choice.name in chosen else choice for choice in plan.choices]
    return replace(plan, lr=chosen.get("lr", plan.lr), views=views, choices=tuple(choices))


@dataclass(frozen=True)
class Saveable:
    """All that a run needs to go on exactly: what it was set up with, to compare, and what changes as it trains."""

    setup: Setup
    state: TrainingState
    images: ImageData
    results: Results
    log: RunLog

    def state_dict(self) -> State:
        setup = self.setup
        return {
            "identity": json.dumps(identity(setup, self.images)), "version": __version__, "torch": str(torch.__version__),
            **self.state.state_dict(), "precision": setup.precision, "log": self.log.state_dict(),
            "device": setup.runtime.device.type, "compiled": setup.config.compile,
            "world_size": setup.processes.world_size, "bad_files": self.images.bad.reasons, **self.results.state_dict()}

    def load_state_dict(self, saved: State) -> None:
        """Make of a run that has just been built the one that `saved` was taken of.

        Raises: CheckpointError for a state that is of no such run, ValueError when it is of a different one; nothing has
        been changed then.
        """
        try:
            self._check_identity(saved)
            self._check(saved)
            self._restore(saved)
        except (KeyError, TypeError, AttributeError, IndexError, RecursionError, json.JSONDecodeError,
                CheckpointError) as error:
            raise CheckpointError("the checkpoint to resume from is not one that this version makes "
                                  f"({type(error).__name__}: {error}) - take another, or start a new run in another "
                                  "--out") from error

    def _check_identity(self, saved: State) -> None:
        before, own, setup = _identity(saved), identity(self.setup, self.images), self.setup
        changed = [IN_WORDS.get(key, f"{key} {before.get(key)} -> {own[key]}") for key in own if before.get(key) != own[key]]
        if changed:
            raise ValueError(
                f"cannot resume exactly: {'; '.join(changed)} - repeat the options of the run, or start a new one in another "
                f"--out, from these weights with --arch {setup.plan.arch} --init-from {setup.folder / LAST}")

    def _check(self, saved: State) -> None:
        plan = self.setup.plan
        self.state.check(saved, plan.epochs, plan.updates_per_epoch * plan.accum_steps)
        if not all(isinstance(text, str) and text.isidentifier() for text in (saved["precision"],
                                                                              saved.get("device", "cpu"))) \
                or not isinstance(saved.get("compiled", False), bool):
            raise CheckpointError("what it was computed with is not told")
        bad = saved.get("bad_files", {})
        if not isinstance(bad, dict) or len(bad) > BAD_LIMIT * len(self.images) or not all(
                isinstance(index, int) and isinstance(reason, str) for index, reason in bad.items()):
            raise CheckpointError("its list of bad files is malformed")

    def _restore(self, saved: State) -> None:
        setup, say = self.setup, self.log.say
        self.state.load_state_dict(saved)
        arithmetic = {"precision": setup.precision, "device": setup.runtime.device.type, "compiled": setup.config.compile}
        for name, here in arithmetic.items():
            if saved.get(name, here) != here:
                say(f"note: {name} {saved[name]} -> {here}, so this is not an exact resume")
        before, now = saved.get("world_size", 1), setup.processes.world_size
        if before != now:
            say(f"note: {before} -> {now} processes: every update uses the same images and views as before, but sums and "
                "batch statistics are taken over other parts, so this is not an exact resume")
        self.images.bad.restore(saved.get("bad_files", {}))  # type: ignore[arg-type]
        asked = Path(setup.config.resume or setup.folder)
        source = asked if asked.is_dir() else asked.parent
        _take_along(source, setup, saved)
        self.results.load_state_dict(saved)
        if not self.results.is_complete():
            progress = self.state.progress
            self.log.resume(saved["log"], progress, source)  # type: ignore[arg-type]
            say(f"resuming at epoch {progress.epoch}, update {progress.updates}{_other_changes(setup)}")


def _take_along(source: Path, setup: Setup, saved: State) -> None:
    """What was made on the way, where a run goes on in another folder; the best network only if it is that of `saved`."""
    if not setup.processes.first or source.resolve() == setup.folder.resolve():
        return
    names = ["views.png"]
    about, best = parse_object(read_text(source / "best.json")), cast(dict[str, float], saved.get("best") or {})
    if best and all(about.get(key) == value for key, value in best.items()):
        names += ["best.pt", "best.json"]
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, setup.folder / name)


def _other_changes(setup: Setup) -> str:
    """Which options differ from those that the run was last started with and do not change its result."""
    before = parse_object(read_text(setup.folder / "config.json")).get("config")
    now = json.loads(json.dumps(asdict(setup.config)))
    changed = [f"{key} {before[key]} -> {now[key]}" for key in now
               if isinstance(before, dict) and key in before and key not in NOT_LISTED and before[key] != now[key]]
    return f"; changed, without effect on the result: {', '.join(changed)}" if changed else ""
