"""Kaggle as it really is: it shows what is old, refuses in many ways, keeps what crashed.

Whatever it does, what is submitted is what was validated, and no session is spent twice."""
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from kaggle_server import write_notebook

from underdog.core import UserError, file_hash
from underdog.machine import resolve_input
from underdog.data.competition import LLM_FINETUNING
from underdog.kaggle.access import account_lines
from underdog.kaggle.account import Refused, download
from underdog.kaggle.leaderboard import SubmitConfig, commit_and_submit
from underdog.kaggle.names import Sources, mounted_name
from underdog.kaggle.push import PushConfig, push_kernel
from underdog.kaggle.relay import run_relay
from underdog.kaggle.ship import library_bundle, ship, ship_model
from underdog.kaggle.watch import pull_output, wait_for_kernel
from underdog.kaggle.wheels import kaggle_image, lacking

CPU = PushConfig(shape='', gpus=0)
SLUG = LLM_FINETUNING.slug


def pushes(server): return [path for path, _ in server.seen if path.endswith('/SaveKernel')]


def versions_of(server, slug): return len(server.kernels[f'me/{slug}']['versions'])


@pytest.fixture
def competition(server, tmp_path):
    "Takes submissions; the score is the number of the version that wrote it."
    for part in ('public', 'hidden'):
        (tmp_path/part).mkdir()
        (tmp_path/part/'test.csv').write_text('id\n1\n')
    server.add_competition(SLUG, tmp_path/'public', tmp_path/'hidden', lambda path: float(len(path.read_text())))
    return server


@pytest.fixture
def submitting(tmp_path):
    "A kernel whose submission says `p`."
    columns = ','.join(LLM_FINETUNING.submission_columns)
    cell = f'open("submission.csv", "w").write(f"{columns}\\n1,{{p}},{{.9 - p}},.1\\n")'
    return write_notebook(tmp_path/'submitting.ipynb', cell, parameters='p = 0.5')


# ---- what is read back is old
@pytest.mark.parametrize('lag', [1, 3, 10**6])
def test_the_version_that_the_push_answered_is_validated_and_submitted(competition, hub, submitting, lag):
    "The one before is what Kaggle shows for a while; the answers to both pushes differ."
    server, target = competition, SubmitConfig(SLUG)
    server.readback_lag = lag
    for version, p in ((1, '0.2'), (2, '0.3')):
        commit_and_submit(hub, target, submitting, dict(p=p), 'small-submit', CPU, say=lambda text: None)
        submitted = server.submissions[-1]['job'].version
        assert submitted['number'] == version and f'p = {p}' in submitted['request']['text']
    assert len(pushes(server)) == len(server.submissions) == 2


def test_a_lost_answer_and_a_late_read_back_are_one_push(server, hub, tmp_path):
    kernel = write_notebook(tmp_path/'k.ipynb')
    server.readback_lag = 5
    for version in (1, 2):
        server.fail('SaveKernel', 'after')
        assert push_kernel(hub, kernel, {}, 'small-kernel', settings=CPU).version == version
    assert versions_of(server, 'small-kernel') == 2


def test_the_shape_of_the_last_session_is_a_doubt_not_an_error(server, hub, tmp_path):
    server.session_shape = 'NvidiaL4'
    pushed = push_kernel(hub, write_notebook(tmp_path/'k.ipynb'), {}, 'small-kernel')
    assert 'perhaps that of the last session' in pushed.doubt
    assert server.job(pushed.ref).status == 'COMPLETE' and len(pushes(server)) == 1


def test_a_relay_meets_all_of_it_and_spends_no_session_twice(server, hub, count):
    server.hostile()
    last = run_relay(hub, 'counting', count, {}, say=lambda text: None)
    assert last.number == 3 and [versions_of(server, f'counting-{i}') for i in (1, 2, 3)] == [1, 1, 1]
    # from the ledger the same machine knows what Kaggle does not show yet
    server.kernels['me/counting-3']['readback'] = 3
    assert run_relay(hub, 'counting', count, {}, say=lambda text: None).number == 3
    assert len(pushes(server)) == 3


