"What README calls a light install is enough for the commands that only talk to Kaggle; others say what they want."
import random
import re
import shlex
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from bad_inputs import csv_text
from kaggle_server import write_notebook
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from underdog.data.competition import LLM_FINETUNING

README = (Path(__file__).parents[1]/'README.md').read_text()
# a process in which only some modules can be imported, and which runs commands one after the other
CODE = '''
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ABSENT: raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Absent())
from underdog.console.main import main
for command in COMMANDS:
    try: main(command)
    except SystemExit as e:
        if e.code: sys.exit(f'{command[0]}: exit code {e.code}')
print('imported:', *sorted(HEAVY & set(sys.modules)))
'''
HEAVY = {'torch', 'transformers', 'peft', 'accelerate', 'bitsandbytes', 'datasets', 'sklearn', 'safetensors'}


def installed_with(names):
    "The distributions that pip installs for `names`, by what those want that are here."
    found, waiting = set(), list(names)
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate(dict(extra=''))): continue
        found.add(name)
        try: waiting += requires(name) or []
        except ModuleNotFoundError: pass   # not for this machine
    return found


@pytest.fixture(scope='module')
def absent():
    "Modules that a light install has not."
    line, = [line for line in README.splitlines() if line.startswith('pip install --no-deps -e . && ')]
    words = shlex.split(line.split('#')[0])
    there = installed_with(words[words.index('&&') + 3:]) | {'underdog'}
    owners = {module: {canonicalize_name(name) for name in names} for module, names in packages_distributions().items()}
    absent = {module for module, names in owners.items() if not names & there}
    assert HEAVY <= absent
    return absent


def light(absent, commands, env):
    source = f'ABSENT = {absent}\nHEAVY = {HEAVY}\nCOMMANDS = {[list(map(str, c)) for c in commands]}\n{CODE}'
    return subprocess.run([sys.executable, '-c', source], env=env, capture_output=True, text=True)


def test_commands_that_only_talk_to_kaggle_need_no_torch(server, tmp_path, absent):
    for part in ('public', 'hidden'):
        (tmp_path/part).mkdir()
        (tmp_path/part/'test.csv').write_text('id\n1\n')
    server.add_competition(LLM_FINETUNING.slug, tmp_path/'public', tmp_path/'hidden', lambda path: 1.)
    columns = ','.join(LLM_FINETUNING.submission_columns)
    cells = ['import json, os\nos.mkdir("run")',
             'json.dump(dict(state="finished", step=1, of=1), open("run/status.json", "w"))',
             f'open("submission.csv", "w").write("{columns}\\n1,.2,.3,.5\\n")']
    parameters = "out = 'run'\nresume_from = ''\ntime_limit = -1.0"
    kernel = write_notebook(tmp_path/'k.ipynb', *cells, parameters=parameters)
    on_cpu = '--shape', '', '--no-wheels', '--poll', '.05'
    commands = [
        ['check-account'],
        ['bundle', '--no-wheels', '--poll', '.05'],
        ['bundle', '--no-wheels', '--dry-run'],
        ['push', kernel, '--slug', 'small-kernel', *on_cpu, '--dry-run', '--folder', tmp_path/'to-push'],
        ['push', kernel, '--slug', 'small-kernel', *on_cpu, '--wait'],
        ['status', 'small-kernel', '--json'],
        ['logs', 'small-kernel'],
        ['pull', 'small-kernel', '--out', tmp_path/'pulled'],
        ['quota'],
        ['relay', kernel, '--name', 'counting', *on_cpu],
        ['submit', '--kernel', kernel, '--slug', 'small-submit', *on_cpu],
        ['run', 'train', '--list'],
    ]
    done = light(absent, commands, server.environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].strip() == 'imported:'
    assert (tmp_path/'pulled'/'submission.csv').is_file() and len(server.submissions) == 1


def test_another_command_says_what_it_wants(server, tmp_path, absent):
    (tmp_path/'train.csv').write_text(csv_text(random.Random(0), rows=60))
    done = light(absent, [['floors', tmp_path/'train.csv']], server.environment())
    lacking = re.search(r'^underdog: (\w+)\S* is not installed', done.stderr, re.M)
    assert done.returncode == 1 and 'Traceback' not in done.stderr and lacking and lacking[1] in absent, done.stderr
