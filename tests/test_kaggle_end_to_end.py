"""From an empty folder to a score, with the real client and a server on this machine that runs what is pushed.

The answers are those of one uninterrupted run here."""
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution

import pandas as pd
import pytest
from conftest import slow
from kaggle_server import KaggleServer, log_loss_of
from test_pipeline import P

from underdog.core import build_id, read_json
from underdog.session import SessionConfig
from underdog.runfolder import RunFolder
from underdog.data.competition import LMSYS
from underdog.text.prompt import PromptConfig
from underdog.model.settings import ModelConfig
from underdog.training.run import train
from underdog.training.settings import TrainConfig
from underdog.inference.settings import InferConfig
from underdog.inference.scored import predict

MODEL = 'models/me/tiny/transformers/llama/1'
# kernel parameters, and the same as configs
TRAIN = dict(
    train_csv='me/tiny-data/train.csv', model=MODEL, quantization='none', rank=4, max_length=128, n_folds=3, lr=1e-2,
    head_lr=1e-2, batch_rows=8, epochs=2.0, evaluations=1, probe_rows=0, processes=1)
SETTINGS = TrainConfig(n_folds=3, lr=1e-2, head_lr=1e-2, batch_rows=8, epochs=2.0, evaluations=1, probe_rows=0)
SLUG = LMSYS.slug


def train_here(world, out):
    "The run of one uninterrupted training on this machine."
    model = ModelConfig(str(world/'llama'), quantization='none', rank=4, alpha=16., dropout=0.)
    prompt, session = PromptConfig(max_length=128), SessionConfig(processes=1)
    return train(world/'train.csv', model, out, prompt, cfg=SETTINGS, session=session)


def predict_here(run, test_csv, folder):
    cfg = InferConfig(submission=str(folder/'submission.csv'))
    return predict(str(run.path), test_csv, folder/'pred', cfg)


def installed_wheel(name, folder, without=()):
    "A wheel of the package that is installed here, made of its own files."
    dist = distribution(name)
    left_out = ('RECORD', 'INSTALLER', 'REQUESTED', 'direct_url.json')
    path = folder/f'{name}-{dist.version}-py3-none-any.whl'
    with zipfile.ZipFile(path, 'w') as z:
        for f in dist.files:
            if '..' in f.parts or '__pycache__' in f.parts or f.name in left_out: continue
            if not any(word in f.name for word in without): z.write(f.locate(), str(f))
        z.writestr(f'{name}-{dist.version}.dist-info/RECORD', '')
    return path


def wheel_for_gpus(folder):
    "Stands for Liger's: it goes along, and cannot be tried here, as its triton is only in Kaggle's image."
    info = 'liger_kernel-0.8.5.dist-info'
    with zipfile.ZipFile(folder/'liger_kernel-0.8.5-py3-none-any.whl', 'w') as z:
        z.writestr('liger_kernel/__init__.py', 'import triton\n')
        z.writestr(f'{info}/METADATA',
                   'Metadata-Version: 2.1\nName: liger_kernel\nVersion: 0.8.5\nRequires-Dist: triton\n')
        z.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr(f'{info}/RECORD', '')


@pytest.fixture(scope='module')
def kaggle(world, tmp_path_factory):
    root = tmp_path_factory.mktemp('kaggle')
    server = KaggleServer(root/'server').start()
    server.slots = 3
    # pip's index; of bitsandbytes only the CPU's library, which is small
    (root/'index').mkdir()
    other = ('bitsandbytes_cuda', 'bitsandbytes_rocm', 'bitsandbytes_xpu')
    installed_wheel('bitsandbytes', root/'index', without=other)
    wheel_for_gpus(root/'index')
    # the competition: three public rows, all in the scored run
    for part in ('data', 'public', 'hidden', 'empty'): (root/part).mkdir()
    for f in ('train.csv', 'test.csv', 'sample_submission.csv'): shutil.copy(world/f, root/'data'/f)
    test = pd.read_csv(world/'test.csv', dtype=str, keep_default_na=False)
    sample = pd.read_csv(world/'sample_submission.csv', dtype=str)
    for part, rows in (('public', slice(0, 3)), ('hidden', slice(0, 20))):
        test[rows].to_csv(root/part/'test.csv', index=False)
        sample[rows].to_csv(root/part/'sample_submission.csv', index=False)
    truth = {c: [float(i % 3 == k) for i in range(20)] for k, c in enumerate(LMSYS.label_columns)}
    sample.assign(**truth).to_csv(root/'truth.csv', index=False)
    score_of = log_loss_of(root/'truth.csv', LMSYS.label_columns)
    server.add_competition(SLUG, root/'public', root/'hidden', score_of)
    yield server, root
    server.stop()


