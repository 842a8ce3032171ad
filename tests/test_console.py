"The command: help that costs nothing, a meaning for every option, no name twice."
import inspect
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import underdog
from underdog.console import commands, main, planning, remote

MODULES = sorted(f.stem for f in Path(commands.__file__).parent.glob('*.py') if f.stem != '__init__')
COMMANDS = (*commands.LOCAL, *planning.AHEAD, *remote.ON_KAGGLE)


@pytest.mark.parametrize('module', ['underdog', 'underdog.console.main'])
def test_python_dash_m_is_the_command(module):
    done = subprocess.run([sys.executable, '-m', module, '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and 'underdog run train --list' in done.stdout, done.stderr


def test_help_costs_nothing():
    "Asking for help must wait for nothing that takes long to load; it fits 80 columns and has no ANSI in it."
    code = ('import sys; sys.argv = ["underdog", "--help"]\n'
            'from underdog.console.main import main\n'
            'try: main()\n'
            'finally: print(*HEAVY & set(sys.modules), file=sys.stderr)')
    heavy = {'torch', 'pandas', 'matplotlib', 'transformers', 'kaggle', 'numpy', 'rich', 'papermill', 'nbformat'}
    env = dict(os.environ, FORCE_COLOR='1')
    done = subprocess.run([sys.executable, '-c', f'HEAVY = {heavy}\n{code}'], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr.strip() == '', done.stderr
    for command in COMMANDS: assert f"\n  {command.__name__.replace('_', '-')} " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80 and '\x1b' not in done.stdout


@pytest.mark.parametrize('command', COMMANDS, ids=lambda c: c.__name__)
def test_every_parameter_of_a_command_has_a_meaning(command):
    assert command.__doc__
    for name, parameter in inspect.signature(command).parameters.items():
        assert parameter.annotation.__metadata__[0].help, name


def test_the_entry_point_is_there():
    settings = (Path(underdog.__file__).parents[2]/'settings.ini').read_text()
    line, = [x for x in settings.splitlines() if x.startswith('console_scripts')]
    module, function = line.split('=')[-1].strip().split(':')
    assert getattr(import_module(module), function) is main.main


def test_no_public_name_stands_in_two_modules():
    names = [name for module in MODULES for name in import_module(f'underdog.console.{module}').__all__]
    assert len(names) == len(set(names))
