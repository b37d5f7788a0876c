"""Programs in processes that have imported one library, and used nothing.

Importing torch takes two seconds, and other libraries take more: a process of its own for each program would
be dear. So a parent imports some libraries, uses nothing of them, and forks for each program. The program
finds what the first lines of a user find who has these imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

ROOT_FIRST = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])

SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # and no pool of workers
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Result:
    """What a program printed, and how it ended."""

    code: int
    stdout: str
    stderr: str


class Parent:
    """A process that has run some import statements, and forks for each program.

    Args:
        first: The import statements.
        settings: Environment variables beside those that keep a program on one thread.
    """

    def __init__(self, first: str, **settings: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, first],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **SETTINGS, "PYTHONPATH": ROOT_FIRST, **settings},
        )

    def run(self, program: str, folder: Path, **settings: str) -> Result:
        """Runs the imports and a program in a child, in a folder."""
        request = json.dumps({"program": program, "folder": str(folder), "settings": settings})
        with contextlib.suppress(BrokenPipeError):  # then there is no answer
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the imports failed with exit code {self._process.wait()}; stderr says why"
        return Result(**json.loads(answer))

    def lines(self, program: str, folder: Path, **settings: str) -> list[str]:
        """What a program prints that must not fail."""
        result = self.run(program, folder, **settings)
        assert result.code == 0, result.stderr[-3000:]
        return result.stdout.splitlines()

    def close(self) -> None:
        """Ends the parent."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Parent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _serve(first: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the imports print is no answer
    exec(first, {})
    tasks = Path("/proc/self/task")
    if tasks.exists() and len(list(tasks.iterdir())) > 1:
        raise RuntimeError(f"{first!r} started threads, which a forked child does not have")
    for line in sys.stdin:
        print(json.dumps(_in_a_child(first, **json.loads(line))), file=answers, flush=True)
    os._exit(0)  # the end of a process with many libraries takes seconds


def _in_a_child(first: str, program: str, folder: str, settings: dict[str, str]) -> dict[str, Any]:
    outputs = [Path(folder) / f".{name}" for name in ("stdout", "stderr")]
    child = os.fork()
    if child == 0:
        _be_the_child(f"{first}\n{program}", folder, settings, outputs)
    _, status = os.waitpid(child, 0)
    stdout, stderr = (path.read_text(encoding="utf-8", errors="replace") for path in outputs)
    return {"code": os.waitstatus_to_exitcode(status), "stdout": stdout, "stderr": stderr}


def _be_the_child(program: str, folder: str, settings: dict[str, str], outputs: list[Path]) -> None:
    code = 1
    try:
        for number, path in enumerate(outputs, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        os.environ.update(settings)
        file = Path(folder) / "program.py"  # where inspect and a spawned process look for it
        file.write_text(program, encoding="utf-8")
        main = sys.modules["__main__"] = ModuleType("__main__")
        main.__file__ = str(file)
        exec(compile(program, str(file), "exec"), main.__dict__)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
