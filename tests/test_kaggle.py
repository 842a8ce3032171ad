"Every failure of Kaggle that is known to be silent is made to happen by the server, and must be heard of: with the real client."
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from kaggle_server import QUOTA, SESSIONS, KaggleServer

from underdog.core import UserError
from underdog.kaggle.account import Hub, Refused
from underdog.kaggle.push import Push, Sources, inputs_of, push, pushed_notebook
from underdog.kaggle.relay import hours_for, relay
from underdog.kaggle.ship import find_key, remote_manifest, ship, ship_model
from underdog.kaggle.watch import ledger, look, note, pull, quota, wait

FAST = dict(poll_s=.05, first=.01)


@pytest.fixture
def server(tmp_path, monkeypatch):
    for k in ('UNDERDOG_HOME', 'UNDERDOG_CACHE'): monkeypatch.setenv(k, str(tmp_path/k))
    kaggle = KaggleServer(tmp_path/'server').start()
    yield kaggle
    kaggle.stop()


@pytest.fixture
def hub(server): return Hub(**FAST)


def notebook(path, *cells, parameters='n = 1'):
    made = [nbformat.v4.new_code_cell(parameters, metadata=dict(tags=['parameters'])), *map(nbformat.v4.new_code_cell, cells)]
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)
    return path


def data(folder, text='a'):
    folder.mkdir(exist_ok=True)
    (folder/'rows.csv').write_text(text)
    (folder/'sub').mkdir(exist_ok=True)
    (folder/'sub'/'more.csv').write_text(text)
    return folder


def run_of(server, done):
    job = server.kernels[done.ref]['versions'][done.version - 1]['job']
    job.join(60)
    return job


def cli(server, *args, **env): return subprocess.run([sys.executable, '-m', 'kaggle', *map(str, args)], env=server.environment() | env, capture_output=True, text=True)


# ---- exit codes that lie
@pytest.mark.parametrize('error,kind', [(QUOTA, 'quota'), (SESSIONS, 'sessions'), ('Notebook not found', 'missing')])
def test_a_refused_push_is_exit_code_0_of_the_client_and_an_error_of_ours(server, hub, tmp_path, error, kind):
    server.refuse = error
    folder = tmp_path/'raw'
    folder.mkdir()
    notebook(folder/'k.ipynb')
    (folder/'kernel-metadata.json').write_text(json.dumps(dict(id='me/small-kernel', title='small kernel', code_file='k.ipynb', language='python', kernel_type='notebook')))
    theirs = cli(server, 'kernels', 'push', '-p', folder)
    assert theirs.returncode == 0 and 'Kernel push error' in theirs.stdout
    with pytest.raises(Refused, match=re.escape(error.rstrip('.'))) as e: push(hub, folder/'k.ipynb', {}, 'small-kernel')
    assert e.value.kind == kind


@pytest.mark.parametrize('spec', ['me/nowhere/x.csv', 'competitions/nothing/x.csv', 'notebooks/me/nobody/run', 'models/me/no/transformers/m/1'])
def test_a_dropped_source_is_an_error_and_the_kernel_stops_in_its_first_cell(server, hub, tmp_path, spec):
    with pytest.raises(UserError, match='left out ' + re.escape(spec.removeprefix('competitions/').removeprefix('notebooks/').removeprefix('models/').rsplit('/', 1)[0])):
        push(hub, notebook(tmp_path/'k.ipynb', 'open("reached", "w")'), {}, 'small-kernel', Push(sources=(spec,), shape='', gpus=0, wait_s=.2))
    job = server.kernels['me/small-kernel']['versions'][0]['job']
    job.join(60)
    assert job.status == 'ERROR' and not (job.output/'reached').exists() and 'is not mounted' in look(hub, 'me/small-kernel').why


def test_a_replaced_shape_is_an_error_and_costs_seconds(server, hub, tmp_path):
    server.replace_shape = 'NvidiaTeslaP100'
    with pytest.raises(UserError, match='NvidiaTeslaT4 was asked for and Kaggle gave NvidiaTeslaP100'): push(hub, notebook(tmp_path/'k.ipynb'), {}, 'small-kernel')
    server.kernels['me/small-kernel']['versions'][0]['job'].join(60)
    assert '2 GPUs were asked for and there are 1' in look(hub, 'me/small-kernel').why


