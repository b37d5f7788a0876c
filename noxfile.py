"""The tests under several versions of Python and torch: ``nox``, or ``nox -s "tests-3.12(torch='2.15.0')"``.

pyproject.toml declares as supported what passed here; docs/robustness.md says when that was.
"""

import nox

nox.options.default_venv_backend = "venv"

# torch with the torchvision that was built for it; the oldest that is declared, and the newest.
TORCH = {"2.9.1": "0.24.1", "2.14.1": "0.29.2", "2.15.0": "0.29.2"}
TIMM = ["1.0.31"]


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
@nox.parametrize("timm", TIMM)
@nox.parametrize("torch", list(TORCH))
def tests(session: nox.Session, torch: str, timm: str) -> None:
    """The whole suite with one version of each."""
    if torch == "2.15.0" and session.python == "3.10":
        session.skip("torch 2.15 needs Python 3.11")
    pins = [f"torch=={torch}", f"torchvision=={TORCH[torch]}", f"timm=={timm}"]
    session.install("-e", ".[dev]", *pins)
    session.run("python", "-m", "pytest", "-q", "-n", "2", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(python="3.13")
def nightly(session: nox.Session) -> None:
    """The suite with PyTorch's nightly build."""
    session.install("-e", ".[dev]")
    nightly_builds = "https://download.pytorch.org/whl/nightly/cpu"
    session.install("--upgrade", "--pre", "torch", "torchvision", "--index-url", nightly_builds)
    warnings = ("-W", "default::DeprecationWarning", "-W", "default::FutureWarning")
    session.run("python", "-m", "pytest", "-q", "-n", "2", *warnings, env={"OMP_NUM_THREADS": "1"})


@nox.session(python="3.11")
def locked(session: nox.Session) -> None:
    """The suite in the environment of requirements-tests.txt, version by version."""
    session.install("-r", "requirements-tests.txt")
    session.install("--no-deps", "-e", ".")
    session.run("python", "-m", "pytest", "-q", "-n", "2", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(python="3.10", venv_backend="uv")
def lowest(session: nox.Session) -> None:
    """The suite with the oldest of everything that pyproject.toml names.

    Without the zoo's tests, which are about the networks that the newest timm lists; and though old libraries
    use what is deprecated by now.
    """
    session.install("--resolution", "lowest-direct", "-e", ".[dev]")
    deprecated = ("-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning")
    ours = ("--ignore", "tests/zoo/test_zoo.py", *deprecated, *session.posargs)
    session.run("python", "-m", "pytest", "-q", "-n", "2", *ours, env={"OMP_NUM_THREADS": "1"})
