"""Random damage to valid input: images, checkpoints and command lines. `python -m tests.fuzz --minutes 5`

Case N of a target is the same on every machine with the same libraries: `python -m tests.fuzz decode --case N` repeats it.
A case fails by an AssertionError; a case that hangs ends the process with the stacks of all threads.
"""

import argparse
import contextlib
import faulthandler
import io
import os
import pickle
import random
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import train
from byol_core import embed
from byol_core.evaluate import __main__ as evaluate_command
from byol_core.images.decoding import MAX_PIXELS, BadImageError, decode
from byol_core.run.options import build_parser
from byol_core.runtime import peak_memory
from byol_core.system.files import KEYS, CheckpointError, read_backbone, read_checkpoint, read_weights, save_checkpoint

HANG = 600  # seconds after which a case is taken to hang
MEMORY = 1500  # MiB by which decoding may raise the peak of the process: an image just under the limit, composed on white
MARKER = "executed"  # the file that hostile pickles try to make


def damage(data: bytes, rng: random.Random, splice: bytes) -> bytes:
    """`data` with a few bytes changed, removed, repeated, cut off, or taken from another file."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not changed:
            break
        kind, at = rng.randrange(8), rng.randrange(len(changed))
        length = min(rng.choice((1, 2, 4, 8, 64, 512)), len(changed) - at)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.choice((0, 1, 0x7f, 0x80, 0xff))
        elif kind == 2:  # a number of 16 or 32 bits, at the edges of its range
            number = rng.choice((0, 1, 0x7fff, 0xffff, 0x7fffffff, 0xffffffff, 100_000_000, rng.getrandbits(32)))
            field = (number & 0xffffffff).to_bytes(4, rng.choice(("little", "big")))
            changed[at:at + len(field)] = field
        elif kind == 3:
            del changed[at:at + length]
        elif kind == 4:
            changed[at:at] = changed[at:at + length] * rng.choice((1, 2, 100))
        elif kind == 5:
            changed[at:at + length] = rng.randbytes(length)
        elif kind == 6:
            start = rng.randrange(max(len(splice), 1))
            changed[at:at + length] = splice[start:start + length]
        elif rng.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def small_images() -> list[bytes]:
    """Valid files of every format and of most modes that may lie behind an image's suffix."""
    ramp = np.arange(24 * 16 * 4, dtype=np.uint32).reshape(16, 24, 4) * 37 % 251
    rgba = Image.fromarray(ramp.astype(np.uint8))
    modes = {mode: rgba.convert("RGB").convert(mode) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LA", "I", "F")}
    modes |= {"RGBA": rgba, "I;16": Image.fromarray((ramp[..., 0] * 257).astype(np.uint16))}
    exif = Image.Exif()
    exif[0x0112], exif[0x010e] = 6, "described"
    compressions = ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4")
    options: dict[str, list[dict[str, object]]] = {
        "PNG": [{}, {"exif": exif}, {"transparency": 3}], "BMP": [{}], "WEBP": [{}, {"lossless": True, "exif": exif}],
        "JPEG": [{}, {"progressive": True, "exif": exif}],
        "TIFF": [{}, {"exif": exif}, *({"compression": name} for name in compressions)]}
    files = []
    for name, choices in options.items():
        for image in modes.values():
            for chosen in choices:
                file = io.BytesIO()
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not every mode goes into every format
                    image.save(file, name, **chosen)  # type: ignore[arg-type]
                    files.append(file.getvalue())
    for name in ("PNG", "WEBP", "TIFF"):
        file = io.BytesIO()
        modes["RGB"].save(file, name, save_all=True, append_images=[modes["RGB"].rotate(90), modes["RGB"]])
        files.append(file.getvalue())
    return files


class Decoding:
    """Whatever is done to an image file, `decode` gives an upright RGB image or refuses it, in silence and within bounds."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "image.png"
        self.files = small_images()

    def case(self, rng: random.Random) -> Iterator[str]:
        data = damage(rng.choice(self.files), rng, rng.choice(self.files))
        self.path.write_bytes(data)
        try:
            image = decode(self.path)
        except BadImageError as error:
            assert str(error)
            yield "refused"
            return
        assert image.mode == "RGB" and 0 < image.width * image.height <= MAX_PIXELS, (image.mode, image.size)
        assert len(image.crop((0, 0, 1, 1)).tobytes()) == 3
        yield "decoded"


class Loading:
    """Whatever is done to a checkpoint, the loader gives plain data or a CheckpointError, and runs nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.marker = folder, folder / "last.pt", folder / MARKER
        state = {**dict.fromkeys(KEYS, {}), "identity": "{}", "model": {"online.backbone.w": torch.arange(20.0)},
                 "progress": {"epoch": 1}, "scores": {"trained": {"knn": 0.5, "linear": None}}}
        save_checkpoint(folder, state)
        self.files = [self.path.read_bytes(), self._saved({"conv.weight": torch.rand(4, 3)}), self._saved([1, 2.0, "x"]),
                      self._saved({"format": 1, "payload": Payload(self.marker)})]
        with zipfile.ZipFile(io.BytesIO(self.files[0])) as archive:
            self.members = {info.filename: archive.read(info) for info in archive.infolist()}
        self.hostile = [pickle.dumps(Payload(self.marker), protocol) for protocol in range(5)]

    def _saved(self, value: object) -> bytes:
        file = io.BytesIO()
        torch.save(value, file)
        return file.getvalue()

    def case(self, rng: random.Random) -> Iterator[str]:
        self.path.write_bytes(self._file(rng))
        for read in (read_checkpoint, read_weights, read_backbone):
            try:
                read(self.path)
                yield "read"
            except CheckpointError as error:
                assert str(error) and "weights_only" not in str(error) and "\n" not in str(error), error
                yield "refused"
        assert not self.marker.exists(), "a pickle was executed"

    def _file(self, rng: random.Random) -> bytes:
        """A damaged file; or a whole zip with right checksums around damaged members, which only the unpickler can refuse."""
        if rng.random() < 0.4:
            return damage(rng.choice(self.files), rng, rng.choice([*self.files, *self.hostile]))
        members = dict(self.members)
        name = rng.choice([member for member in members if member.endswith("data.pkl")] * 4 + list(members))
        source = rng.choice([members[name]] * 4 + self.hostile)
        members[name] = damage(source, rng, rng.choice(self.hostile)) if rng.random() < 0.9 else source
        if rng.random() < 0.1:
            del members[rng.choice(list(members))]
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return file.getvalue()


class Payload:
    """A pickle of it makes a file when it is unpickled by something careless."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (self.marker,)


class Commanding:
    """Whatever is typed after a command, it ends with code 2 and one line, unless it is asked for help."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "imgs").mkdir()
        for number in range(4):
            Image.new("RGB", (9, 9), (number * 60, 0, 0)).save(folder / "imgs" / f"{number}.png")
        (folder / "torn.pt").write_bytes(b"PK\x03\x04")
        parsers = {train.main: build_parser(), evaluate_command.main: evaluate_command.build_parser(),
                   embed.main: embed.build_parser()}
        self.commands = [(main, [flag for action in parser._actions for flag in action.option_strings
                                 if flag not in ("-h", "--help")]) for main, parser in parsers.items()]
        self.values = ["", "0", "-1", "1e400", "nan", "auto", "imgs", "no/such/folder", "torn.pt", "digits/x", "\u2028", "'",
                       "--", "-", "\udcff", "9" * 30, "1.5", "None", "../" * 40, "x" * 5000, "a\nb", "cpu", "resnet18", "2",
                       "=", "sklearn.svm.LinearSVC", "imgs/0.png", "cuda:99", "\x00"]

    def case(self, rng: random.Random) -> Iterator[str]:
        main, flags = rng.choice(self.commands)
        tokens = []
        for _ in range(rng.randrange(1, 7)):
            flag = rng.choice(flags) if rng.random() < 0.9 else "".join(rng.choices("-abcdef=é0 ", k=rng.randrange(1, 9)))
            tokens += [flag] if rng.random() < 0.15 else [flag, rng.choice(self.values)]
        if main is train.main:  # what could be a right command must not train: its images are these four, in a batch of 256
            tokens += ["--data", rng.choice(("imgs", "gone", "")), "--batch-size", "256"]
        tokens = [token for token in tokens if token not in ("-h", "--help", "--debug")]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                code: object = main(tokens)
            except SystemExit as end:
                code = end.code
        said = errors.getvalue().splitlines()
        expected = (1, 2) if "File name too long" in errors.getvalue() else (2,)  # what the system itself refuses is 1
        assert code in expected and len(said) == 1 and said[0].startswith("error: "), (tokens, code, errors.getvalue()[-2000:])
        yield said[0].split()[1]


TARGETS: dict[str, Callable[[Path], "Decoding | Loading | Commanding"]] = {
    "decode": Decoding, "checkpoint": Loading, "command": Commanding}


def fuzz(name: str, folder: Path, first: int = 0, cases: int | None = None, seconds: float = 1e9) -> tuple[int, str]:
    """(cases run, what came of them). Raises: AssertionError naming the case that broke a promise."""
    before = os.getcwd()
    os.chdir(folder)
    number, ends = first, time.monotonic() + seconds
    outcomes: Counter[str] = Counter()  # a case may have several
    try:
        with silence_checked(folder):  # what writing the valid files says does not count
            target = TARGETS[name](folder)
        with silence_checked(folder) as check:
            peak = memory_peak()
            while time.monotonic() < ends and (cases is None or number < first + cases):
                faulthandler.dump_traceback_later(HANG, exit=True, file=sys.__stderr__)
                try:
                    outcomes.update(target.case(random.Random(f"{name} {number}")))
                    check()
                    if name == "decode":
                        assert memory_peak() - peak < MEMORY, f"{memory_peak() - peak:.0f} MiB"
                except Exception as error:
                    raise AssertionError(f"case {number} of {name}: {type(error).__name__}: {error}") from error
                number += 1
    finally:
        faulthandler.cancel_dump_traceback_later()
        os.chdir(before)
    return number - first, ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common(8))


@contextlib.contextmanager
def silence_checked(folder: Path) -> Iterator[Callable[[], None]]:
    """File descriptor 2 goes to a file, and what is yielded asserts that nothing was written there and nobody warned."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(folder / "stderr", "w+b") as file, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")

        def check() -> None:
            assert os.fstat(file.fileno()).st_size == 0, (folder / "stderr").read_bytes()[-500:]
            assert not warned, warned[0].message

        os.dup2(file.fileno(), 2)
        try:
            yield check
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def memory_peak() -> float:
    """Of this process so far, in MiB; 0 where the system does not tell."""
    return peak_memory(torch.device("cpu")) / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET", help=" ".join(TARGETS))
    parser.add_argument("--minutes", type=float, default=1.0, help="for each target (default: 1)")
    parser.add_argument("--case", type=int, default=0, help="the first case (default: 0)")
    options = parser.parse_args()
    for name in options.targets:
        with tempfile.TemporaryDirectory() as folder:
            done, outcomes = fuzz(name, Path(folder), options.case, seconds=60 * options.minutes)
        print(f"{name}: {done} cases from {options.case} on: {outcomes}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
