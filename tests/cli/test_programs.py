"""The program icnn-zoo: its commands, and what a person sees of an error."""

import re

import pytest

from icnn_zoo.cli import programs
from icnn_zoo.cli.options import Command


def give(monkeypatch, error):
    def run(options):
        """Fails."""
        raise error

    monkeypatch.setitem(programs.COMMANDS, "plan", Command(run, lambda parser: None))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("`a` must be 1; got 2."), r"^icnn-zoo plan: `a` must be 1; got 2\.$"),
        (FileNotFoundError("there is no file 'a'."), r"^icnn-zoo plan: there is no file 'a'\.$"),
        (FileNotFoundError(2, "No such file or directory", "a"), r"^icnn-zoo plan: No such file or directory: 'a'$"),
        (PermissionError(13, "Permission denied", "a"), r"PermissionError: Permission denied: 'a' \(--traceback shows"),
        (OSError(28, "No space left on device"), r"OSError: No space left on device \(--traceback"),
        (KeyError("width"), r"^icnn-zoo plan: KeyError: width \(--traceback shows where it was raised\)$"),
        (TypeError("int, not str"), r"TypeError: int, not str"),
        (OverflowError("too large"), r"OverflowError: too large"),
    ],
)
def test_an_error_is_one_line_and_names_the_way_to_the_traceback(error, message, monkeypatch):
    give(monkeypatch, error)
    with pytest.raises(SystemExit) as stopped:
        programs.zoo_main(["plan"])
    assert re.search(message, stopped.value.code)
    assert "\n" not in stopped.value.code
    with pytest.raises(type(error)) as raised:
        programs.zoo_main(["plan", "--traceback"])
    assert raised.value is error


def test_a_fault_of_the_package_keeps_its_traceback(monkeypatch):
    give(monkeypatch, AssertionError("never"))
    with pytest.raises(AssertionError):
        programs.zoo_main(["plan"])


def test_an_interrupt_is_one_line_and_the_code_that_shells_know(monkeypatch, capsys):
    give(monkeypatch, KeyboardInterrupt())
    with pytest.raises(SystemExit) as stopped:
        programs.zoo_main(["plan"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "icnn-zoo plan: interrupted\n"


@pytest.mark.parametrize("name", programs.COMMANDS)
def test_every_command_has_help_of_its_own(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        programs.zoo_main([name, "--help"])
    assert stopped.value.code == 0
    assert f"icnn-zoo {name}" in capsys.readouterr().out


def test_words_after_two_dashes_are_passed_on_only_where_a_command_takes_them(monkeypatch, capsys):
    seen = []
    command = Command(seen.append, lambda parser: parser.add_argument("name"), overrides=True)
    monkeypatch.setitem(programs.COMMANDS, "plan", command)
    programs.zoo_main(["plan", "a", "--", "--trainer.devices", "4"])
    assert seen[0].name == "a"
    assert seen[0].overrides == ["--trainer.devices", "4"]
    monkeypatch.setitem(programs.COMMANDS, "plan", command._replace(overrides=False))
    with pytest.raises(SystemExit):
        programs.zoo_main(["plan", "a", "--", "--trainer.devices", "4"])
