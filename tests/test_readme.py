"""What README and the guides show can be typed: commands, options and kernel parameters are known, messages are ours.

README's Python runs as a notebook, that of the guides here."""
import ast
import re
import shlex
from pathlib import Path

import click
import pandas as pd
import pytest
import typer

import underdog
from underdog.console.main import app
from underdog.data.sample import write_sample
from underdog.kernels import find_kernel, kernel_parameters
from underdog.search.sweep import read_sweep
from underdog.training.settings import TrainConfig

from fixtures import make_base, make_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT/'README.md').read_text()
GUIDES = {file.stem: file.read_text() for file in sorted((ROOT/'nbs'/'guides').glob('*.md'))}


def blocks(text, language): return re.findall(rf'```{language}\n(.*?)```', text, re.S)


def commands(text):
    "The commands in the shell blocks of a page, as lists of words."
    lines = [line for block in blocks(text, 'sh') for line in block.splitlines()]
    return [shlex.split(part) for line in lines for part in line.split('#')[0].split(';') if part.strip()]


COMMANDS = [words for text in (README, *GUIDES.values()) for words in commands(text)]


def test_there_are_commands():
    assert len(commands(README)) > 20 and len(GUIDES) > 5
    assert {words[0] for words in COMMANDS} <= {'underdog', 'make', 'pip', 'kaggle'}


@pytest.mark.parametrize('words', [w for w in COMMANDS if w[0] == 'underdog'], ids=' '.join)
def test_a_command_can_be_typed(words):
    group = typer.main.get_command(app)
    with click.Context(group) as ctx: name, command, rest = group.resolve_command(ctx, words[1:])
    if name == 'try': rest = [*rest, '--prompt', 'why?', '--a', 'so', '--b', 'no']   # else it asks for them
    context = command.make_context(name, rest)   # an unknown option is refused here
    # parameters of a kernel
    kernel = dict(submit='infer', probe='probe').get(name, context.params.get('kernel'))
    given = {pair.split('=')[0] for pair in context.params.get('param') or context.params.get('params') or []}
    if kernel and given: assert given <= set(kernel_parameters(find_kernel(kernel)))


def test_make_knows_its_targets():
    targets = re.findall(r'^(\w[\w-]*):', (ROOT/'Makefile').read_text(), re.M)
    for words in COMMANDS:
        if words[0] == 'make': assert words[1] in targets


def test_pictures_are_there():
    for path in re.findall(r'!\[[^]]*\]\(([^)]+)\)', README): assert (ROOT/path).is_file(), path


def test_the_ratios_of_a_guide_are_those_of_readme():
    "Measured once, said twice: the README says when and by which command."
    ratios = re.findall(r'^\| (?:training|inference), against .* \| ([\d.]+) \|$', GUIDES['two_t4s'], re.M)
    assert len(ratios) == 4
    for ratio in ratios: assert f'{ratio} × ' in README, ratio


def test_the_table_of_rooms_names_every_module():
    library = Path(underdog.__file__).parent
    rooms = re.findall(r'^\| (the ground|`\w+`) \| [^|]* \| ([^|]*) \|$', README, re.M)
    assert len(rooms) == 1 + len([f for f in library.iterdir() if (f/'__init__.py').is_file()])
    for room, modules in rooms:
        folder = library if room == 'the ground' else library/room.strip('`')
        there = {f.stem for f in folder.glob('*.py') if not f.stem.startswith('_')}
        assert sorted(re.findall(r'`(\w+)`', modules)) == sorted(there), room


def prose(text): return re.sub(r'```.*?```|^\|.*\|$', '', text, flags=re.S | re.M).split()


def test_the_part_before_the_reference_is_short(): assert len(prose(README.split('# Reference')[0])) < 700


@pytest.mark.parametrize('guide', GUIDES)
def test_a_guide_is_short(guide): assert len(prose(GUIDES[guide])) < 600


# ---- the guides
@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder with the files that the guides name."
    folder = tmp_path_factory.mktemp('guides')
    write_sample(folder, 60, 10)
    make_tokenizer(folder/'tiny')
    make_base(folder/'models/small')
    verdicts = ['first', 'second', 'equal']*4
    questions = [f'What is {i} + {i}?' for i in range(12)]
    mine = dict(question=questions, first='four', second='I do not know.', verdict=verdicts)
    pd.DataFrame(mine).to_csv(folder/'mine.csv', index=False)
    won = {name: [int(v == verdict) for v in verdicts]
           for name, verdict in dict(first_won='first', second_won='second', equal='equal').items()}
    cup = dict(id=range(12), prompt=questions, response_a='four', response_b='I do not know.') | won
    pd.DataFrame(cup).to_csv(folder/'cup.csv', index=False)
    return folder


@pytest.mark.parametrize('guide', [name for name, text in GUIDES.items() if '```python' in text])
def test_the_python_of_a_guide_runs(guide, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    for block in blocks(GUIDES[guide], 'python'): exec(compile(block, guide, 'exec'), names)
    if guide == 'own_competition':
        # what was converted is read as it was meant
        rows, report = underdog.read_rows('train.csv')
        assert (report.competition, rows[['a', 'b', 'tie']].sum().tolist()) == ('llm-classification', [4, 4, 4])
        rows, report = underdog.read_rows('decided.csv')
        assert (report.competition, rows[['a', 'b']].sum().tolist()) == ('wsdm', [4, 4])
        assert names['read'][['a', 'b', 'tie']].sum().tolist() == [4, 4, 4]


@pytest.mark.parametrize('text', [block for guide in GUIDES.values() for block in blocks(guide, 'yaml')])
def test_a_sweep_of_a_guide_can_be_run(text, tmp_path):
    "Names, types and ranges are the kernel's; each of its trials is one that `run` would begin."
    (tmp_path/'sweep.yaml').write_text(text)
    sweep = read_sweep(tmp_path/'sweep.yaml')
    for name, values in sweep.space.items():
        for value in values if isinstance(values, list) else (values['low'], values['high']):
            settings = {k: v for k, v in sweep.fixed.items() if k not in ('train_csv', 'model')} | {name: value}
            TrainConfig.of({n: p.default for n, p in kernel_parameters(find_kernel('train')).items()} | settings)


def templates():
    "Every text of the library; where a value is put in stands a NUL."
    for file in Path(underdog.__file__).parent.rglob('*.py'):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield ''.join(part.value if isinstance(part, ast.Constant) else '\0' for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str): yield node.value


def test_messages_are_those_of_the_library():
    "Each message of the page on troubleshooting, and what the page on reports quotes, can be said by the library."
    known = [*templates()]
    messages = re.findall(r'^\| `([^`]+)` \|', GUIDES['troubleshooting'], re.M)
    messages += ['beats', 'cannot be told from', 'is worse than', ' still fell', ' has risen', ' has been flat']
    assert len(messages) > 40
    for message in messages:
        pattern = re.compile('.*?'.join(map(re.escape, message.split('…'))), re.S)
        assert any(pattern.search(text) for text in known), message
