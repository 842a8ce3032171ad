"""Every failure of Kaggle that is known to be silent is made to happen by the server, and must be heard of.

The client is the real one."""
import ast
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import nbformat
import pytest
from kaggle_server import QUOTA, SESSIONS, write_notebook

from underdog.core import UserError
from underdog.kernels import find_kernel
from underdog.kaggle.account import Hub, Refused
from underdog.kaggle.keys import find_key
from underdog.kaggle.leaderboard import read_scores
from underdog.kaggle.ledger import gpu_quota, home_folder, note_run, read_ledger
from underdog.kaggle.proof import expectation, last_source, proof_source
from underdog.kaggle.names import Sources, inputs_of
from underdog.kaggle.push import PushConfig, _check_answer, push_kernel, pushed_notebook
from underdog.kaggle.relay import _session_hours, run_relay
from underdog.kaggle.ship import library_bundle, remote_manifest, ship, ship_model
from underdog.kaggle.watch import follow_log, kernel_state, pull_output, wait_for_kernel

CPU = PushConfig(shape='', gpus=0)


@pytest.fixture
def kernel(tmp_path):
    "A kernel with nothing but a parameters cell."
    return write_notebook(tmp_path/'k.ipynb')


def data(folder, text='a'):
    "A folder with a file, and another one in a folder of its own."
    (folder/'sub').mkdir(parents=True, exist_ok=True)
    (folder/'rows.csv').write_text(text)
    (folder/'sub'/'more.csv').write_text(text)
    return folder


def raw_kernel(folder, slug):
    "A folder as the client takes it, written without underdog."
    folder.mkdir()
    write_notebook(folder/'k.ipynb')
    metadata = {
        'id': f'me/{slug}',
        'title': slug.replace('-', ' '),
        'code_file': 'k.ipynb',
        'language': 'python',
        'kernel_type': 'notebook',
    }
    (folder/'kernel-metadata.json').write_text(json.dumps(metadata))
    return folder


def log_of(job): return ''.join(event['data'] for event in job.events)