def test_the_real_shape_is_proved(server, hub, tmp_path):
    job = run_of(server, push(hub, notebook(tmp_path/'k.ipynb'), {}, 'small-kernel'))
    assert job.status == 'COMPLETE' and len(json.loads((job.output/'underdog.json').read_text())['gpus']) == 2
    with pytest.raises(UserError, match='without a machine shape'): Push(shape='', gpus=2)


def test_a_notebook_without_kernelspec_dies_and_ours_has_one(server, hub, tmp_path):
    folder = tmp_path/'raw'
    folder.mkdir()
    notebook(folder/'k.ipynb')
    (folder/'kernel-metadata.json').write_text(json.dumps(dict(id='me/raw-kernel', title='raw kernel', code_file='k.ipynb', language='python', kernel_type='notebook')))
    hub.api.kernels_push(str(folder))
    server.kernels['me/raw-kernel']['versions'][0]['job'].join(60)
    assert 'No kernel name found' in look(hub, 'me/raw-kernel').why
    assert run_of(server, push(hub, folder/'k.ipynb', {}, 'our-kernel', Push(shape='', gpus=0))).status == 'COMPLETE'


def test_title_and_slug_agree_and_another_name_is_noticed(server, hub, tmp_path):
    for bad in ('Small-Kernel', 'two--hyphens', 'abc', 'x'*51): 
        with pytest.raises(UserError, match='slug of 5 to 50'): push(hub, notebook(tmp_path/'k.ipynb'), {}, bad)
    assert not server.kernels
    from types import SimpleNamespace
    from underdog.kaggle.push import _checked
    push(hub, notebook(tmp_path/'k.ipynb'), {}, 'small-kernel', Push(shape='', gpus=0))
    answer = SimpleNamespace(error='', version_number=1, ref='/code/me/other', url='', invalid_dataset_sources=[], invalid_competition_sources=[], invalid_kernel_sources=[], invalid_model_sources=[])
    with pytest.raises(UserError, match='Kaggle made /code/me/other of it'): _checked(hub, 'me/small-kernel', answer, Push(), dict(push='x'))


# ---- a busy server
def test_429_and_503_are_waited_for_and_a_push_whose_answer_is_lost_is_not_repeated(server, hub, tmp_path):
    server.fail('SaveKernel', 429, 503)
    first = push(hub, notebook(tmp_path/'k.ipynb'), {}, 'small-kernel', Push(shape='', gpus=0))
    assert first.version == 1
    server.fail('SaveKernel', 'after')   # it is pushed, the answer is a 503
    second = push(hub, notebook(tmp_path/'k.ipynb'), {}, 'small-kernel', Push(shape='', gpus=0))
    assert second.version == 2 and len(server.kernels['me/small-kernel']['versions']) == 2
    server.fail('GetKernelSessionStatus', 503, 429, 429)
    server.fail('ListKernelSessionOutput', 429)
    assert wait(hub, second.ref, second.id).status == 'COMPLETE'
    assert pull(hub, second.ref, tmp_path/'out', push_id=second.id)


def test_a_server_that_stays_busy_is_said_so_and_a_wrong_key_too(server, hub):
    server.fail('GetAcceleratorQuotaStatistics', *[503]*20)
    with pytest.raises(Refused, match='Kaggle does not answer') as e: quota(hub)
    assert e.value.kind == 'busy'
    server.faults.clear()
    server.fail('GetAcceleratorQuotaStatistics', 401)
    with pytest.raises(Refused, match='does not take these credentials'): quota(hub)


def test_the_server_is_gone(server, hub):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(Refused, match='Kaggle does not answer'): quota(hub)


# ---- datasets
def test_a_dataset_is_sent_once_and_again_when_it_changed(server, hub, tmp_path):
    server.processing = 3
    first = ship(hub, data(tmp_path/'d'), 'some-data')
    assert (first.version, first.sent) == (1, True) and server.datasets['me/some-data']['private']
    assert not ship(hub, tmp_path/'d', 'some-data').sent
    second = ship(hub, data(tmp_path/'d', 'b'), 'some-data')
    assert (second.version, second.sent) == (2, True) and remote_manifest(hub, 'me/some-data')['hash'] == second.hash


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
    assert ship(hub, data(tmp_path/'d'), 'some-data').version == 1   # resumed in the middle
    assert any(b and b.get('range', '').startswith('bytes ') for p, b in server.seen if '/upload/' in p)
    server.cut_upload = 10**6
    with pytest.raises(UserError, match='lacks .*rows.csv.*the same command sends it again|Upload unsuccessful'): ship(hub, data(tmp_path/'d', 'b'*100), 'some-data')
    server.cut_upload = 0
    assert ship(hub, tmp_path/'d', 'some-data').sent and (server.datasets['me/some-data']['versions'][-1]/'rows.csv').read_text() == 'b'*100


