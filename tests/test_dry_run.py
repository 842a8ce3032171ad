"A dry run sends nothing: it lists every file that would go, or writes the folder that plain `kaggle` pushes."
import json
import os
import shlex
import subprocess
import sys

import pytest
from bad_inputs import PROBE
from kaggle_server import write_notebook
from typer.testing import CliRunner

from underdog.console.main import app
from underdog.core import UserError, write_json
from underdog.kaggle import contents
from underdog.kaggle.ledger import home_folder, note_run, read_ledger
from underdog.kaggle.proof import expectation
from underdog.kaggle.push import PushConfig, prepare_kernel
from underdog.kaggle.ship import library_bundle

CPU = PushConfig(shape='', gpus=0)


def run(*args): return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def kernel(tmp_path):
    "A kernel that needs the library and writes its parameter."
    return write_notebook(tmp_path/'k.ipynb', 'import underdog\nopen("n.txt", "w").write(str(n))')


# ---- push
def test_plain_kaggle_pushes_the_folder_of_a_dry_run(server, tmp_path, monkeypatch, kernel):
    "And what arrives is what `underdog push` sends, but for the id of the push."
    monkeypatch.chdir(tmp_path)
    assert run('bundle', '--no-wheels', '--poll', '.05').exit_code == 0
    push = 'push', kernel, '-p', 'n=3', '--slug', 'small-kernel', '--no-wheels', '--timeout', '2', '--poll', '.05'
    dry = run(*push, '--dry-run', '--folder', 'to push')
    assert dry.exit_code == 0 and 'nothing is pushed' in dry.output, dry.exception
    assert not server.kernels and not read_ledger()
    assert sorted(os.listdir('to push')) == ['kernel-metadata.json', 'kernel.ipynb']

    # what the notebook's reader is not asked to read is folded
    first, *_, last = json.loads((tmp_path/'to push'/'kernel.ipynb').read_text())['cells']
    for cell in (first, last):
        assert cell['metadata']['jupyter']['source_hidden'] and cell['metadata']['_kg_hide-input']

    # the command that it names
    command = shlex.split(dry.output.splitlines()[-1].removeprefix('to push it: '))
    assert command == ['kaggle', 'kernels', 'push', '-p', 'to push', '-t', '7200']
    done = subprocess.run([sys.executable, '-m', *command], env=server.environment(), capture_output=True, text=True)
    assert 'successfully pushed' in done.stdout, done.stdout + done.stderr
    job = server.job('me/small-kernel')
    assert job.status == 'COMPLETE' and (job.output/'n.txt').read_text() == '3'

    # the same from here
    assert run(*push).exit_code == 0
    requests = [dict(version['request']) for version in server.kernels['me/small-kernel']['versions']]
    expected = [expectation(request['text']) for request in requests]
    assert expected[0].pop('push') != expected[1].pop('push') and expected[0] == expected[1]
    sources = [json.loads(request.pop('text'))['cells'][1:] for request in requests]
    for cells in sources: assert all(cell.pop('id') or True for cell in cells)
    assert sources[0] == sources[1] and requests[0] == requests[1]


def spoil(folder, how):
    "Something that a dry run must leave alone."
    if how == 'a file': return folder.write_text('thesis')
    folder.mkdir()
    if how == 'a pipe': return os.mkfifo(folder/'kernel.ipynb')
    name = {'an open notebook': 'kernel.ipynb', 'metadata of kaggle': 'kernel-metadata.json'}.get(how, 'thesis.tex')
    (folder/name).write_text('{"cells": [{"source": "EXPECT = 1"}]}')


@pytest.mark.parametrize('how', ['a file', 'a pipe', 'an open notebook', 'metadata of kaggle', 'something else'])
def test_a_folder_with_something_else_in_it_is_left_alone(hub, tmp_path, kernel, how):
    folder = tmp_path/'mine'
    spoil(folder, how)
    before = {file: file.is_file() and file.read_bytes() for file in (folder, *tmp_path.glob('mine/*'))}
    with pytest.raises(UserError, match='mine: (a file|holds)'):
        prepare_kernel(hub, kernel, {}, 'small-kernel', CPU).write(folder)
    assert before == {file: file.is_file() and file.read_bytes() for file in (folder, *tmp_path.glob('mine/*'))}


def test_its_own_folder_is_written_again(hub, tmp_path, kernel):
    for n in ('1', '2'): files = prepare_kernel(hub, kernel, dict(n=n), 'small-kernel', CPU).write(tmp_path/'mine')
    assert expectation(files[0].read_text())['values'] == dict(n=2)


def test_what_a_push_refuses_a_dry_run_refuses(server, tmp_path, kernel):
    dry = lambda *args: str(run('push', *args, '--dry-run', '--folder', tmp_path/'mine', '--no-wheels').exception)
    assert "no parameter 'm'" in dry(kernel, '-p', 'm=1')
    assert 'is not on Kaggle' in dry(kernel)   # the library
    assert 'give --dry-run, too' in str(run('push', kernel, '--folder', tmp_path/'mine').exception)
    assert not (tmp_path/'mine').exists() and not server.kernels


# ---- bundle
def listed(output):
    "{file: bytes} of the tables in what a dry run printed."
    rows = [line.replace('│', ' ').split() for line in output.splitlines()]
    return {name: int(size.replace(',', '')) for name, size in (row for row in rows if len(row) == 2)
            if size.replace(',', '').isdecimal()}


def test_a_dry_run_lists_every_file_with_its_size(tmp_path, monkeypatch):
    monkeypatch.setenv('COLUMNS', '120')
    bundled = library_bundle(tmp_path/'lib')
    dry = run('bundle', '--no-wheels', '--dry-run')
    assert dry.exit_code == 0, dry.exception
    files = {name: size for name, (size, _) in bundled['files'].items()}
    assert len(files) > 100 and files.items() <= listed(dry.output).items()
    assert f'{len(files):,} files, {sum(files.values()):,} bytes' in dry.output
    folder = run('bundle', '--dry-run', '--folder', tmp_path/'lib')
    assert listed(folder.output) == files


def test_a_long_search_for_keys_shows_how_far_it_is(tmp_path, monkeypatch, capsys):
    for i in range(3): (tmp_path/f'rows{i}.csv').write_bytes(b'id,text\n'*1000)
    contents.check_contents(tmp_path)
    assert 'looking for keys' not in capsys.readouterr().out
    monkeypatch.setattr(contents, '_LONG', 0)
    contents.check_contents(tmp_path)
    shown = capsys.readouterr().out
    assert 'looking for keys: 100%' in shown and '24.0k/24.0k' in shown


def test_a_name_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path/'caf\udce9.csv').write_text('id\n')
    with pytest.raises(UserError, match='not UTF-8; rename it'): contents.check_contents(tmp_path)


# ---- JSON at the end
def test_status_and_doctor_end_with_json(server, tmp_path):
    note_run(kernel='me/small-kernel', version=1, push='x', state='COMPLETE', hours=.5)
    with open(home_folder()/'ledger.jsonl', 'a') as f: f.write('{"version": 2}\n')   # not a line of ours
    kernel, = json.loads(run('status', '--json').output.splitlines()[-1])
    expected = dict(kernel='me/small-kernel', version=1, state='COMPLETE', progress='', failure='', hours=.5)
    assert kernel == expected
    write_json(tmp_path/'probe.json', PROBE)
    told = run('doctor', tmp_path/'probe.json', '--json')
    lines = {line['name']: line['state'] for line in json.loads(told.output.splitlines()[-1])}
    assert lines['all_reduce'] == 'fail' and isinstance(told.exception, UserError)
