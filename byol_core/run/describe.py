"""What a run is about to do, and why so: on the console, and in config.json."""

import platform
from collections.abc import Callable
from dataclasses import asdict, replace

import sklearn
import torch
import torchvision

from byol_core.images.image_set import ImageSet
from byol_core.run.folder import space_warning
from byol_core.run.options import command_line
from byol_core.run.setup import Setup
from byol_core.run.state import TrainingState
from byol_core.system.files import write_json
from byol_core.version import __version__


def describe(setup: Setup, files: ImageSet, state: TrainingState, views_reason: str, say: Callable[[str], None]) -> None:
    """The images, the network, every choice with its reason, the machine, the folder, and warnings about them."""
    config, plan = setup.config, setup.plan
    for remark in files.remarks:
        say(f"warning: {remark}")
    if files.headers.several_frames:
        say(f"note: {files.headers.several_frames} of the files looked at have several frames; of each file the first one is "
            "used")
    kinds = f"{len(files.classes)} classes, used only to measure" if files.labels is not None else "no class folders"
    say(f"data: {len(files)} images in {files.given} ({kinds})")
    weights = sum(p.numel() for p in state.model.online.parameters())
    say(f"network: {weights / 1e6:.1f} M parameters; {plan.updates_per_epoch} updates of {plan.batch_size} images per "
        f"epoch, {plan.total_updates} in all")
    if config.minutes is not None:
        say(f"length: {plan.epochs} epochs of {plan.updates_per_epoch} updates take about "
            f"{config.minutes:g} minutes of training here")
    for choice in plan.choices:
        say(f"  {choice.name} {choice} ({choice.reason})")
    _describe_machine(setup, views_reason, say)
    say(f"run folder: {setup.folder}")
    if setup.processes.first:  # whose folder it is
        warning = space_warning(setup.folder, state.checkpoint_bytes())
        if warning is not None:
            say(warning)


def _describe_machine(setup: Setup, views_reason: str, say: Callable[[str], None]) -> None:
    config, runtime, processes = setup.config, setup.runtime, setup.processes
    say(f"device: {runtime.device} ({setup.device_reason}); precision: {setup.precision} ({setup.precision_reason})"
        f"{', TF32 where float32 remains' if setup.tf32 else ''}{', compiled' if config.compile else ''}"
        f"{', CUDA graph' if runtime.cuda_graph else ''}"
        f"{', channels_last' if runtime.channels_last else ''}; views: {views_reason}")
    if config.cuda_graph and not runtime.cuda_graph:
        say("note: --cuda-graph is left out, as it is for one process on a CUDA device")
    if processes.several:
        alike = "all of them" if runtime.device.type == "cuda" else "each alone, as on this device it must be"
        say(f"processes: {processes.world_size}, each with {setup.plan.micro_batch} images at a time; batch statistics "
            f"over {alike}")


def write_config(setup: Setup, files: ImageSet) -> None:
    """config.json: the options, what was resolved from them, and with which versions."""
    asked, plan = setup.asked, setup.plan
    write_json(setup.folder / "config.json", {
        "config": asdict(setup.config),
        "commands": {name: command_line(options, setup.processes.world_size)
                     for name, options in (("this", asked), ("elsewhere", replace(asked, out=None)))},
        "choices": [{**asdict(choice), "shown": str(choice)} for choice in plan.choices],
        "plan": {key: value for key, value in asdict(plan).items() if key != "choices"},
        "data": {"images": len(files), "classes": list(files.classes), "image_names": files.fingerprint},
        "versions": {"byol_core": __version__, "torch": str(torch.__version__), "torchvision": torchvision.__version__,
                     "scikit-learn": sklearn.__version__, "python": platform.python_version(),
                     "system": platform.platform()}})