def test_a_version_that_lacks_a_file_is_not_the_same_although_its_hash_is(server, hub, tmp_path):
    ship(hub, data(tmp_path/'d'), 'some-data')
    (server.datasets['me/some-data']['versions'][0]/'rows.csv').unlink()
    assert ship(hub, tmp_path/'d', 'some-data').version == 2


def test_a_dataset_that_cannot_be_processed(server, hub, tmp_path):
    server.broken_datasets = True
    with pytest.raises(UserError, match='could not process the upload'): ship(hub, data(tmp_path/'d'), 'some-data')


@pytest.mark.parametrize('layout', ['new', 'old'])
@pytest.mark.parametrize('extract', [True, False])
def test_both_mount_layouts_and_archives_that_are_left_packed(server, hub, tmp_path, layout, extract, request):
    from underdog.kaggle.ship import library_bundle
    server.layout, server.extract = layout, extract
    library_bundle(tmp_path/'lib')
    lib = ship(hub, tmp_path/"lib", "underdog-lib")
    ship(hub, data(tmp_path/"d"), "some-data")
    model = ship_model(hub, data(tmp_path/'m'), 'me/tiny/transformers/small')
    cell = 'import underdog.machine as c\nfor spec in (csv, model): print("resolved", c.resolve_input(spec))\nprint("library", c.__file__)'
    k = notebook(tmp_path/'k.ipynb', cell, parameters='csv = ""\nmodel = ""')
    done = push(hub, k, dict(csv='me/some-data/rows.csv', model=f'models/{model.ref}'), 'small-kernel', Push(shape='', gpus=0, bundles={lib.ref: lib.hash}, sources=('me/some-data',)))
    job = run_of(server, done)
    log = ''.join(e['data'] for e in job.events)
    assert job.status == 'COMPLETE', log
    assert log.count('resolved') == 2 and str(job.tree) in log.split('library')[-1]


def test_a_stale_mount_is_waited_for_and_stops_the_kernel_when_it_stays(server, hub, tmp_path):
    ship(hub, data(tmp_path/'d'), 'some-data')
    new = ship(hub, data(tmp_path/'d', 'b'), 'some-data')
    k = notebook(tmp_path/'k.ipynb', 'from pathlib import Path; import os\nprint("rows", *(p.read_text() for p in Path(os.environ["UNDERDOG_KAGGLE"]).rglob("rows.csv")))')
    for patience, seconds, status in ((20., 1., 'COMPLETE'), (.5, 30., 'ERROR')):
        server.stale_mounts, server.stale_s = 1, seconds
        job = run_of(server, push(hub, k, {}, 'small-kernel', Push(shape='', gpus=0, bundles={new.ref: new.hash}, wait_s=patience)))
        log = ''.join(e['data'] for e in job.events)
        assert job.status == status and ('rows b' in log) == (status == 'COMPLETE') and ('stale mount' in log) == (status == 'ERROR')


# ---- watching
def test_a_log_is_followed_live_and_a_failure_is_named(server, hub, tmp_path):
    done = push(hub, notebook(tmp_path/'k.ipynb', 'import time\nfor i in range(4): print("line", i, flush=True); time.sleep(.3)', 'raise ValueError("n is odd")'), {}, 'small-kernel', Push(shape='', gpus=0))
    from underdog.kaggle.watch import follow
    while server.kernels[done.ref]['versions'][0]['job'].status == 'QUEUED': time.sleep(.02)
    began, seen = time.monotonic(), []
    for event in follow(hub, done.ref): seen.append((time.monotonic() - began, event['data']))
    first = next(t for t, text in seen if 'line 0' in text)
    last = next(t for t, text in seen if 'line 3' in text)
    assert last - first > .5   # as it came, not at the end
    state = wait(hub, done.ref, done.id)
    assert (state.status, state.why) == ('ERROR', 'ValueError: n is odd')
    with pytest.raises(UserError, match='regular|nothing|missing|pattern'): pull(hub, done.ref, tmp_path/'x', '(')