def underdog(server, root, *args, code=0):
    "The console command in an empty folder; its output."
    env = server.environment() | {
        'UNDERDOG_HOME': str(root/'home'),
        'UNDERDOG_CACHE': str(root/'cache'),
        'PIP_NO_INDEX': '1',
        'PIP_FIND_LINKS': str(root/'index'),
        'COLUMNS': '160',
    }
    command = [sys.executable, '-c', 'from underdog.console.main import main; main()', *map(str, args)]
    done = subprocess.run(command, cwd=root/'empty', env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def unpacked(job, place):
    "A copy of what a session wrote, its folders of many files unpacked; their path."
    shutil.copytree(job.output, place)
    for archive in place.glob('*.zip'):
        with zipfile.ZipFile(archive) as z: z.extractall(archive.with_suffix(''))
    return place


def p_of(values): return [x for k, v in values.items() for x in ('-p', f'{k}={v}')]


def ship_inputs(server, root, world):
    underdog(server, root, 'bundle', '--folder', root/'data', '--slug', 'tiny-data', '--poll', '.1')
    underdog(server, root, 'bundle', '--folder', world/'llama', '--model', 'me/tiny/transformers/llama', '--poll', '.1')


@slow
def test_from_an_empty_folder_to_a_score(world, kaggle, tmp_path, monkeypatch):
    server, root = kaggle
    cpu = ['--shape', '', '--poll', '.1']
    output = underdog(server, root, 'bundle', '--poll', '.1')
    assert 'imported' in output and 'triton is not installed here' in output
    assert 'underdog-wheels: version 1, sent' in output
    assert 'underdog-lib: version 1, as it was' in underdog(server, root, 'bundle', '--poll', '.1')
    ship_inputs(server, root, world)

    # three sessions, of which the first two are made to stop
    server.stop_at = {'me/tiny-relay-1': 2, 'me/tiny-relay-2': 5}
    server.stale_mounts, server.stale_s = 1, .5
    output = underdog(server, root, 'relay', 'train', '--name', 'tiny-relay', *p_of(TRAIN), '--hours', '1', *cpu)
    assert 'paused, step' in output and 'session 3: finished' in output and 'notebooks/me/tiny-relay-3/run' in output
    sessions = [server.job(f'me/tiny-relay-{k}') for k in (1, 2, 3)]
    outputs = [unpacked(job, tmp_path/f'session{k}') for k, job in enumerate(sessions)]
    steps = [read_json(output/'run'/'status.json') for output in outputs]
    assert [status['state'] for status in steps] == ['paused', 'paused', 'finished']
    assert 0 < steps[0]['step'] < steps[1]['step'] < steps[2]['of']

    # the run is that of one uninterrupted training on this machine
    monkeypatch.setenv('UNDERDOG_CACHE', str(tmp_path/'cache'))
    here = train_here(world, tmp_path/'run')
    there = RunFolder.open(outputs[2]/'run')
    weights = lambda run: {f.name: f.read_bytes() for f in run.adapter.glob('*.safetensors')}
    assert weights(here) == weights(there)
    assert there.config['build_id'] == build_id()
    proof = read_json(sessions[2].output/'underdog.json')
    assert all('/kaggle/input/' in path for path in proof['library'])
    wheel = sessions[2].tree/'site'/'bitsandbytes'
    assert (wheel/'__init__.py').is_file(), 'the wheel was installed from the dataset'

    # infer and predict
    given = dict(run='notebooks/me/tiny-relay-3/run', test_csv=f'competitions/{SLUG}/test.csv',
                 sample_submission=f'competitions/{SLUG}/sample_submission.csv', base=MODEL)
    output = underdog(server, root, 'submit', '--competition', 'lmsys', *p_of(given), '-m', 'tiny', *cpu)
    assert 'submission.csv is valid, 3 rows' in output and 'CV and leaderboard' in output
    scored = server.submissions[0]['job'].output
    submission = predict_here(here, root/'hidden'/'test.csv', tmp_path)
    pd.testing.assert_frame_equal(submission, pd.read_csv(scored/'submission.csv'))
    predictions = lambda folder: pd.read_parquet(folder/'predictions.parquet')[P]
    pd.testing.assert_frame_equal(predictions(tmp_path/'pred'), predictions(scored/'predictions'))
    score = server._submission(server.submissions[0])['publicScore']
    assert f'{float(score):.4f}' in output

    # what is left to read
    output = underdog(server, root, 'status')
    assert output.count('COMPLETE') == 4
    output = underdog(server, root, 'pull', 'tiny-relay-3', '--pattern', 'run/(config|status)')
    assert (root/'empty'/'runs'/'tiny-relay-3'/'run'/'status.json').is_file()
    assert 'underdog: done' in underdog(server, root, 'logs', 'tiny-relay-3')

    # nothing was shown or sent that must not be
    requests = [version['request'] for kernel in server.kernels.values() for version in kernel['versions']]
    for text in (output, *(request['text'] for request in requests)): assert server.key not in text
    assert all(request['isPrivate'] and not request['enableInternet'] for request in requests)
    assert all(dataset['private'] for dataset in server.datasets.values())


@slow
def test_push_train_and_push_infer_give_what_they_give_here(world, kaggle, tmp_path, monkeypatch):
    "In one session each, without a relay."
    server, root = kaggle
    cpu = ['--shape', '', '--poll', '.1', '--wait']
    underdog(server, root, 'bundle', '--poll', '.1')
    ship_inputs(server, root, world)
    assert 'underdog-train: version 1' in underdog(server, root, 'push', 'train', *p_of(TRAIN), *cpu)
    given = dict(run='notebooks/me/underdog-train/run', test_csv='me/tiny-data/test.csv',
                 sample_submission='me/tiny-data/sample_submission.csv', base=MODEL)
    underdog(server, root, 'push', 'infer', *p_of(given), *cpu)
    underdog(server, root, 'pull', 'underdog-infer')
    monkeypatch.setenv('UNDERDOG_CACHE', str(tmp_path/'cache'))
    submission = predict_here(train_here(world, tmp_path/'run'), world/'test.csv', tmp_path)
    pd.testing.assert_frame_equal(submission, pd.read_csv(root/'empty'/'runs'/'underdog-infer'/'submission.csv'))
