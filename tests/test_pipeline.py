"The whole job with tiny models: kernels under papermill, precisions, heads, one and two processes, bad runs."
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import slow
from fixtures import predictions, small_run

from underdog.data.submission import check_submission
from underdog.data.competition import LMSYS
from underdog.core import UserError, read_json, write_json
from underdog.runfolder import RunFolder, columns
from underdog.data.folds import swap_probs, swap_rows
from underdog.data.rows import read_rows, write_rows
from underdog.inference.job import check_run
from underdog.inference.settings import InferConfig
from underdog.kernels import find_kernel, kernel_parameters, run_kernel
from underdog.training.run import train
from underdog.training.worker import same_everywhere
from underdog.model.settings import ModelConfig
from underdog.text.prompt import PromptConfig, Prompter

P = ['p_a', 'p_b', 'p_tie']


def probabilities(table, prefix='p'): return table[[f'{prefix}_{c}' for c in LMSYS.classes]].to_numpy()


def test_kernels_from_train_csv_to_submission(world, tmp_path):
    "train, infer and blend run under papermill; the submission is valid and the report is one self-contained page."
    sample = world/'sample_submission.csv'
    run_kernel('train', dict(
        train_csv=str(world/'train.csv'),
        model=str(world/'llama'),
        out=str(tmp_path/'run'),
        max_length='128',
        n_folds='3',
        rank='4',
        lr='1e-3',
    ), tmp_path)
    run_kernel('infer', dict(
        run=str(tmp_path/'run'),
        test_csv=str(world/'test.csv'),
        out=str(tmp_path/'pred'),
    ), tmp_path)
    done = run_kernel('blend', dict(
        runs=str(tmp_path/'run'),
        predictions=str(tmp_path/'pred'),
        sample_submission=str(sample),
        out=str(tmp_path),
    ), tmp_path)
    assert done == tmp_path/'blend.ipynb'
    assert check_submission(tmp_path/'submission.csv', LMSYS, sample) == 20
    page = (tmp_path/'report.html').read_text()
    assert page.count('data:image/png') >= 6 and 'src="http' not in page
    scores = read_json(tmp_path/'scores.json')
    assert set(scores) >= {'prior', 'length', 'tfidf', 'model', 'tta', 'blend', 'rows'}
    run = RunFolder.open(tmp_path/'run')
    assert run.status['state'] == 'finished'
    assert run.config['train']['lr'] == 1e-3
    assert run.config['model']['quantization'] == 'nf4'
    for name in ('train', 'infer', 'blend'):
        cells = nbformat.read(tmp_path/f'{name}.ipynb', 4).cells
        outputs = [o for cell in cells for o in cell.get('outputs', [])]
        assert not any(o.output_type == 'error' for o in outputs)
        assert any('image/png' in o.get('data', {}) for o in outputs)   # figures are seen, not named


@pytest.mark.parametrize('family,head,quantization,orders,start', [
    pytest.param('llama', 'joint', 'int8', 'both', 'none', marks=slow),
    pytest.param('bert', 'joint', 'none', 'random', 'floors', marks=slow),
    pytest.param('deberta', 'pair', 'none', 'random', 'none', marks=slow),
])
def test_precisions_heads_and_backbones_train_and_obey_the_law_of_tta(
    world, tmp_path, family, head, quantization, orders, start,
):
    "Every kind of run trains; predictions of the exchanged test file are the exchanged predictions."
    run = small_run(world, tmp_path/'run', family, head, quantization, orders=orders, start=start)
    metrics = run.metrics()
    assert np.isfinite(metrics['loss'].dropna()).all() and (metrics['grad_norm'].dropna() > 0).all()
    rows, _ = read_rows(world/'test.csv', labelled=False)
    write_rows(tmp_path/'swapped.csv', swap_rows(rows), LMSYS)
    there = predictions(run.path, world/'test.csv', tmp_path/'o1')
    back = predictions(run.path, tmp_path/'swapped.csv', tmp_path/'o2')
    assert there['id'].tolist() == rows['id'].tolist()
    # int8 rounds by the largest value of a batch, which depends on the order
    tolerance = 2e-2 if quantization == 'int8' else 1e-5
    np.testing.assert_allclose(probabilities(there), swap_probs(probabilities(back)), atol=tolerance)
    np.testing.assert_allclose(probabilities(there).sum(1), 1)