def test_a_status_of_the_version_before_is_not_taken_for_this_one(server, hub, tmp_path):
    k = notebook(tmp_path/'k.ipynb', 'import time; time.sleep(n)\nopen("n.txt", "w").write(str(n))', parameters='n = 0.0')
    first = push(hub, k, {}, 'small-kernel', Push(shape='', gpus=0))
    assert wait(hub, first.ref, first.id).status == 'COMPLETE'
    server.status_lag = 6
    second = push(hub, k, dict(n='1.5'), 'small-kernel', Push(shape='', gpus=0))
    assert wait(hub, second.ref, second.id).push == second.id
    pull(hub, second.ref, tmp_path/'out', 'n.txt', second.id)
    assert (tmp_path/'out'/'n.txt').read_text() == '1.5'


def test_long_outputs_are_paged_and_names_cannot_leave_the_folder(server, hub, tmp_path):
    done = push(hub, notebook(tmp_path/'k.ipynb', 'import os\nfor i in range(230): open(f"f{i}.txt", "w").write("x")'), {}, 'small-kernel', Push(shape='', gpus=0))
    wait(hub, done.ref, done.id)
    assert len([p for p in pull(hub, done.ref, tmp_path/'out', r'^f\d+', done.id)]) == 231
    for bad in ('../evil.txt', '/tmp/evil.txt', 'a/../../evil.txt'):
        server.extra_output = [dict(fileName=bad, url=server.url)]
        with pytest.raises(UserError, match='leads out of'): pull(hub, done.ref, tmp_path/'bad')
    assert not (tmp_path/'bad').exists() and not (tmp_path/'evil.txt').exists()


def test_quota_and_ledger(server, hub):
    server.used_s = 12*3600
    q = quota(hub)
    assert (q.used, q.left, q.total) == (12, 18, 30) and q.resets.startswith('Sat 28 Nov')
    note(kernel='me/a', version=1, push='x', state='pushed')
    note(kernel='me/a', version=1, push='x', state='COMPLETE', hours=2.5)
    with open(Path(os.environ['UNDERDOG_HOME'])/'ledger.jsonl', 'a') as f: f.write('{"kernel": "me/b", "ver')   # killed while it was written
    assert [(e['kernel'], e['state'], e['hours']) for e in ledger()] == [('me/a', 'COMPLETE', 2.5)]


# ---- the relay
COUNTER = '''import json, os, time
from pathlib import Path
before = Path(os.environ['UNDERDOG_KAGGLE'])/'input'/resume_from/'status.json'
at = json.loads(before.read_text())['step'] if resume_from else 0
if at == bad: raise ValueError('a bad step')
time.sleep(nap)
Path(out).mkdir()
Path(out, 'status.json').write_text(json.dumps(dict(state='finished' if at + 4 >= 10 else 'paused', step=min(10, at + 4), of=10)))'''
PARAMETERS = "out = 'run'\nresume_from = ''\ntime_limit = -1.0\nnap = 0.0\nbad = -1"


