from __future__ import annotations

import importlib.util
import stat
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _script() -> ModuleType:
    path = Path(__file__).parents[1] / "docs" / "run_blocks.py"
    spec = importlib.util.spec_from_file_location("run_blocks", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["run_blocks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run_blocks = _script()


def _fenced(kind: str, body: str) -> str:
    return f"```{kind}\n{body}\n```\n"


def _run(*parts: str) -> dict[str, int]:
    return dict(run_blocks.run_text("\n".join(parts), "TEXT.md"))


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grl-surgery that repeats its arguments, one a line, and fails when told to."""
    file = tmp_path / "grl-surgery"
    file.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n[ "$1" = fail ] && exit 2\nexit 0\n')
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))


def test_blocks_of_one_text_share_a_namespace_and_their_output_is_compared() -> None:
    done = _run(_fenced("python", "x = 2"), "Prose.", _fenced("python", "print(x + 1)"), _fenced("text", "3"))
    assert done == {"python blocks": 2, "outputs compared": 1}


def test_two_texts_do_not_share_a_namespace() -> None:
    _run(_fenced("python", "only_here = 1"))
    with pytest.raises(run_blocks.BlockError, match="NameError"):
        _run(_fenced("python", "only_here"))


def test_output_that_differs_is_an_error_that_names_the_line_and_shows_both() -> None:
    text = ["# Title", "", _fenced("python", "print('a')\nprint('b')"), _fenced("text", "a\nB")]
    with pytest.raises(
        run_blocks.BlockError, match=r"TEXT\.md:9: this is not what is printed(.|\n)*-B\n\+b"
    ) as raised:
        _run(*text)
    assert "\n".join(text).splitlines()[9 - 1] == "a", raised.value


@pytest.mark.parametrize("shown", ["a", "a\nb\nc", "a\n\nb", "a\n b", "b\na", ""])
def test_output_must_be_equal_line_by_line(shown: str) -> None:
    with pytest.raises(run_blocks.BlockError, match="not what is printed"):
        _run(_fenced("python", "print('a')\nprint('b')"), _fenced("text", shown))


def test_a_gap_is_not_allowed_below_python() -> None:
    with pytest.raises(run_blocks.BlockError, match="not what is printed"):
        _run(_fenced("python", "print('a')\nprint('b')"), _fenced("text", "..."))


def test_spaces_at_the_end_of_a_line_are_not_compared() -> None:
    assert _run(_fenced("python", "print('a  ')"), _fenced("text", "a"))["outputs compared"] == 1


def test_a_text_block_after_prose_is_no_output() -> None:
    assert "outputs compared" not in _run(_fenced("python", "print('a')"), "Prose.", _fenced("text", "b"))


def test_an_exception_is_an_error_with_the_line_in_the_text() -> None:
    with pytest.raises(run_blocks.BlockError, match=r"TEXT\.md:4: .*ZeroDivisionError(.|\n)*line 5"):
        _run("# Title", "", _fenced("python", "x = 1\nx / 0"))


def test_a_block_that_is_no_python_is_an_error() -> None:
    with pytest.raises(run_blocks.BlockError, match=r"TEXT\.md:2: this block raises SyntaxError"):
        _run(_fenced("python", "def"))


def test_a_failing_assert_and_an_exit_are_errors() -> None:
    with pytest.raises(run_blocks.BlockError, match="raises AssertionError"):
        _run(_fenced("python", "assert 1 == 2"))
    with pytest.raises(run_blocks.BlockError, match="raises SystemExit"):
        _run(_fenced("python", "raise SystemExit(0)"))


def test_a_block_that_is_not_closed_is_an_error() -> None:
    with pytest.raises(run_blocks.BlockError, match=r"TEXT\.md:3: this block is never closed"):
        _run("Prose.", "", "```python\nx = 1")


def test_a_block_marked_no_run_is_counted_and_not_run() -> None:
    assert _run(_fenced("python no-run", "1 / 0")) == {"blocks left out": 1}


def test_blocks_inside_a_list_and_fences_inside_a_block_are_understood() -> None:
    nested = "````python\nprint('''```text\nx\n```''')\n````\n"
    listed = "- item\n\n  ```python\n  if True:\n      print('here')\n  ```\n\n  ```text\n  here\n  ```\n"
    assert _run(nested, listed) == {"python blocks": 2, "outputs compared": 1}


def test_classes_of_a_block_can_be_pickled() -> None:
    _run(_fenced("python", "import pickle\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A"))


def test_blocks_run_in_a_temporary_folder_and_the_present_one_is_restored() -> None:
    before = Path.cwd()
    _run(_fenced("python", "open('left.txt', 'w').close()"))
    with pytest.raises(run_blocks.BlockError):
        _run(_fenced("python", "1 / 0"))
    assert Path.cwd() == before
    assert not Path("left.txt").exists()
    assert "blocks_of_one_text" not in sys.modules


@pytest.mark.usefixtures("command")
def test_commands_run_and_their_output_is_compared() -> None:
    console = "$ grl-surgery graph 'a b'\ngraph\na b\n$ make demo\nanything\n$ grl-surgery strip"
    assert _run(_fenced("console", console)) == {
        "commands": 2,
        "outputs compared": 1,
        "commands left out": 1,
    }


@pytest.mark.usefixtures("command")
def test_a_command_goes_on_after_a_backslash() -> None:
    assert _run(_fenced("console", "$ grl-surgery graph \\\n  model\ngraph\nmodel"))["commands"] == 1


@pytest.mark.usefixtures("command")
def test_commands_and_python_share_the_folder() -> None:
    check = "from pathlib import Path\nassert Path('out.txt').read_text() == 'x\\n'"
    assert _run(_fenced("console", "$ grl-surgery x > out.txt"), _fenced("python", check))["commands"] == 1


@pytest.mark.usefixtures("command")
@pytest.mark.parametrize(
    "shown", ["...\nc", "a\n...", "a\n...\nc", "...", "a\nb\n...\nc", "a\n...\nb\n...\nc\n..."]
)
def test_a_gap_stands_for_any_lines(shown: str) -> None:
    assert _run(_fenced("console", f"$ grl-surgery a b c\n{shown}"))["outputs compared"] == 1


@pytest.mark.usefixtures("command")
@pytest.mark.parametrize("shown", ["...\nb", "b\n...", "a\n...\nd\n...\nc", "a\nc", ".\nb\nc", "a\nb\nc\nd"])
def test_output_of_a_command_that_differs_is_an_error(shown: str) -> None:
    with pytest.raises(run_blocks.BlockError, match=r"TEXT\.md:3: this is not what is printed"):
        _run(_fenced("console", f"$ grl-surgery a b c\n{shown}"))


@pytest.mark.usefixtures("command")
def test_a_command_that_fails_is_an_error_unless_the_text_shows_what_it_prints() -> None:
    with pytest.raises(run_blocks.BlockError, match=r"TEXT\.md:2: this command exits with 2"):
        _run(_fenced("console", "$ grl-surgery fail"))
    assert _run(_fenced("console", "$ grl-surgery fail\nfail"))["outputs compared"] == 1


def test_main_reports_every_file_and_fails_if_one_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text(_fenced("python", "x = 1"))
    bad.write_text(_fenced("python", "1 / 0"))
    assert run_blocks.main([str(good)]) == 0
    assert run_blocks.main([str(bad), str(good), str(tmp_path / "none.md")]) == 1
    printed = capsys.readouterr()
    assert printed.out == f"{good}: 1 python blocks\n" * 2
    assert f"FAILED {bad}:2: this block raises ZeroDivisionError" in printed.err
    assert "none.md" in printed.err


def test_main_without_files_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_blocks.main([]) == 1
    assert "usage" in capsys.readouterr().err


def test_a_page_without_blocks_has_nothing_to_run() -> None:
    assert not _run("# Words only\n")