# ---- submissions
def test_nothing_is_pushed_where_nothing_can_be_submitted(competition, hub, submitting):
    server = competition
    def refused(why):
        with pytest.raises(UserError, match=why):
            commit_and_submit(hub, SubmitConfig(SLUG), submitting, {}, 'small-submit', CPU)
    server.closed = {SLUG}
    refused(f'takes no submissions.*2030-01-01.*kaggle.com/competitions/{SLUG}')
    server.closed, server.no_rules = set(), {SLUG}
    refused(f'rules are not accepted; see https://www.kaggle.com/competitions/{SLUG}/rules')
    server.no_rules, server.max_total = set(), 0
    refused('no day brings a new one')
    server.max_total, server.max_daily = 100, 0
    refused('works after 00:00 UTC')
    assert not pushes(server) and not server.submissions


def test_a_submission_whose_answer_is_lost_is_made_once(competition, hub, submitting):
    competition.fail('CreateCodeSubmission', 'after')
    scored, _, _ = commit_and_submit(hub, SubmitConfig(SLUG), submitting, {}, 'small-submit', CPU)
    assert len(competition.submissions) == 1 and scored.public_score
    # one that did not arrive is not made again either: it is said, and nothing is spent
    competition.fail('CreateCodeSubmission', 503)
    with pytest.raises(UserError, match='a submission whose answer was lost'):
        commit_and_submit(hub, SubmitConfig(SLUG), submitting, {}, 'small-submit', CPU)
    assert len(competition.submissions) == 1


# ---- downloads
def test_what_is_compressed_on_its_way_arrives_whole(server, hub, tmp_path):
    server.gzip = True
    (server.root/'rows.csv').write_text('a,b\n'*1000)
    for _ in range(2): download(hub, f'{server.url}/files/rows.csv', tmp_path/'rows.csv')
    assert (tmp_path/'rows.csv').read_text() == 'a,b\n'*1000


# ---- what crashed
CRASHES = '''import json, os, shutil
from pathlib import Path
run, source = Path(out), Path(os.environ['UNDERDOG_KAGGLE'])/'input'/resume_from
if resume_from: shutil.copytree(source, run)
else: (run/'checkpoint').mkdir(parents=True)
step = json.loads((run/'status.json').read_text())['step'] if resume_from else 0
(run/'config.json').write_text('{}')
for step in range(step + 1, 11):
    status = dict(state='finished' if step == 10 else 'running', step=step, of=10)
    (run/'status.json').write_text(json.dumps(status))
    for kind in ('pt', 'json'): (run/'checkpoint'/f'step-{step:08d}.{kind}').write_text(str(step))
    if step == dies and how == 'killed':
        os.killpg(os.getpgid(os.getppid()), 9)
        os.kill(os.getpid(), 9)   # this process is in a group of its own and would go on
    if step == dies and how == 'raises': raise MemoryError('in step 5')'''


@pytest.mark.parametrize('how', ['killed', 'raises'])
def test_a_crashed_session_goes_on_from_its_checkpoint(server, hub, tmp_path, how):
    "It becomes a dataset, as its output cannot be mounted: at once where Kaggle stopped it, else on the next command."
    parameters = "out = 'run'\nresume_from = ''\ntime_limit = -1.0\ndies = 4\nhow = ''"
    kernel, messages = write_notebook(tmp_path/'crashes.ipynb', CRASHES, parameters=parameters), []
    relay = lambda: run_relay(hub, 'crashing', kernel, dict(how=how), CPU, say=messages.append)
    if how == 'raises':
        again = 'MemoryError.*the same command goes on from its checkpoint of step 4'
        with pytest.raises(UserError, match=again): relay()
    last = relay()
    assert any('step 4' in message for message in messages), messages
    assert last.ref == 'me/crashing-2' and server.datasets['me/crashing-checkpoint']['private']
    assert last.expect['values']['resume_from'] == 'datasets/me/crashing-checkpoint/run'
    with zipfile.ZipFile(server.job(last.ref).output/'run.zip') as z: saved = z.namelist()
    assert len([name for name in saved if name.endswith('.pt')]) == 10 and len(pushes(server)) == 2, messages