def python(code, *args, env):
    command = [sys.executable, '-c', code, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


UNDERDOG = 'from underdog.console.main import main; main()'


# ---- exit codes that lie
@pytest.mark.parametrize('error,kind', [(QUOTA, 'quota'), (SESSIONS, 'sessions'), ('Notebook not found', 'missing')])
def test_a_refused_push_is_exit_code_0_of_the_client_and_an_error_of_ours(server, hub, kernel, tmp_path, error, kind):
    server.refuse = error
    command = [sys.executable, '-m', 'kaggle', 'kernels', 'push', '-p', str(raw_kernel(tmp_path/'raw', 'small-kernel'))]
    client = subprocess.run(command, env=server.environment(), capture_output=True, text=True)
    assert client.returncode == 0 and 'Kernel push error' in client.stdout
    with pytest.raises(Refused, match=re.escape(error.rstrip('.'))) as e: push_kernel(hub, kernel, {}, 'small-kernel')
    assert e.value.kind == kind


@pytest.mark.parametrize('spec,message', [
    ('me/nowhere/x.csv', 'dataset me/nowhere is not on Kaggle'),
    ('competitions/nothing/x.csv', 'competition nothing: not there'),
    ('models/me/no/transformers/m/1', 'no such model.*https://www.kaggle.com/models/me/no'),
])
def test_what_kaggle_would_leave_out_is_asked_before_a_push(server, hub, kernel, spec, message):
    with pytest.raises(Refused, match=message):
        push_kernel(hub, kernel, {}, 'small-kernel', settings=replace(CPU, sources=(spec,)))
    assert not server.kernels


def test_a_dropped_source_is_an_error_and_the_kernel_stops_in_its_first_cell(server, hub, tmp_path):
    spec, source = 'notebooks/me/nobody/run', 'me/nobody'
    k = write_notebook(tmp_path/'k.ipynb', 'open("reached", "w")')
    settings = replace(CPU, sources=(spec,), wait_s=.2)
    with pytest.raises(UserError, match=f'left out {source}'):
        push_kernel(hub, k, {}, 'small-kernel', settings=settings)
    job = server.job('me/small-kernel')
    assert job.status == 'ERROR' and not (job.output/'reached').exists()
    assert 'is not mounted' in kernel_state(hub, 'me/small-kernel').why


def test_a_replaced_shape_is_a_doubt_and_costs_seconds(server, hub, kernel):
    server.replace_shape = 'NvidiaL4'
    pushed = push_kernel(hub, kernel, {}, 'small-kernel')
    assert 'NvidiaTeslaT4 was asked for and Kaggle shows NvidiaL4' in pushed.doubt
    server.job('me/small-kernel')
    assert '2 GPUs were asked for and there are 1' in kernel_state(hub, 'me/small-kernel').why


def test_the_real_shape_is_proved(server, hub, kernel):
    job = server.job(push_kernel(hub, kernel, {}, 'small-kernel').ref)
    proof = json.loads((job.output/'underdog.json').read_text())
    assert job.status == 'COMPLETE' and len(proof['gpus']) == 2
    with pytest.raises(UserError, match='without a machine shape'): PushConfig(shape='', gpus=2)


def test_a_notebook_without_kernelspec_dies_and_ours_has_one(server, hub, kernel, tmp_path):
    hub.api.kernels_push(str(raw_kernel(tmp_path/'raw', 'raw-kernel')))
    server.job('me/raw-kernel')
    assert 'No kernel name found' in kernel_state(hub, 'me/raw-kernel').why
    assert server.job(push_kernel(hub, kernel, {}, 'our-kernel', settings=CPU).ref).status == 'COMPLETE'


def test_title_and_slug_agree_and_another_name_is_noticed(server, hub, kernel):
    for bad in ('Small-Kernel', 'two--hyphens', 'abc', 'x'*51):
        with pytest.raises(UserError, match='slug of 5 to 50'): push_kernel(hub, kernel, {}, bad)
    assert not server.kernels
    lists = {f'invalid_{kind}_sources': [] for kind in ('dataset', 'competition', 'kernel', 'model')}
    answer = SimpleNamespace(error='', version_number=1, ref='/code/me/other', url='', **lists)
    with pytest.raises(UserError, match='Kaggle made /code/me/other of it'): _check_answer('me/small-kernel', answer)


# ---- the first cell
LIBRARY = dict(library='me/underdog-lib', bundles={'me/underdog-lib': 'abc'})


@pytest.mark.parametrize('more', [{}, LIBRARY], ids=['alone', 'library'])
def test_the_first_cell_needs_nothing_but_python(more):
    "It runs before the library is there, on the Python of whatever image the kernel gets."
    expect = dict(push='x', **more)
    tree = ast.parse(f'{proof_source(expect)}\n{last_source(expect)}', feature_version=(3, 10))
    ours = {name.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names}
    # two names come from the library, once it is there
    assert ours == ({'prove', 'pack_folders'} if more else set())
    assert {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)} <= {'underdog.kaggle.proof'}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names: assert name.name in sys.stdlib_module_names, name.name
    # every name that it calls is its own: a function, or an argument of one
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} | {'EXPECT'} | ours
    own |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    builtins = set(dir(__builtins__)) if not isinstance(__builtins__, dict) else set(__builtins__)
    assert called <= own | builtins


def test_who_opens_the_page_of_a_kernel_meets_few_lines():
    expect = dict(push='x', **LIBRARY)
    assert len(proof_source(expect).splitlines()) < 40 and len(last_source(expect).splitlines()) < 10


def lend_library(root, hash_, place='datasets/me/underdog-lib'):
    "The library below `root`/input, whose manifest says `hash_`; returns its own hash."
    folder = root/'input'/place
    bundle = library_bundle(folder)
    (folder/'bundle.json').write_text(json.dumps(dict(bundle, hash=hash_ or bundle['hash'])))
    return bundle['hash']


