"From an empty folder to a score, with the real client and a server on this machine that runs what is pushed: the answers are those of one uninterrupted run here."
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

from underdog.data.competition import LMSYS
from underdog.core import build_id, read_json
from underdog.runfolder import RunFolder
from underdog.inference.job import InferConfig
from underdog.session import SessionConfig
from underdog.training.run import train
from underdog.model.model import ModelConfig
from underdog.text.prompt import PromptConfig
from underdog.inference.scored import predict
from underdog.training.settings import TrainConfig

MODEL = 'models/me/tiny/transformers/llama/1'
TRAIN = dict(train_csv='me/tiny-data/train.csv', model=MODEL, quantization='none', rank=4, max_length=128, n_folds=3, lr=1e-2, head_lr=1e-2, batch_rows=8, epochs=2.0, evaluations=1, probe_rows=0, processes=1)
SETTINGS = TrainConfig(n_folds=3, lr=1e-2, head_lr=1e-2, batch_rows=8, epochs=2.0, evaluations=1, probe_rows=0)   # the same
SLUG = LMSYS.slug


def installed_wheel(name, folder, without=()):
    "A wheel of the package that is installed here, made of its own files."
    dist = distribution(name)
    path = folder/f'{name}-{dist.version}-py3-none-any.whl'
    with zipfile.ZipFile(path, 'w') as z:
        for f in dist.files:
            if '..' not in f.parts and '__pycache__' not in f.parts and not any(w in f.name for w in without) and f.name not in ('RECORD', 'INSTALLER', 'REQUESTED', 'direct_url.json'): z.write(f.locate(), str(f))
        z.writestr(f'{name}-{dist.version}.dist-info/RECORD', '')
    return path


@pytest.fixture(scope='module')
def kaggle(world, tmp_path_factory):
    root = tmp_path_factory.mktemp('kaggle')
    server = KaggleServer(root/'server').start()
    server.slots = 3
    (root/'index').mkdir()
    installed_wheel('bitsandbytes', root/'index', without=('bitsandbytes_cuda', 'bitsandbytes_rocm', 'bitsandbytes_xpu'))   # the CPU's library is small
    for part in ('data', 'public', 'hidden', 'empty'): (root/part).mkdir()
    for f in ('train.csv', 'test.csv', 'sample_submission.csv'): shutil.copy(world/f, root/'data'/f)
    test, sample = pd.read_csv(world/'test.csv', dtype=str, keep_default_na=False), pd.read_csv(world/'sample_submission.csv', dtype=str)
    for part, rows in (('public', slice(0, 3)), ('hidden', slice(0, 20))):
        test[rows].to_csv(root/part/'test.csv', index=False)
        sample[rows].to_csv(root/part/'sample_submission.csv', index=False)
    truth = sample.assign(**{c: [float(i % 3 == k) for i in range(20)] for k, c in enumerate(LMSYS.label_columns)})
    truth.to_csv(root/'truth.csv', index=False)
    server.add_competition(SLUG, root/'public', root/'hidden', log_loss_of(root/'truth.csv', LMSYS.label_columns))
    yield server, root
    server.stop()


