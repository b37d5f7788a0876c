"""One network of the ecosystem, tried in a process of its own, as a row whatever happens.

python -m grl_surgery.zoo.ecosystem transformers/BertModel     # one network, printed
python -m grl_surgery.zoo.ecosystem --build-only monai diffusers     # each network of two libraries runs once
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import logging
import os
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from grl_surgery.errors import SurgeryError, one_line
from grl_surgery.loading.libraries import LIBRARIES
from grl_surgery.zoo.ledger import replace_text

if TYPE_CHECKING:
    from grl_surgery.loading.model_zoo import LoadedModel

__all__ = [
    "NetworkRow",
    "code_state",
    "is_old",
    "line_of",
    "no_row",
    "read_network_rows",
    "result_of",
    "try_network",
    "write_network_rows",
]


LARGEST = 40_000_000
"""Parameters of the largest network that is tried: copies and gradients take a few GiB."""
WALL = 10
"""How much longer than its processor time a trial may take by the clock, on a machine that others use."""


@dataclass(frozen=True)
class NetworkRow:
    """What came of one network of the ecosystem.

    Args:
        name: As ``load_model`` takes it.
        library: That it is of.
        built: Whether it was built and ran here.
        reason: Why it was not built.
        scope: ``graph``, where the spliced network is a graph of the root; ``own class``, where it keeps it.
        places: What was cut, by role.
        outcomes: Of each trial ``ok``, or ``skipped: ``, ``refused: `` with the sentence, ``broken: `` with
            the error, ``wrong: `` where the oracle says otherwise, ``disagrees: `` where the proof does.
        notes: What a reader has to know besides.
        parameters: How many it has.
        splice_ms: Median processor time of one ``insert_grl``, in milliseconds.
        seconds: Processor time of everything.
        versions: Of torch and of the library.
        code: Which state of this library was tried, as :func:`code_state` gives it.
        date: On which it was measured.
    """

    name: str
    library: str
    built: bool
    reason: str = ""
    scope: str = ""
    places: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    parameters: int = 0
    splice_ms: float = 0.0
    seconds: float = 0.0
    versions: str = ""
    code: str = ""
    date: str = ""


def result_of(row: NetworkRow) -> str:
    """``ok``, ``not built``, or the worst kind that an outcome has.

    Example:
        >>> result_of(NetworkRow("a/B", "a", True, outcomes={"early": "ok", "late": "refused: no"}))
        'refused'
    """
    if not row.built:
        return "not built"
    kinds = {text.partition(":")[0] for text in row.outcomes.values()}
    return next((kind for kind in ("wrong", "disagrees", "broken", "refused") if kind in kinds), "ok")


def is_old(row: NetworkRow) -> bool:
    """Whether it was measured with another torch, another version of its library, or other code of ours."""
    return (row.versions, row.code) != (_versions(row.library), code_state())


@functools.cache
def code_state() -> str:
    """Ten digits that change with the source of this library, as far as surgery and its proof run it."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        if file.relative_to(package).parts[0] not in ("cli", "viz", "zoo", "integrations", "training"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:10]


def try_network(source: str, seconds: float = 120.0, build_only: bool = False) -> NetworkRow:
    """Build one network and try everything, in a fork: what it does to its library ends with it.

    Args:
        source: As ``load_model`` takes it.
        seconds: Of processor time, after which it is ended; in any case after ten times as many by the clock.
        build_only: Build it and run it once in each mode; nothing is cut.
    """
    _import_library(source)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
            signal.alarm(int(WALL * seconds) + 1)
            row = _row_whatever_happens(source, build_only)
            with os.fdopen(writer, "w") as file:
                file.write(json.dumps({key: value for key, value in asdict(row).items() if key != "date"}))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if text:
        return NetworkRow(**json.loads(text), date=time.strftime("%Y-%m-%d"))
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if ended in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL):
        return no_row(source, f"it took longer than {seconds:g} s", seconds)
    return no_row(source, f"the process ended with signal {ended}", 0.0)


def no_row(source: str, reason: str, seconds: float) -> NetworkRow:
    """The row of a network of which nothing is known but why."""
    library = source.partition("/")[0]
    return NetworkRow(
        source,
        library,
        False,
        reason[:300],
        seconds=round(seconds, 2),
        versions=_versions(library),
        code=code_state(),
        date=time.strftime("%Y-%m-%d"),
    )


def _import_library(source: str) -> None:
    """Import what every network of the library needs, once, before the forks."""
    library = source.partition("/")[0]
    own = LIBRARIES[library].imports if library in LIBRARIES else (library,)
    for name in (*_NEEDED, *own):
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            importlib.import_module(name)


# What a trial imports, and what torch imports the first time that it works without data.
_NEEDED = (
    "grl_surgery.zoo.trials",
    "grl_surgery.surgery.attach_head",
    "grl_surgery.verify.verify_flip",
    "grl_surgery.verify.sample_rows",
    "grl_surgery.doctor.foreign_reversals",
    "torch._dynamo",
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
)


def _row_whatever_happens(source: str, build_only: bool) -> NetworkRow:
    start = time.process_time()
    try:
        return _built_row(source) if build_only else _row(source)
    except BaseException as error:  # a library may end the process as well
        return no_row(source, one_line(error), time.process_time() - start)


