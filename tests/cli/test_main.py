"""The frame of the command line: help without jax, errors in one line, exit codes."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from popax.cli import main as cli
from popax.errors import ConfigError, DataError


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def command(monkeypatch):
    """A command named `probe` whose run the test decides."""
    module = types.ModuleType("popax.cli.probe")
    module.NAME, module.HELP, module.EXAMPLE = "probe", "Probe the frame.", "popax probe --level 3"
    module.configure = lambda parser: parser.add_argument("--level", type=int, default=0)
    monkeypatch.setitem(sys.modules, "popax.cli.probe", module)
    monkeypatch.setitem(cli.COMMANDS, "probe", "popax.cli.probe")

    def set_run(function):
        module.run = function
        return module

    return set_run


def raising(error):
    def run(args):
        raise error

    return run


def test_exit_code_is_the_commands(command):
    command(lambda args: args.level)
    assert cli.main(["probe", "--level", "3"]) == 3
    assert cli.main(["probe"]) == 0


@pytest.mark.parametrize("error", [ConfigError("rank=0:\n  at least 1"), DataError("rank=0: at least 1")])
def test_an_error_is_one_line_and_exit_2(command, capsys, error):
    command(raising(error))
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == "error: rank=0: at least 1\n"


def test_a_file_that_is_not_there_is_one_line_too(command, capsys):
    command(lambda args: len(Path("/nonexistent/file").read_bytes()))
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err.startswith("error: [Errno 2] No such file or directory")


def test_debug_shows_the_traceback(command):
    command(raising(ConfigError("no")))
    with pytest.raises(ConfigError):
        cli.main(["probe", "--debug"])


def test_a_bug_is_not_dressed_as_an_error(command):
    command(raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


def test_interrupt_says_what_was_saved(command, capsys):
    command(raising(KeyboardInterrupt("step 120 is saved in runs/a")))
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "\ninterrupted: step 120 is saved in runs/a\n"
    command(raising(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130
    assert "nothing is half-written" in capsys.readouterr().err


def test_unknown_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_a_group_passes_on_to_its_commands(command, capsys):
    child = command(lambda args: args.level)
    group = types.ModuleType("popax.cli.group")
    group.NAME, group.HELP, group.EXAMPLE = "group", "A group.", "popax group probe"
    group.COMMANDS = {"probe": "popax.cli.probe"}
    sys.modules["popax.cli.group"] = group
    cli.COMMANDS["group"] = "popax.cli.group"
    try:
        assert child.NAME == "probe"
        assert cli.main(["group", "probe", "--level", "4"]) == 4
    finally:
        del sys.modules["popax.cli.group"], cli.COMMANDS["group"]


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_helps_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"example:\n  popax {name}" in shown


def test_help_lists_every_command_and_imports_no_jax():
    code = (
        "import sys; from popax.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'jax', 'numpy', 'flax', 'tensorstore', 'grain', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    shown = run_python(code)
    for name in cli.COMMANDS:
        assert f"  {name} " in shown