def test_two_processes_make_the_run_of_one(world, finished, tmp_path):
    """Under gloo with two processes, losses and held-out predictions equal those of a single process: rows are
    weighted, not batches."""
    one, two = finished, small_run(world, tmp_path/'run', session=dict(processes=2))
    np.testing.assert_allclose(one.metrics()['loss'].dropna(), two.metrics()['loss'].dropna(), atol=2e-4)
    np.testing.assert_allclose(pd.read_parquet(one.oof_file)[P], pd.read_parquet(two.oof_file)[P], atol=2e-3)
    assert '2 process(es)' in (two.path/'train.log').read_text()


@slow
def test_two_machines_make_the_run_of_one(world, finished, tmp_path):
    """The same command with its own run folder on each of two machines (here: twice on loopback) meets by rendezvous;
    both folders hold the whole run."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        meet = f'127.0.0.1:{s.getsockname()[1]}'
    session = dict(machines=2, rendezvous=meet)
    with ThreadPoolExecutor() as pool:
        one, two = pool.map(lambda n: small_run(world, tmp_path/f'machine{n}', session=session), (1, 2))
    for run in (one, two):
        np.testing.assert_allclose(finished.metrics()['loss'].dropna(), run.metrics()['loss'].dropna(), atol=2e-4)
        np.testing.assert_allclose(pd.read_parquet(finished.oof_file)[P], pd.read_parquet(run.oof_file)[P], atol=2e-3)
        assert run.status['state'] == 'finished' and '2 process(es)' in (run.path/'train.log').read_text()
    weights = [{f.name: f.read_bytes() for f in run.adapter.glob('*.safetensors')} for run in (one, two)]
    assert weights[0] and weights[0] == weights[1]


def test_machines_with_different_settings_are_refused(world, finished, tmp_path):
    other = dict(finished.config, train=finished.config['train'] | dict(lr=.5), base_hash='another')
    same_everywhere([finished.config, finished.config])
    with pytest.raises(UserError, match='do not train the same: base_hash, lr differ'):
        same_everywhere([finished.config, other])
    with pytest.raises(UserError, match='10.0.0.5:29500'):
        small_run(world, tmp_path/'run', session=dict(machines=2))


@slow
def test_little_memory_makes_the_same_run(world, finished, tmp_path):
    "What is computed twice changes no number; smaller batches, which little memory asks for too, only by rounding."
    twice = small_run(world, tmp_path/'twice', checkpointing='all')
    assert finished.metrics()['loss'].dropna().tolist() == twice.metrics()['loss'].dropna().tolist()
    pd.testing.assert_frame_equal(pd.read_parquet(finished.oof_file), pd.read_parquet(twice.oof_file))
    tight = small_run(world, tmp_path/'run', activation_gb=1e-6)
    assert 'computed twice (' in (tight.path/'train.log').read_text()
    assert 'no layer is computed twice' in (finished.path/'train.log').read_text()
    np.testing.assert_allclose(finished.metrics()['loss'].dropna(), tight.metrics()['loss'].dropna(), atol=2e-4)
    np.testing.assert_allclose(pd.read_parquet(finished.oof_file)[P], pd.read_parquet(tight.oof_file)[P], atol=2e-3)


def test_training_from_the_floors_begins_at_the_floor_and_infers_with_it(world, tmp_path):
    """The first loss is that of the best floor on the first rows; held-out rows predicted as a test file give the
    held-out probabilities."""
    # no probe: it would begin elsewhere
    run = small_run(world, tmp_path/'run', quantization='nf4', start='floors', probe_rows=0)
    rows, best = pd.read_parquet(run.path/'rows.parquet'), run.config['best_floor']
    from underdog.training.schedule import row_order, split_steps
    first = np.flatnonzero(~rows['held'])[split_steps(row_order((~rows['held']).sum(), 1, 0), 8)[0]]
    y, p = (rows.iloc[first][columns(x, LMSYS)].to_numpy() for x in ('y', f'floor_{best}'))
    assert run.metrics()['loss'].iloc[0] == pytest.approx(-(y*np.log(p)).sum(1).mean(), abs=2e-2)
    df, _ = read_rows(world/'train.csv')
    held = df[rows['held'].to_numpy()].reset_index(drop=True)
    write_rows(tmp_path/'held.csv', held, LMSYS)
    oof = pd.read_parquet(run.oof_file).set_index('id').loc[held['id']]
    predicted = predictions(run.path, tmp_path/'held.csv', tmp_path/'out')
    np.testing.assert_allclose(probabilities(predicted), oof[P], atol=1e-4)


def test_training_ids_are_inference_ids(world):
    "The tokens that training stored for a row are those that a prompter rebuilt from the run's config makes."
    df, _ = read_rows(world/'train.csv')
    labelled, bare = (Prompter(PromptConfig(max_length=128), str(world/'llama')) for _ in range(2))
    unlabelled = df.drop(columns=list(LMSYS.classes))
    for i in range(len(df)): assert labelled.segments(df.iloc[i]) == bare.segments(unlabelled.iloc[i])


@pytest.mark.parametrize('change,message', [
    (dict(template_hash='x'), 'template'),
    (dict(base_hash='x'), 'not the base model'),
])
def test_a_run_of_another_template_or_base_is_refused(finished, change, message):
    config = finished.config
    write_json(finished.config_file, config | change)
    try:
        with pytest.raises(UserError, match=message): check_run(RunFolder.open(finished.path), InferConfig())
    finally: write_json(finished.config_file, config)


def test_another_base_costs_the_model_and_not_the_submission(world, finished, tmp_path):
    "The baselines answer at once; that no model did so is an error in the end, with its reason."
    folder = shutil.copytree(finished.path, tmp_path/'run')
    write_json(folder/'config.json', finished.config | dict(base_hash='x'))
    with pytest.raises(UserError, match='not the base model of this run'):
        predictions(folder, world/'test.csv', tmp_path/'out')
    assert check_submission(tmp_path/'out'/'submission.csv', LMSYS, world/'sample_submission.csv') == 20


def test_bad_input_stops_before_the_subprocess(world, finished, tmp_path):
    with pytest.raises(UserError, match='no such file'): predictions(finished.path, tmp_path/'none.csv', tmp_path/'out')
    with pytest.raises(UserError, match='not a run folder'): predictions(world, world/'test.csv', tmp_path/'out')
    llama = ModelConfig(str(world/'llama'), quantization='none')
    with pytest.raises(UserError, match='winner_'): train(world/'test.csv', llama, tmp_path/'run')
    (tmp_path/'empty').mkdir()
    no_model = ModelConfig(str(tmp_path/'empty'), quantization='none')
    with pytest.raises(UserError): train(world/'train.csv', no_model, tmp_path/'run')
    assert not (tmp_path/'run').exists() and not (tmp_path/'out').exists()


@pytest.mark.parametrize('kernel', ['train', 'infer', 'blend', 'sweep', 'wheels'])
def test_kernels_are_fit_for_kaggle(kernel):
    "One parameters cell with a comment for each parameter, a kernelspec, no stored outputs, nothing like a key."
    path = find_kernel(kernel)
    nb, parameters = nbformat.read(path, 4), kernel_parameters(path)
    assert nb.metadata.kernelspec.name == 'python3'
    assert all(comment for _, comment in parameters.values())
    assert not any(c.get('outputs') for c in nb.cells)


def test_unknown_and_wrongly_typed_parameters_are_refused(tmp_path):
    with pytest.raises(UserError, match='did you mean lr'): run_kernel('train', dict(lrr=1), tmp_path)
    with pytest.raises(UserError, match='rank'): run_kernel('train', dict(rank='big'), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_line_says_one_line_and_exits_1(world, tmp_path):
    (tmp_path/'bad.csv').write_text('id,prompt,response_a,response_b\n1,"[""x""","[""y""]","[""z""]"\n')
    command = [sys.executable, '-c', '# warm\nfrom underdog.console.main import main; main()']

    def underdog(*args): return subprocess.run([*command, *map(str, args)], capture_output=True, text=True)

    for args in (
        ['check', tmp_path/'bad.csv'],
        ['run', 'train', '-p', 'learning_rate=1', '--out', tmp_path/'o'],
        ['run', 'nothing'],
        ['show', world/'train.csv', '--model', tmp_path],
        ['submission', world/'train.csv', '--sample', world/'sample_submission.csv'],
    ):
        done = underdog(*args)
        assert done.returncode == 1, args
        assert done.stderr.startswith('underdog: '), args
        assert 'Traceback' not in done.stderr, args
        assert len(done.stderr.strip().splitlines()) == 1
    done = underdog('show', world/'train.csv', '--model', world/'llama', '--row', 2)
    assert done.returncode == 0 and 'sequence' in done.stdout.lower()