def test_a_kaggle_that_does_not_answer_costs_no_checkpoint(server, hub, tmp_path):
    "What was saved is unknown then; the session is not begun anew from its old start."
    parameters = "out = 'run'\nresume_from = ''\ntime_limit = -1.0\ndies = 4\nhow = 'killed'"
    kernel = write_notebook(tmp_path/'crashes.ipynb', CRASHES, parameters=parameters)
    def say(text):
        if 'cancel' in text: server.fail('ListKernelSessionOutput', *[503]*50)
    with pytest.raises(Refused, match='does not answer'): run_relay(hub, 'crashing', kernel, {}, CPU, say=say)
    assert len(pushes(server)) == 1
    server.faults.clear()
    assert run_relay(hub, 'crashing', kernel, {}, CPU, say=lambda text: None).ref == 'me/crashing-2'


# ---- archives
MANY = '''from pathlib import Path
Path('run/sub').mkdir(parents=True)
for i in range(30): Path('run/sub', f'{i}.txt').write_text(str(i))
Path('run/status.json').write_text('{}')'''


@pytest.mark.parametrize('zip_mounts', [None, 0])
def test_many_files_travel_as_one_and_are_found(server, hub, tmp_path, zip_mounts):
    "Packed by the last cell, perhaps once more by Kaggle; a kernel, the first cell's proof and `pull` find them."
    server.zip_mounts, server.gzip = zip_mounts, True
    pushed = push_kernel(hub, write_notebook(tmp_path/'many.ipynb', MANY), {}, 'many-files', settings=CPU)
    assert wait_for_kernel(hub, pushed.ref, pushed.id).status == 'COMPLETE'
    assert len(list(server.job(pushed.ref).output.rglob('*'))) == 3, 'the archive, the proof and the notebook'
    # here
    pull_output(hub, pushed.ref, tmp_path/'out', '^run/')
    assert (tmp_path/'out'/'run'/'sub'/'29.txt').read_text() == '29' and not (tmp_path/'out'/'run.zip').exists()
    # there
    library_bundle(tmp_path/'lib')
    library, status = ship(hub, tmp_path/'lib', 'underdog-lib'), f'notebooks/{pushed.ref}/run/status.json'
    cell = """from underdog.machine import resolve_input
assert (resolve_input(run)/'sub'/'29.txt').read_text() == '29'"""
    reader = write_notebook(tmp_path/'reader.ipynb', cell, parameters='run = ""')
    files = {status: file_hash(tmp_path/'out'/'run'/'status.json')}
    settings = replace(CPU, bundles={library.ref: library.hash}, library=library.ref, files=files, wait_s=1.)
    given = dict(run=f'notebooks/{pushed.ref}/run')
    job = server.job(push_kernel(hub, reader, given, 'reading', settings=settings).ref)
    assert job.status == 'COMPLETE', job.events[-5:]


