"What README shows can be typed: its commands, options and kernel parameters are known. Its Python runs as a notebook."
import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from underdog.console.main import app
from underdog.kernels import find_kernel, kernel_parameters

README = (Path(__file__).parents[1]/'README.md').read_text()
SHELL = re.findall(r'```sh\n(.*?)```', README, re.S)
COMMANDS = [shlex.split(part) for block in SHELL for line in block.splitlines()
            for part in line.split('#')[0].split(';') if part.strip()]


def test_there_are_commands():
    assert len(COMMANDS) > 20 and {words[0] for words in COMMANDS} <= {'underdog', 'make', 'pip'}


@pytest.mark.parametrize('words', [w for w in COMMANDS if w[0] == 'underdog'], ids=' '.join)
def test_a_command_can_be_typed(words):
    group = typer.main.get_command(app)
    with click.Context(group) as ctx: name, command, rest = group.resolve_command(ctx, words[1:])
    if name == 'try': rest = [*rest, '--prompt', 'why?', '--a', 'so', '--b', 'no']   # else it asks for them
    context = command.make_context(name, rest)   # an unknown option is refused here
    # parameters of a kernel
    kernel = dict(submit='infer').get(name, context.params.get('kernel'))
    given = {pair.split('=')[0] for pair in context.params.get('param') or context.params.get('params') or []}
    if kernel and given: assert given <= set(kernel_parameters(find_kernel(kernel)))


def test_make_knows_its_targets():
    targets = re.findall(r'^(\w[\w-]*):', (Path(__file__).parents[1]/'Makefile').read_text(), re.M)
    for words in COMMANDS:
        if words[0] == 'make': assert words[1] in targets


def test_pictures_are_there():
    for path in re.findall(r'!\[[^]]*\]\(([^)]+)\)', README): assert (Path(__file__).parents[1]/path).is_file(), path


def test_the_part_before_the_reference_is_short():
    words = re.sub(r'```.*?```|\|.*\|', '', README.split('# Reference')[0], flags=re.S).split()
    assert len(words) < 700, len(words)