def run_first_cell(root, wanted, wait_s=.2):
    "The first cell of a push with the library of this hash, in a Python without packages."
    expect = dict(push='1a2b', gpus=0, mounts=[], wheels='', files={}, library='me/underdog-lib',
                  bundles={'me/underdog-lib': wanted})
    source = f'{proof_source(expect, wait_s)}\nprint("reached", sys.modules["underdog"].__file__)'
    return subprocess.Popen([sys.executable, '-I', '-S', '-c', f'import sys\n{source}'], cwd=root, text=True,
                            env=dict(os.environ, UNDERDOG_KAGGLE=str(root)), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


@pytest.mark.parametrize('place', ['datasets/me/underdog-lib', 'me/underdog-lib', 'underdog-lib'])
def test_the_library_of_the_push_is_found_where_kaggle_mounts_it(tmp_path, place):
    output, _ = (process := run_first_cell(tmp_path, lend_library(tmp_path, '', place))).communicate()
    assert process.returncode == 0 and f'reached {tmp_path}' in output and 'underdog: proved' in output, output


@pytest.mark.parametrize('spoil', [
    lambda file: file.write_text('{"hash": "0123"}'), lambda file: file.unlink(), lambda file: file.write_text('{"ha'),
    lambda file: file.write_text('[1]'), lambda file: file.write_text('{"hash": []}'),
    lambda file: file.write_text('{"hash": null}')], ids=['old', 'gone', 'torn', 'list', 'hash list', 'null'])
def test_another_library_is_never_imported(tmp_path, spoil):
    "Not even when all its files are there: it is the manifest's hash that was pinned at the push."
    wanted = lend_library(tmp_path, '')
    spoil(tmp_path/'input'/'datasets'/'me'/'underdog-lib'/'bundle.json')
    # nor may it run a line of what is mounted
    (tmp_path/'input'/'datasets'/'me'/'underdog-lib'/'underdog'/'__init__.py').write_text('print("ran")')
    output, _ = (process := run_first_cell(tmp_path, wanted)).communicate()
    assert process.returncode == 1 and f'instead of {wanted} (a stale mount)' in output and 'ran' not in output, output
    assert output.startswith('underdog: push 1a2b'), 'the log names the push also where it stops'


def test_the_library_of_the_push_is_waited_for(tmp_path):
    wanted = lend_library(tmp_path, 'old')
    process = run_first_cell(tmp_path, wanted, wait_s=60.)
    assert process.stdout.readline() == 'underdog: push 1a2b\n'
    lend_library(tmp_path/'next', '')
    (tmp_path/'input').rename(tmp_path/'before')
    (tmp_path/'next'/'input').rename(tmp_path/'input')
    output, _ = process.communicate()
    assert process.returncode == 0 and 'reached' in output, output


def test_a_library_that_is_no_bundle_is_refused():
    with pytest.raises(UserError, match='library=me/lib is not one of the bundles; did you mean me/libs'):
        PushConfig(library='me/lib', bundles={'me/libs': 'abc'})


def test_what_the_first_cell_expects_is_read_back(kernel):
    expect = dict(push='x', values=dict(text='EXPECT = "\'\n', number=1e-4, nothing=None), files={'a/b': 'hash'})
    assert expectation(nbformat.writes(pushed_notebook(kernel, {}, expect))) == expect
    assert expectation(kernel.read_text()) == expectation('[') == {}


# ---- a busy server
def test_429_and_503_are_waited_for_and_a_push_whose_answer_is_lost_is_not_repeated(server, hub, kernel, tmp_path):
    server.fail('SaveKernel', 429, 503)
    first = push_kernel(hub, kernel, {}, 'small-kernel', settings=CPU)
    assert first.version == 1
    server.fail('SaveKernel', 'after')   # it is pushed, the answer is a 503
    second = push_kernel(hub, kernel, {}, 'small-kernel', settings=CPU)
    assert second.version == 2 and len(server.kernels['me/small-kernel']['versions']) == 2
    server.fail('GetKernelSessionStatus', 503, 429, 429)
    server.fail('ListKernelSessionOutput', 429)
    state = wait_for_kernel(hub, second.ref, second.id)
    assert state.status == 'COMPLETE', state
    assert pull_output(hub, second.ref, tmp_path/'out', push_id=second.id)


def test_a_server_that_stays_busy_is_said_so_and_a_wrong_key_too(server, hub):
    server.fail('GetAcceleratorQuotaStatistics', *[503]*20)
    with pytest.raises(Refused, match='Kaggle does not answer') as e: gpu_quota(hub)
    assert e.value.kind == 'busy'
    server.faults.clear()
    server.fail('GetAcceleratorQuotaStatistics', 401)
    with pytest.raises(Refused, match='does not take these credentials') as e: gpu_quota(hub)
    assert e.value.kind == 'credentials'


def test_the_server_is_gone(server, hub):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(Refused, match='Kaggle does not answer'): gpu_quota(hub)


# ---- datasets
def test_a_dataset_is_sent_once_and_again_when_it_changed(server, hub, tmp_path):
    server.processing = 3
    first = ship(hub, data(tmp_path/'d'), 'some-data')
    assert (first.version, first.sent) == (1, True) and server.datasets['me/some-data']['private']
    assert not ship(hub, tmp_path/'d', 'some-data').sent
    second = ship(hub, data(tmp_path/'d', 'b'), 'some-data')
    assert (second.version, second.sent) == (2, True)
    assert remote_manifest(hub, 'me/some-data')['hash'] == second.hash


@pytest.mark.parametrize('knob', ['flat_listing', 'zip_downloads'])
def test_other_ways_of_kaggle_to_show_the_same(server, hub, tmp_path, knob):
    setattr(server, knob, True)
    assert ship(hub, data(tmp_path/'d'), 'some-data').sent and not ship(hub, tmp_path/'d', 'some-data').sent


def test_a_version_is_not_sent_while_the_one_before_is_processed(server, hub, tmp_path):
    ship(hub, data(tmp_path/'d'), 'some-data')
    server.datasets['me/some-data']['polls'] = 4   # somebody's earlier version
    assert ship(hub, data(tmp_path/'d', 'b'), 'some-data').version == 2


def test_a_torn_upload_is_noticed_and_mended(server, hub, tmp_path):
    server.cut_upload = 1
    assert ship(hub, data(tmp_path/'d'), 'some-data').version == 1
    uploads = [body for path, body in server.seen if '/upload/' in path]
    assert any(body and body.get('range', '').startswith('bytes ') for body in uploads), 'resumed in the middle'
    server.cut_upload = 10**6
    with pytest.raises(UserError, match='lacks .*rows.csv.*the same command sends it again|Upload unsuccessful'):
        ship(hub, data(tmp_path/'d', 'b'*100), 'some-data')
    server.cut_upload = 0
    assert ship(hub, tmp_path/'d', 'some-data').sent
    assert (server.datasets['me/some-data']['versions'][-1]/'rows.csv').read_text() == 'b'*100


def test_a_version_that_lacks_a_file_is_not_the_same_although_its_hash_is(server, hub, tmp_path):
    ship(hub, data(tmp_path/'d'), 'some-data')
    (server.datasets['me/some-data']['versions'][0]/'rows.csv').unlink()
    assert ship(hub, tmp_path/'d', 'some-data').version == 2


def test_a_dataset_that_cannot_be_processed(server, hub, tmp_path):
    server.broken_datasets = True
    with pytest.raises(UserError, match='could not process the upload'): ship(hub, data(tmp_path/'d'), 'some-data')


@pytest.mark.parametrize('layout', ['new', 'old'])
@pytest.mark.parametrize('extract', [True, False])
def test_both_mount_layouts_and_archives_that_are_left_packed(server, hub, tmp_path, layout, extract):
    server.layout, server.extract = layout, extract
    library_bundle(tmp_path/'lib')
    library = ship(hub, tmp_path/'lib', 'underdog-lib')
    ship(hub, data(tmp_path/'d'), 'some-data')
    model = ship_model(hub, data(tmp_path/'m'), 'me/tiny/transformers/small')
    cell = '''import underdog.machine as machine
for spec in (csv, model): print("resolved", machine.resolve_input(spec))
print("library", machine.__file__)'''
    k = write_notebook(tmp_path/'k.ipynb', cell, parameters='csv = ""\nmodel = ""')
    given = dict(csv='me/some-data/rows.csv', model=f'models/{model.ref}')
    settings = replace(CPU, bundles={library.ref: library.hash}, library=library.ref, sources=('me/some-data',))
    job = server.job(push_kernel(hub, k, given, 'small-kernel', settings=settings).ref)
    log = log_of(job)
    assert job.status == 'COMPLETE', log
    assert log.count('resolved') == 2 and str(job.tree) in log.split('library')[-1]


@pytest.mark.parametrize('patience,stale_s,status', [(20., 1., 'COMPLETE'), (.5, 30., 'ERROR')])
def test_a_stale_mount_is_waited_for_and_stops_a_kernel_if_it_stays(server, hub, tmp_path, patience, stale_s, status):
    ship(hub, data(tmp_path/'d'), 'some-data')
    new = ship(hub, data(tmp_path/'d', 'b'), 'some-data')
    cell = '''from pathlib import Path; import os
print("rows", *(p.read_text() for p in Path(os.environ["UNDERDOG_KAGGLE"]).rglob("rows.csv")))'''
    k = write_notebook(tmp_path/'k.ipynb', cell)
    server.stale_mounts, server.stale_s = 1, stale_s
    settings = replace(CPU, bundles={new.ref: new.hash}, wait_s=patience)
    job = server.job(push_kernel(hub, k, {}, 'small-kernel', settings=settings).ref)
    log = log_of(job)
    assert job.status == status, log
    assert ('rows b' in log) == (status == 'COMPLETE') and ('stale mount' in log) == (status == 'ERROR')


# ---- watching
def test_a_log_is_followed_live_and_a_failure_is_named(server, hub, tmp_path):
    slow = 'import time\nfor i in range(4): print(f"line {i}", flush=True); time.sleep(.3)'
    k = write_notebook(tmp_path/'k.ipynb', slow, 'raise ValueError("n is odd")')
    pushed = push_kernel(hub, k, {}, 'small-kernel', settings=CPU)
    while server.kernels[pushed.ref]['versions'][0]['job'].status == 'QUEUED': time.sleep(.02)
    began, events = time.monotonic(), []
    for event in follow_log(hub, pushed.ref): events.append((time.monotonic() - began, event['data']))
    first = next(seconds for seconds, text in events if 'line 0' in text)
    last = next(seconds for seconds, text in events if 'line 3' in text)
    assert last - first > .5, 'as it came, not at the end'
    state = wait_for_kernel(hub, pushed.ref, pushed.id)
    assert (state.status, state.why) == ('ERROR', 'ValueError: n is odd')
    with pytest.raises(UserError, match='pattern'): pull_output(hub, pushed.ref, tmp_path/'x', '(')


def test_a_status_of_the_version_before_is_not_taken_for_this_one(server, hub, tmp_path):
    cell = 'import time; time.sleep(n)\nopen("n.txt", "w").write(str(n))'
    k = write_notebook(tmp_path/'k.ipynb', cell, parameters='n = 0.0')
    first = push_kernel(hub, k, {}, 'small-kernel', settings=CPU)
    assert wait_for_kernel(hub, first.ref, first.id).status == 'COMPLETE'
    server.status_lag = 6
    second = push_kernel(hub, k, dict(n='1.5'), 'small-kernel', settings=CPU)
    assert wait_for_kernel(hub, second.ref, second.id).push == second.id
    pull_output(hub, second.ref, tmp_path/'out', 'n.txt', second.id)
    assert (tmp_path/'out'/'n.txt').read_text() == '1.5'


def test_long_outputs_are_paged_and_names_cannot_leave_the_folder(server, hub, tmp_path):
    k = write_notebook(tmp_path/'k.ipynb', 'for i in range(230): open(f"f{i}.txt", "w").write("x")')
    pushed = push_kernel(hub, k, {}, 'small-kernel', settings=CPU)
    wait_for_kernel(hub, pushed.ref, pushed.id)
    assert len(pull_output(hub, pushed.ref, tmp_path/'out', r'^f\d+', pushed.id)) == 231, 'and the log'
    for bad in ('../evil.txt', '/tmp/evil.txt', 'a/../../evil.txt'):
        server.extra_output = [dict(fileName=bad, url=server.url)]
        with pytest.raises(UserError, match='leads out of'): pull_output(hub, pushed.ref, tmp_path/'bad')
    assert not (tmp_path/'bad').exists() and not (tmp_path/'evil.txt').exists()


# ---- quota, ledger, scores
def test_quota_and_ledger(server, hub):
    server.used_s = 12*3600
    quota = gpu_quota(hub)
    assert (quota.used, quota.left, quota.total) == (12, 18, 30) and quota.resets.startswith('Sat 28 Nov')
    note_run(kernel='me/a', version=1, push='x', state='pushed')
    note_run(kernel='me/a', version=1, push='x', state='COMPLETE', hours=2.5)
    # killed while it was written
    with open(home_folder()/'ledger.jsonl', 'a') as f: f.write('{"kernel": "me/b", "ver')
    assert [(e['kernel'], e['state'], e['hours']) for e in read_ledger()] == [('me/a', 'COMPLETE', 2.5)]
    note_run(kernel='me/c', version=1, push='y', state='pushed')
    assert [e['kernel'] for e in read_ledger()] == ['me/a', 'me/c'], 'the torn line costs itself alone'


def test_the_table_of_scores_survives_a_torn_line_and_knows_competitions_apart(server):
    home_folder().mkdir(parents=True)
    rows = [dict(competition=slug, kernel='me/a', version=i, cv=1.) for i, slug in enumerate(['one', 'two', 'one'])]
    lines = [json.dumps(row) for row in rows]
    (home_folder()/'scores.jsonl').write_text('\n'.join([*lines, lines[0][:20]]))
    assert read_scores('one')['version'].tolist() == [0, 2] and read_scores('three').empty


# ---- the relay
def test_a_relay_whose_laptop_dies_goes_on_from_another(server, hub, tmp_path, count):
    code = '''import sys
from underdog.kaggle.account import Hub
from underdog.kaggle.push import PushConfig
from underdog.kaggle.relay import run_relay
hub = Hub(poll_s=.05, first_pause_s=.01)
run_relay(hub, "counting", sys.argv[1], dict(nap="1.5"), PushConfig(shape="", gpus=0))'''
    env = server.environment() | dict(UNDERDOG_HOME=str(tmp_path/'laptop'))
    first = subprocess.Popen([sys.executable, '-c', code, str(count)], env=env, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
    began = time.monotonic()
    while 'me/counting-2' not in server.kernels and time.monotonic() - began < 60: time.sleep(.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    # parameters, sessions: all from Kaggle
    last = run_relay(hub, 'counting', count, None, CPU)
    assert last.ref == 'me/counting-3' and last.expect['values']['nap'] == 1.5
    assert [len(server.kernels[f'me/counting-{i}']['versions']) for i in (1, 2, 3)] == [1, 1, 1]
    with pytest.raises(UserError, match='nap=0.5 instead of 1.5'):
        run_relay(hub, 'counting', count, dict(nap='0.5'), CPU)


def test_a_failed_session_is_an_error_and_the_same_command_repeats_it(server, hub, count):
    for version in (1, 2):
        with pytest.raises(UserError, match=r'session 2 \(me/counting-2\) failed: ValueError: a bad step'):
            run_relay(hub, 'counting', count, dict(bad='4'), CPU)
        assert len(server.kernels['me/counting-1']['versions']) == 1
        assert len(server.kernels['me/counting-2']['versions']) == version


def test_a_relay_waits_for_a_slot_and_stops_before_the_quota(server, hub, tmp_path, count):
    other = write_notebook(tmp_path/'other.ipynb', 'import time; time.sleep(3)')
    push_kernel(hub, other, {}, 'other-kernel')
    server.slots, messages = 1, []
    def say(text):
        messages.append(text)
        if 'session 1: paused' in text: server.used_s = 29.6*3600
    with pytest.raises(Refused, match='it resets Sat 28 Nov') as e:
        run_relay(hub, 'counting', count, {}, hours=5., say=say)
    assert e.value.kind == 'quota' and any('session count' in text for text in messages)
    request = server.kernels['me/counting-1']['versions'][0]['request']
    assert request['sessionTimeoutSeconds'] <= 6*3600


def test_hours_never_exceed_what_is_left(hub, server):
    for used in (0, 10, 20, 25, 28):
        server.used_s = used*3600
        assert _session_hours(hub, PushConfig(), 11.5) <= 30 - used
    assert _session_hours(hub, CPU, 11.5) == 11.5


# ---- security
KEY = 'KGAT_' + '0123456789abcdef'*2


@pytest.mark.parametrize('cell', [
    nbformat.v4.new_code_cell(f'token = "{KEY}"'),
    nbformat.v4.new_markdown_cell(KEY),
    nbformat.v4.new_code_cell('x', outputs=[nbformat.v4.new_output('stream', text=f'signed in with {KEY}')]),
], ids=['code', 'text', 'output'])
def test_a_key_in_a_notebook_is_refused(server, hub, kernel, cell):
    nb = nbformat.read(kernel, 4)
    nb.cells.append(cell)
    nbformat.write(nb, kernel)
    with pytest.raises(UserError, match='looks like a key') as e: push_kernel(hub, kernel, {}, 'small-kernel')
    assert KEY not in str(e.value) and not server.kernels


def test_keys_and_pickles_in_a_folder_are_refused(server, hub, tmp_path):
    folder = data(tmp_path/'d')
    bad = {'notes.md': f'my token is {KEY}'.encode(), 'kaggle.json': b'{}', 'w.bin': pickle.dumps({})}
    for name, content in bad.items():
        (folder/name).write_bytes(content)
        with pytest.raises(UserError) as e: ship(hub, folder, 'some-data')
        assert KEY not in str(e.value)
        (folder/name).unlink()
    assert not server.datasets


def test_every_kernel_of_ours_is_free_of_keys():
    for name in ('train', 'infer', 'blend', 'sweep', 'wheels'):
        path = find_kernel(name)
        assert find_key(path.read_text()) == '' and pushed_notebook(path, {}, dict(push='x'))


def test_credentials_are_in_no_message(server, monkeypatch):
    monkeypatch.setenv('KAGGLE_KEY', 'very-secret-key-0001')
    hub = Hub(tries=2, first_pause_s=.01)
    server.fail('GetKernelSessionStatus', 500, 500, 500)
    with pytest.raises(Refused) as e: kernel_state(hub, 'me/x')
    assert 'secret' not in str(e.value) and 'secret' not in repr(e.value)
    done = python(UNDERDOG, 'status', 'nothing', env=server.environment() | dict(KAGGLE_KEY='very-secret-key-0001'))
    assert done.returncode == 1 and 'secret' not in done.stdout + done.stderr and 'Traceback' not in done.stderr


def test_public_must_be_asked_for_twice(server, tmp_path):
    from typer.testing import CliRunner

    from underdog.console.main import app
    args = ['bundle', '--folder', str(data(tmp_path/'d')), '--slug', 'some-data', '--poll', '.05']
    once = CliRunner().invoke(app, [*args, '--public'])
    assert 'give --public twice' in str(once.exception) and not server.datasets
    twice = CliRunner().invoke(app, [*args, '--public', '--public'])
    assert twice.exit_code == 0 and not server.datasets['me/some-data']['private']


def test_without_credentials_one_line(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith('KAGGLE')}
    done = python(UNDERDOG, 'quota', env=env | dict(HOME=str(tmp_path), KAGGLE_API_ENVIRONMENT='LOCALHOST'))
    assert done.returncode == 1 and 'no Kaggle credentials' in done.stderr and 'Traceback' not in done.stderr


# ---- parameters and sources
@pytest.mark.parametrize('values,message', [
    (dict(train_csv='/home/me/train.csv'), 'a path of this machine'),
    (dict(train_csv='train.csv'), 'not an input of a kernel'),
    (dict(model='models/a/b/c/d'), 'VERSION wanted'),
    (dict(run='~/x'), 'a path of this machine'),
])
def test_inputs_that_kaggle_cannot_see_are_refused(values, message):
    with pytest.raises(UserError, match=message): Sources.of(inputs_of(values))


def test_unknown_parameters_are_refused_before_anything_is_sent(server, hub, kernel):
    with pytest.raises(UserError, match='no parameter'): push_kernel(hub, kernel, dict(m='1'), 'small-kernel')
    assert not [path for path, _ in server.seen if path.endswith('SaveKernel')]


def test_newer_clients_are_asked_for_the_exact_version(hub):
    "From 2.2.5 on the client sends the version; then no lag can show another one."
    hub.exact = True
    assert hub.version('me/k', 3) == 'me/k/3' and hub.version('me/k', 0) == 'me/k'
    hub.exact = False
    assert hub.version('me/k', 3) == 'me/k'


# ---- no other machine
@pytest.mark.parametrize('reach', [
    lambda: socket.getaddrinfo('www.kaggle.com', 443),
    lambda: socket.gethostbyname('api.kaggle.com'),
    lambda: socket.create_connection(('93.184.216.34', 80), timeout=1),
], ids=['getaddrinfo', 'gethostbyname', 'connect'])
def test_no_test_reaches_another_machine(reach):
    with pytest.raises(OSError, match='a test wants to reach'): reach()


@pytest.mark.parametrize('kernel', [False, True])
def test_no_process_of_a_test_reaches_another_machine(tmp_path, kernel):
    "Neither one that it starts, nor one that stands for a kernel."
    code = 'import socket\ntry: socket.getaddrinfo("api.kaggle.com", 443)\nexcept OSError as e: print(e)'
    more = dict(UNDERDOG_TEST_KERNEL='1', UNDERDOG_KAGGLE=str(tmp_path)) if kernel else {}
    assert 'a test wants to reach' in python(code, env=dict(os.environ, **more)).stdout


def test_a_test_kernel_cannot_import_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = python('import underdog', env=dict(os.environ, UNDERDOG_TEST_KERNEL='1', UNDERDOG_KAGGLE=str(tmp_path)))
    assert "No module named 'underdog'" in done.stderr


# ---- the commands
def test_the_commands_push_wait_show_and_pull(server, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from underdog.console.main import app
    monkeypatch.chdir(tmp_path)
    run = lambda *args: CliRunner().invoke(app, list(args))
    options = '--slug', 'small-kernel', '--no-wheels', '--wait', '--poll', '.05'
    push = lambda path, *args: run('push', str(path), *args, *options)
    assert run('bundle', '--no-wheels', '--poll', '.05').exit_code == 0
    cell = 'import underdog\nopen("n.txt", "w").write(str(n))\nassert n < 5, "n is large"'
    k = write_notebook(tmp_path/'k.ipynb', cell)
    # a good run and one that fails
    good, bad = push(k, '-p', 'n=3'), push(k, '-p', 'n=7')
    assert good.exit_code == 0 and 'version 1 on NvidiaTeslaT4' in good.output
    assert 'error: AssertionError: n is large' in str(bad.exception)
    status = run('status', 'small-kernel')
    assert status.exit_code == 0, status.exception
    assert 'ERROR' in status.output and 'n is large' in status.output
    assert 'underdog: proved' in run('logs', 'small-kernel').output
    # the first cell takes its proof from the library
    first = json.loads(server.kernels['me/small-kernel']['versions'][0]['request']['text'])['cells'][0]
    assert 'from underdog.kaggle.proof import prove' in ''.join(first['source'])
    assert [e['state'] for e in read_ledger()] == ['COMPLETE', 'ERROR']
    assert run('quota').output.count('small-kernel') == 2
    # its output
    (tmp_path/'k2.ipynb').write_text(k.read_text())
    assert push(tmp_path/'k2.ipynb').exit_code == 0 and run('pull', 'small-kernel').exit_code == 0
    assert (tmp_path/'runs'/'small-kernel'/'n.txt').read_text() == '1'