@pytest.mark.parametrize('named', [True, False])
def test_an_input_is_found_in_any_archive(tmp_path, monkeypatch, named):
    "Of a dataset's folder, with and without that folder in it; unpacked once."
    monkeypatch.setenv('UNDERDOG_CACHE', str(tmp_path/'cache'))
    inner = tmp_path/'files'/'run' if named else tmp_path/'files'
    inner.mkdir(parents=True)
    (inner/'config.json').write_text('{}')
    root = tmp_path/'input'
    shutil.make_archive(str(root/'datasets'/'me'/'runs'/'run'), 'zip', tmp_path/'files')
    for spec in ('me/runs/run', 'datasets/me/runs/run', 'runs/run'):
        assert (resolve_input(spec, root)/'config.json').is_file()
    assert resolve_input('me/runs/run', root) == resolve_input('runs/run', root)
    (root/'datasets'/'me'/'runs'/'bad.zip').write_text('no archive')
    with pytest.raises(UserError, match='archive that is broken'): resolve_input('me/runs/bad', root)
    with pytest.raises(UserError, match='no such file'): resolve_input('me/runs/other', root)
    with zipfile.ZipFile(root/'datasets'/'me'/'runs'/'run.zip') as z: assert z.testzip() is None


# ---- refusals
@pytest.fixture
def model(server, hub, tmp_path):
    "A model on Kaggle, as a kernel names it."
    (tmp_path/'model').mkdir()
    for name in ('config.json', 'model.safetensors'): (tmp_path/'model'/name).write_text('{}'*len(name))
    return ship_model(hub, tmp_path/'model', 'me/gemma/transformers/2b').ref


@pytest.mark.parametrize('knob,value,kind,page', [
    ('no_licence', {'me/gemma'}, 'licence', 'accept its licence on https://www.kaggle.com/models/me/gemma'),
    ('no_rules', {SLUG}, 'rules', f'accept its rules on https://www.kaggle.com/competitions/{SLUG}/rules'),
    ('phone', False, 'unverified', 'confirm your phone number on https://www.kaggle.com/settings'),
])
def test_refusals_are_told_apart_and_name_their_page(competition, hub, model, tmp_path, knob, value, kind, page):
    kernel = write_notebook(tmp_path/'k.ipynb')
    setattr(competition, knob, value)
    settings = PushConfig(sources=(f'models/{model}', f'competitions/{SLUG}/train.csv'))
    with pytest.raises(Refused, match=page) as e: push_kernel(hub, kernel, {}, 'small-kernel', settings=settings)
    assert e.value.kind == kind and not competition.kernels
    # a check says the same
    levels = {line.what: line.level for line in account_lines(hub, SLUG, [model])}
    what = dict(licence=f'model {model}', rules='rules').get(kind)
    assert [w for w, level in levels.items() if level == 'fail'] == ([what] if what else [])


def test_a_model_that_is_left_out_all_the_same_is_named_with_its_page(server, hub, model, tmp_path):
    "invalidModelSources: the client does not even print them."
    server.drop_models = True
    settings = replace(CPU, sources=(f'models/{model}',), wait_s=.2)
    with pytest.raises(UserError, match=f'left out {model}.*https://www.kaggle.com/models/me/gemma'):
        push_kernel(hub, write_notebook(tmp_path/'k.ipynb'), {}, 'small-kernel', settings=settings)


def test_no_session_is_asked_for_that_is_longer_than_kaggle_s(server, hub, tmp_path, count):
    server.max_timeout_s, messages = 12*3600, []
    run_relay(hub, 'counting', count, {}, hours=20., say=messages.append)
    asked = [body['sessionTimeoutSeconds'] for path, body in server.seen if path.endswith('/SaveKernel')]
    assert len(asked) == 3 and max(asked) <= 12*3600
    assert messages[0] == '20 hours: Kaggle ends a session after 12; 11.5 are taken'
    with pytest.raises(UserError, match='Kaggle ends one after 12'): PushConfig(timeout_s=13*3600)
    for hours in ('13', '0'):
        with pytest.raises(UserError, match='Kaggle kills a session after 12'):
            push_kernel(hub, count, dict(time_limit=hours), 'small-kernel', settings=CPU)
    # one that is refused all the same
    server.max_timeout_s = 3600
    with pytest.raises(Refused, match='give it fewer hours') as e:
        push_kernel(hub, count, {}, 'small-kernel', settings=replace(CPU, timeout_s=7200))
    assert e.value.kind == 'too_long'