def _built_row(source: str) -> NetworkRow:
    """A network that was built and has run in both modes, as every network does whose inputs are found."""
    start = time.process_time()
    with _undisturbed():
        loaded = _loaded(source, start)
    if isinstance(loaded, NetworkRow):
        return loaded
    return replace(_row_of(source, loaded), seconds=round(time.process_time() - start, 2))


def _row(source: str) -> NetworkRow:
    from grl_surgery.zoo.trials import try_everything

    start = time.process_time()
    with _undisturbed():
        loaded = _loaded(source, start)
        if isinstance(loaded, NetworkRow):
            return loaded
        row = _row_of(source, loaded)  # before the trials: they may change it
        try:
            trials = try_everything(loaded.module, loaded.example_inputs)
        except MemoryError:
            return no_row(source, "it needs more than 6 GiB of memory", time.process_time() - start)
        except Exception as error:
            reason = f"the hooks of the oracle do not run on it: {one_line(error)}"
            return no_row(source, reason, time.process_time() - start)
    return replace(
        row,
        scope=trials.scope,
        places=trials.places,
        outcomes=trials.outcomes,
        notes=trials.notes,
        splice_ms=round(median(trials.splice_ms), 1) if trials.splice_ms else 0.0,
        seconds=round(time.process_time() - start, 2),
    )


def _loaded(source: str, start: float) -> LoadedModel | NetworkRow:
    """The network with its inputs, or the row that says why there is none."""
    from grl_surgery.loading.model_zoo import load_model

    try:
        loaded = load_model(source)
    except Exception as error:
        return no_row(source, one_line(error), time.process_time() - start)
    if loaded.example_inputs is None:
        return no_row(source, "no inputs that were tried run", time.process_time() - start)
    count = sum(p.numel() for p in loaded.module.parameters())
    if count > LARGEST:
        reason = f"it has {count:,} parameters, more than the {LARGEST:,} up to which a network is tried"
        return no_row(source, reason, time.process_time() - start)
    return loaded


def _row_of(source: str, loaded: LoadedModel) -> NetworkRow:
    library = source.partition("/")[0]
    count = sum(p.numel() for p in loaded.module.parameters())
    return NetworkRow(source, library, True, parameters=count, versions=_versions(library), code=code_state())


def _versions(library: str) -> str:
    distribution = LIBRARIES[library].distribution if library in LIBRARIES else library
    return f"torch {metadata.version('torch').partition('+')[0]}, {library} {metadata.version(distribution)}"


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """One thread, 6 GiB, and nothing of what libraries say."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    resource.setrlimit(resource.RLIMIT_DATA, (6 * 2**30, resource.RLIM_INFINITY))
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    logging.disable(logging.WARNING)
    with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


# ------------------------------------------------------------------------------------------------ the ledger


def read_network_rows(path: str | os.PathLike[str]) -> dict[str, NetworkRow]:
    """The rows of a ledger by name; none where there is no file. A last line that was cut short is left out.

    Raises:
        SurgeryError: A line is no row.
    """
    file = Path(path)
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    known = {item.name for item in fields(NetworkRow)}
    rows = {}
    for number, line in enumerate(lines, 1):
        try:
            row = NetworkRow(**{key: value for key, value in json.loads(line).items() if key in known})
        except (ValueError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            raise SurgeryError(f"line {number} of {file} is no row of a ledger: {line[:60]!r}") from error
        rows[row.name] = row
    return rows


def write_network_rows(path: str | os.PathLike[str], rows: Iterable[NetworkRow]) -> None:
    """Write a ledger anew, sorted by name; outcomes that are ``ok`` are counted, the others kept."""
    replace_text(path, "".join(map(line_of, sorted(rows, key=lambda row: row.name))))


def line_of(row: NetworkRow) -> str:
    """A row as a line of JSON, without what is empty."""
    return (
        json.dumps(
            {
                key: value
                for key, value in asdict(row).items()
                if value not in ("", {}, [], 0, None) or value is False
            }
        )
        + "\n"
    )


def _main(names: list[str]) -> None:
    build_only = "--build-only" in names
    counts: Counter[tuple[str, bool]] = Counter()
    for name in (each for given in names if given != "--build-only" for each in _networks(given)):
        row = try_network(name, build_only=build_only)
        counts[row.library, row.built] += 1
        print(name, result_of(row), row.reason, row.scope, f"{row.seconds} s, {row.splice_ms} ms", row.notes)
        for role, text in row.outcomes.items():
            print(f"    {role:24} {row.places.get(role, '')} | {text}")
        if row.outcomes:
            print("   ", dict(Counter(text.partition(":")[0] for text in row.outcomes.values())))
    for library in dict.fromkeys(library for library, _ in counts):
        print(f"{library}: {counts[library, True]} built, {counts[library, False]} not built")


def _networks(given: str) -> list[str]:
    """A network by its own name, or those of a library by the name of that."""
    from grl_surgery.zoo.sources import networks_of

    return networks_of(given) if given in LIBRARIES else [given]


if __name__ == "__main__":
    _main(sys.argv[1:])