def test_a_relay_whose_laptop_dies_goes_on_from_another(server, hub, tmp_path, monkeypatch):
    k = notebook(tmp_path/'count.ipynb', COUNTER, parameters=PARAMETERS)
    code = 'import sys\nfrom underdog.kaggle.account import Hub\nfrom underdog.kaggle.relay import relay\nfrom underdog.kaggle.push import Push\nrelay(Hub(poll_s=.05, first=.01), "counting", sys.argv[1], dict(nap="1.5"), Push(shape="", gpus=0))'
    first = subprocess.Popen([sys.executable, '-c', code, str(k)], env=server.environment() | dict(UNDERDOG_HOME=str(tmp_path/'laptop')), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    began = time.monotonic()
    while 'me/counting-2' not in server.kernels and time.monotonic() - began < 60: time.sleep(.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    told = []
    last = relay(hub, 'counting', k, None, Push(shape='', gpus=0), say=told.append)   # parameters, sessions: all from Kaggle
    assert last.ref == 'me/counting-3' and [len(server.kernels[f'me/counting-{i}']['versions']) for i in (1, 2, 3)] == [1, 1, 1]
    assert last.expect['values']['nap'] == 1.5
    with pytest.raises(UserError, match="nap=0.5 instead of 1.5"): relay(hub, 'counting', k, dict(nap='0.5'), Push(shape='', gpus=0))


def test_a_failed_session_is_an_error_and_the_same_command_repeats_it(server, hub, tmp_path):
    k = notebook(tmp_path/'count.ipynb', COUNTER, parameters=PARAMETERS)
    for version in (1, 2):
        with pytest.raises(UserError, match=r'session 2 \(me/counting-2\) failed: ValueError: a bad step'): relay(hub, 'counting', k, dict(bad='4'), Push(shape='', gpus=0), say=lambda s: None)
        assert len(server.kernels['me/counting-2']['versions']) == version and len(server.kernels['me/counting-1']['versions']) == 1


def test_a_relay_waits_for_a_slot_and_stops_before_the_quota(server, hub, tmp_path):
    k = notebook(tmp_path/'count.ipynb', COUNTER, parameters=PARAMETERS)
    push(hub, notebook(tmp_path/'other.ipynb', 'import time; time.sleep(3)'), {}, 'other-kernel')
    server.slots, told = 1, []
    def say(text):
        told.append(text)
        if 'session 1: paused' in text: server.used_s = 29.6*3600
    with pytest.raises(Refused, match='it resets Sat 28 Nov') as e: relay(hub, 'counting', k, {}, Push(), hours=5., say=say)
    assert e.value.kind == 'quota' and any('session count' in t for t in told) and 'me/counting-1' in server.kernels
    asked = server.kernels['me/counting-1']['versions'][0]['request']
    assert asked['sessionTimeoutSeconds'] <= 6*3600


def test_hours_never_exceed_what_is_left(hub, server):
    for used in (0, 10, 20, 25, 28):
        server.used_s = used*3600
        assert hours_for(hub, Push(), 11.5) <= 30 - used
    assert hours_for(hub, Push(shape='', gpus=0), 11.5) == 11.5


# ---- security
def test_keys_are_refused_wherever_they_are(server, hub, tmp_path):
    key = 'KGAT_' + '0123456789abcdef'*2
    for cell in (nbformat.v4.new_code_cell(f'token = "{key}"'), nbformat.v4.new_markdown_cell(key), nbformat.v4.new_code_cell('x', outputs=[nbformat.v4.new_output('stream', text=f'signed in with {key}')])):
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('n = 1', metadata=dict(tags=['parameters'])), cell]), tmp_path/'k.ipynb')
        with pytest.raises(UserError, match='looks like a key') as e: push(hub, tmp_path/'k.ipynb', {}, 'small-kernel')
        assert key not in str(e.value)
    d = data(tmp_path/'d')
    for name, content in (('notes.md', f'my token is {key}'), ('kaggle.json', '{}'), ('model.bin', 'x'), ('w.pkl', 'x')):
        (d/name).write_text(content)
        with pytest.raises(UserError) as e: ship(hub, d, 'some-data')
        assert key not in str(e.value)
        (d/name).unlink()
    assert not server.datasets and not server.kernels


def test_every_kernel_of_ours_is_free_of_keys():
    from underdog.kernels import find_kernel
    for name in ('train', 'infer', 'blend', 'sweep', 'wheels'):
        path = find_kernel(name)
        assert find_key(path.read_text()) == '' and pushed_notebook(path, {}, dict(push='x'))


def test_credentials_are_in_no_message(server, monkeypatch, tmp_path):
    monkeypatch.setenv('KAGGLE_KEY', 'very-secret-key-0001')
    hub = Hub(tries=2, first=.01)
    server.fail('GetKernelSessionStatus', 500, 500, 500)
    with pytest.raises(Refused) as e: look(hub, 'me/x')
    assert 'secret' not in str(e.value) and 'secret' not in repr(e.value)
    done = subprocess.run([sys.executable, '-c', 'from underdog.console.main import main; main()', 'status', 'nothing'], env=server.environment() | dict(KAGGLE_KEY='very-secret-key-0001'), capture_output=True, text=True)
    assert done.returncode == 1 and 'secret' not in done.stdout + done.stderr and 'Traceback' not in done.stderr


def test_public_must_be_asked_for_twice(server, tmp_path):
    from typer.testing import CliRunner

    from underdog.console.main import app
    data(tmp_path/'d')
    args = ['bundle', '--folder', str(tmp_path/'d'), '--slug', 'some-data', '--poll', '.05']
    assert 'give --public twice' in str(CliRunner().invoke(app, [*args, '--public']).exception) and not server.datasets
    assert CliRunner().invoke(app, [*args, '--public', '--public']).exit_code == 0 and not server.datasets['me/some-data']['private']