def underdog(server, root, *args, code=0):
    "The console command in an empty folder; its output."
    env = server.environment() | dict(UNDERDOG_HOME=str(root/'home'), UNDERDOG_CACHE=str(root/'cache'), PIP_NO_INDEX='1', PIP_FIND_LINKS=str(root/'index'), COLUMNS='160')
    done = subprocess.run([sys.executable, '-c', 'from underdog.console.main import main; main()', *map(str, args)], cwd=root/'empty', env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def p_of(values): return [x for k, v in values.items() for x in ('-p', f'{k}={v}')]


def ship_inputs(server, root, world):
    underdog(server, root, 'bundle', '--folder', root/'data', '--slug', 'tiny-data', '--poll', '.1')
    underdog(server, root, 'bundle', '--folder', world/'llama', '--model', 'me/tiny/transformers/llama', '--poll', '.1')


def test_from_an_empty_folder_to_a_score(world, kaggle, tmp_path, monkeypatch):
    server, root = kaggle
    cpu = ['--shape', '', '--poll', '.1']
    said = underdog(server, root, 'bundle', '--poll', '.1')
    assert 'imported' in said and 'underdog-wheels: version 1, sent' in said
    assert 'underdog-lib: version 1, as it was' in underdog(server, root, 'bundle', '--poll', '.1')
    ship_inputs(server, root, world)

    # three sessions, of which the first two are made to stop
    server.stop_at = {'me/tiny-relay-1': 2, 'me/tiny-relay-2': 5}
    server.stale_mounts, server.stale_s = 1, .5
    said = underdog(server, root, 'relay', 'train', '--name', 'tiny-relay', *p_of(TRAIN), '--hours', '1', *cpu)
    assert 'paused, step' in said and 'session 3: finished' in said and 'notebooks/me/tiny-relay-3/run' in said
    sessions = [server.kernels[f'me/tiny-relay-{k}']['versions'][0]['job'] for k in (1, 2, 3)]
    steps = [read_json(j.output/'run'/'status.json') for j in sessions]
    assert [s['state'] for s in steps] == ['paused', 'paused', 'finished'] and 0 < steps[0]['step'] < steps[1]['step'] < steps[2]['of']

    # the run is that of one uninterrupted training on this machine
    monkeypatch.setenv('UNDERDOG_CACHE', str(tmp_path/'cache'))
    base = str(world/'llama')
    here = train(world/'train.csv', ModelConfig(base, quantization='none', rank=4, alpha=16., dropout=0.), tmp_path/'run', PromptConfig(max_length=128), cfg=SETTINGS,
                 session=SessionConfig(processes=1))
    there = RunFolder.open(sessions[2].output/'run')
    assert {f.name: f.read_bytes() for f in here.adapter.glob('*.safetensors')} == {f.name: f.read_bytes() for f in there.adapter.glob('*.safetensors')}
    assert there.config['build_id'] == build_id()
    proof = read_json(sessions[2].output/'underdog.json')
    assert all('/kaggle/input/' in p for p in proof['library'])
    assert (sessions[2].tree/'site'/'bitsandbytes'/'__init__.py').is_file()   # the wheel was installed from the dataset

    # infer and predict
    given = dict(run='notebooks/me/tiny-relay-3/run', test_csv=f'competitions/{SLUG}/test.csv', sample_submission=f'competitions/{SLUG}/sample_submission.csv', base=MODEL)
    said = underdog(server, root, 'submit', '--competition', 'lmsys', *p_of(given), '-m', 'tiny', *cpu)
    assert 'submission.csv is valid, 3 rows' in said and 'CV and leaderboard' in said
    scored = server.submissions[0]['job'].output
    mine = predict(str(here.path), root/'hidden'/'test.csv', tmp_path/'pred', InferConfig(submission=str(tmp_path/'submission.csv')))
    theirs = pd.read_csv(scored/'submission.csv')
    pd.testing.assert_frame_equal(mine, theirs)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path/'pred'/'predictions.parquet')[P], pd.read_parquet(scored/'predictions'/'predictions.parquet')[P])
    assert f"{float(server._submission(server.submissions[0])['publicScore']):.4f}" in said

    # what is left to read
    said = underdog(server, root, 'status')
    assert said.count('COMPLETE') == 4
    said = underdog(server, root, 'pull', 'tiny-relay-3', '--pattern', 'run/(config|status)')
    assert (root/'empty'/'runs'/'tiny-relay-3'/'run'/'status.json').is_file()
    assert 'underdog: done' in underdog(server, root, 'logs', 'tiny-relay-3')
    for text in (said, *(v['request']['text'] for k in server.kernels.values() for v in k['versions'])): assert server.key not in text
    assert all(v['request']['isPrivate'] and not v['request']['enableInternet'] for k in server.kernels.values() for v in k['versions']) and all(d['private'] for d in server.datasets.values())


@slow
def test_push_train_and_push_infer_give_what_they_give_here(world, kaggle, tmp_path, monkeypatch):
    "In one session each, without a relay."
    server, root = kaggle
    cpu = ['--shape', '', '--poll', '.1', '--wait']
    underdog(server, root, 'bundle', '--poll', '.1')
    ship_inputs(server, root, world)
    assert 'underdog-train: version 1' in underdog(server, root, 'push', 'train', *p_of(TRAIN), *cpu)
    underdog(server, root, 'push', 'infer', *p_of(dict(run='notebooks/me/underdog-train/run', test_csv='me/tiny-data/test.csv', sample_submission='me/tiny-data/sample_submission.csv', base=MODEL)), *cpu)
    underdog(server, root, 'pull', 'underdog-infer')
    monkeypatch.setenv('UNDERDOG_CACHE', str(tmp_path/'cache'))
    base = str(world/'llama')
    here = train(world/'train.csv', ModelConfig(base, quantization='none', rank=4, alpha=16., dropout=0.), tmp_path/'run', PromptConfig(max_length=128), cfg=SETTINGS,
                 session=SessionConfig(processes=1))
    mine = predict(str(here.path), world/'test.csv', tmp_path/'pred', InferConfig(submission=str(tmp_path/'submission.csv')))
    pd.testing.assert_frame_equal(mine, pd.read_csv(root/'empty'/'runs'/'underdog-infer'/'submission.csv'))