def test_models_as_the_site_spells_them(server, hub, model, tmp_path):
    kernel = write_notebook(tmp_path/'k.ipynb', parameters='model = ""')
    site = f'https://www.kaggle.com/models/me/gemma/Transformers/2b/{model[-1]}'
    pushed = push_kernel(hub, kernel, dict(model=site), 'small-kernel', settings=CPU)
    assert pushed.expect['values']['model'] == f'models/{model}' == mounted_name(model.replace('tr', 'Tr'))
    assert server.job(pushed.ref).status == 'COMPLETE'
    with pytest.raises(UserError, match='no official DeBERTa.*bundle --folder'):
        Sources.of(['microsoft/deberta-v3-large'])


# ---- the client
def test_the_client_that_was_asked_for_is_tested(hub):
    "`make test-kaggle` runs these tests with both: what they can do is seen by signature, not by number."
    import inspect
    import kaggle
    client = os.environ.get('UNDERDOG_KAGGLE_CLIENT')
    if client: assert Path(kaggle.__file__).is_relative_to(client)
    assert hub.exact == ('poll_interval' in inspect.signature(hub.api.competition_submit_cli).parameters)


# ---- signing in
@pytest.mark.parametrize('place', ['KAGGLE_API_TOKEN', 'access_token', 'access_token.txt', 'kaggle.json'])
def test_every_way_to_sign_in(server, place):
    "In processes of their own: the client decides at its import where it looks."
    token = 'KGAT_of_this_test'
    env = {name: value for name, value in server.environment().items() if name not in ('KAGGLE_USERNAME', 'KAGGLE_KEY')}
    secret = json.dumps(dict(username='me', key='x')) if place == 'kaggle.json' else token
    if place == 'KAGGLE_API_TOKEN': env[place] = token
    else: (server.root/'home'/'.kaggle'/place).write_text(secret)
    code = 'from underdog.console.main import main; main()'
    command = [sys.executable, '-c', code, 'check-account', '--competition', '', '--json']
    ask = lambda: subprocess.run(command, env=env, capture_output=True, text=True)
    # a token that is not valid, or not any more, and one that is
    if place != 'kaggle.json': assert 'no Kaggle credentials' in ask().stderr
    server.tokens = {token: 'me'}
    done = ask()
    assert done.returncode == 0, done.stderr
    assert [line['says'].split()[0] for line in json.loads(done.stdout)] == ['me', '30.0']


def test_the_command_asks_and_a_red_line_is_an_error(competition, monkeypatch):
    from typer.testing import CliRunner

    from underdog.console.main import app
    ask = lambda: CliRunner().invoke(app, ['check-account', '--competition', SLUG, '--json'])
    good = ask()
    assert good.exit_code == 0 and {line['level'] for line in json.loads(good.output)} == {'ok'}
    competition.no_rules, competition.max_daily = {SLUG}, 0
    bad = ask()
    levels = {line['what']: line['level'] for line in json.loads(bad.output)}
    assert levels['rules'] == 'fail' and levels['left today'] == 'warn'
    assert isinstance(bad.exception, UserError) and 'not ready: rules' in str(bad.exception)


# ---- the next image
@pytest.mark.parametrize('which,python,torch', [('current', '3.12', '2.10.0'), ('next', '3.13', '2.11.0')])
def test_both_images_hold_all_but_bitsandbytes(which, python, torch):
    "What the library requires is met; of the rest wheels are made, for that Python."
    image = kaggle_image(which)
    settings = (Path(__file__).parents[1]/'settings.ini').read_text()
    requirements = next(line for line in settings.splitlines() if line.startswith('requirements')).split('=', 1)[1]
    assert (image.python, image.packages['torch']) == (python, torch) and image.recorded >= '2026-11-24'
    assert [r.name for r in lacking(requirements.split(), image)] == ['bitsandbytes']