def test_without_credentials_one_line(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith('KAGGLE')} | dict(HOME=str(tmp_path), KAGGLE_API_ENVIRONMENT='LOCALHOST')
    done = subprocess.run([sys.executable, '-c', 'from underdog.console.main import main; main()', 'quota'], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and 'no Kaggle credentials' in done.stderr and 'Traceback' not in done.stderr


# ---- parameters and sources
@pytest.mark.parametrize('values,message', [(dict(train_csv='/home/me/train.csv'), 'a path of this machine'), (dict(train_csv='train.csv'), 'not an input of a kernel'), (dict(model='models/a/b/c/d'), 'VERSION wanted'), (dict(run='~/x'), 'a path of this machine')])
def test_inputs_that_kaggle_cannot_see_are_refused(values, message):
    with pytest.raises(UserError, match=message): Sources.of(inputs_of(values))


def test_unknown_parameters_are_refused_before_anything_is_sent(server, hub, tmp_path):
    with pytest.raises(UserError, match='no parameter'): push(hub, notebook(tmp_path/'k.ipynb'), dict(m='1'), 'small-kernel')
    assert not [p for p, _ in server.seen if p.endswith('SaveKernel')]


def test_newer_clients_are_asked_for_the_exact_version(server, hub, tmp_path):
    "From 2.2.5 on the client sends the version; then no lag can show another one."
    hub.exact = True
    assert hub.version('me/k', 3) == 'me/k/3' and hub.version('me/k', 0) == 'me/k'
    hub.exact = False
    assert hub.version('me/k', 3) == 'me/k'


# ---- no other machine
def test_no_test_reaches_another_machine(tmp_path):
    "In this process, in one that it starts, and in one that stands for a kernel."
    for do in (lambda: socket.getaddrinfo('www.kaggle.com', 443), lambda: socket.gethostbyname('api.kaggle.com'), lambda: socket.create_connection(('93.184.216.34', 80), timeout=1)):
        with pytest.raises(OSError, match='a test wants to reach'): do()
    code = 'import socket\ntry: socket.getaddrinfo("api.kaggle.com", 443)\nexcept OSError as e: print(e)'
    for extra in ({}, dict(UNDERDOG_TEST_KERNEL='1', UNDERDOG_KAGGLE=str(tmp_path))):
        assert 'a test wants to reach' in subprocess.run([sys.executable, '-c', code], env=dict(os.environ, **extra), capture_output=True, text=True).stdout


def test_a_test_kernel_cannot_import_the_checkout(tmp_path):
    done = subprocess.run([sys.executable, '-c', 'import underdog'], env=dict(os.environ, UNDERDOG_TEST_KERNEL='1', UNDERDOG_KAGGLE=str(tmp_path)), capture_output=True, text=True, cwd=tmp_path)
    assert "No module named 'underdog'" in done.stderr


def test_the_commands_push_wait_show_and_pull(server, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from underdog.console.main import app
    monkeypatch.chdir(tmp_path)
    run = lambda *args: CliRunner().invoke(app, list(args))
    assert run('bundle', '--no-wheels', '--poll', '.05').exit_code == 0
    k = notebook(tmp_path/'k.ipynb', 'import underdog\nopen("n.txt", "w").write(str(n))\nassert n < 5, "n is large"')
    push_it = lambda n: run('push', str(k), '-p', f'n={n}', '--slug', 'small-kernel', '--no-wheels', '--wait', '--poll', '.05')
    good, bad = push_it(3), push_it(7)
    assert good.exit_code == 0 and 'version 1 on NvidiaTeslaT4' in good.output
    assert 'error: AssertionError: n is large' in str(bad.exception)
    shown = run('status', 'small-kernel')
    assert shown.exit_code == 0, shown.exception
    said = shown.output
    assert 'ERROR' in said and 'n is large' in said
    assert 'underdog: proved' in run('logs', 'small-kernel').output
    assert [e['state'] for e in ledger()] == ['COMPLETE', 'ERROR'] and run('quota').output.count('small-kernel') == 2
    (tmp_path/'k2.ipynb').write_text(k.read_text())
    assert run('push', str(tmp_path/'k2.ipynb'), '--slug', 'small-kernel', '--no-wheels', '--wait', '--poll', '.05').exit_code == 0 and run('pull', 'small-kernel').exit_code == 0
    assert (tmp_path/'runs'/'small-kernel'/'n.txt').read_text() == '1'
