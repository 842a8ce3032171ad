"A run of all folds is its folds: trained one by one, stopped anywhere, joined, judged, and averaged in inference."
import json
import os
import shutil
import threading
import time

import numpy as np
import pandas as pd
import pytest
from conftest import slow
from fixtures import small_run
from test_kaggle_end_to_end import MODEL, TRAIN, kaggle, p_of, ship_inputs, underdog, unpacked   # noqa: F401

from underdog.core import UserError
from underdog.kernels import check_parameters, find_kernel, run_kernel
from underdog.runfolder import RunFolder, baselines_in, columns
from underdog.data.competition import LMSYS
from underdog.data.metrics import best_margin, log_loss
from underdog.training import run as run_module
from underdog.training.settings import TrainConfig
from underdog.inference.blend import gather_oof
from underdog.inference.scored import predict
from underdog.inference.settings import InferConfig
from underdog.console.compare import compare_runs
from underdog.console.judge import judge
from underdog.console.run_doctor import run_checks
from underdog.search.estimate import make_plan
from underdog.search.recipe import Recipe
from underdog.search.scaling import find_runs
from underdog.search.shapes import accelerator, model_shape

FOLDS = dict(n_folds=2, probe_rows=0)


@pytest.fixture(scope='module')
def whole(world, tmp_path_factory):
    "A run of both folds, trained to its end in one session."
    return small_run(world, tmp_path_factory.mktemp('whole')/'run', fold='all', **FOLDS)


def of(oof, prefix): return oof[columns(prefix, LMSYS)].to_numpy()


def losses_of(run): return run.metrics()['loss'].dropna().tolist()


def assert_same(one, other):
    "The two runs of a fold are one to the last bit."
    weights = lambda run: {f.name: f.read_bytes() for f in run.adapter.glob('*.safetensors')}
    assert weights(one) == weights(other) != {}
    pd.testing.assert_frame_equal(one.oof(), other.oof())
    pd.testing.assert_frame_equal(one.rows(), other.rows())
    assert losses_of(one) == losses_of(other)
    assert one.config['train'] == other.config['train'] and one.config['best_floor'] == other.config['best_floor']


# ---- trained
def test_its_folds_are_single_runs_to_the_last_bit(world, whole, tmp_path):
    assert whole.status['state'] == 'finished' and whole.trained and not whole.adapter.exists()
    for k in range(2): assert_same(whole.fold(k), small_run(world, tmp_path/str(k), fold=k, **FOLDS))


def test_of_a_share_each_fold_has_its_own(world, tmp_path):
    run = small_run(world, tmp_path/'whole', fold='all', share=.5, **FOLDS)
    assert_same(run.fold(1), small_run(world, tmp_path/'single', fold=1, share=.5, **FOLDS))
    assert len(run.oof()) == 60 and run.oof()['group'].nunique() == run.rows()['group'].nunique()


def test_its_predictions_are_joined_and_judged_together(whole):
    folds, oof = whole.folds, whole.oof()
    assert sorted(oof['id']) == sorted(folds[0].rows()['id']) and set(oof['fold']) == {0, 1}
    for k, fold in enumerate(folds):
        own = oof[oof['fold'] == k].reset_index(drop=True)
        pd.testing.assert_frame_equal(own.drop(columns='group'), fold.oof().drop(columns='group'))
    # one line of metrics for all rows
    last = whole.metrics().dropna(subset='eval_loss').iloc[-1]
    assert last['eval_loss'] == pytest.approx(log_loss(of(oof, 'y'), of(oof, 'p'))) and last['eval_rows'] == 60
    floors = {name: of(oof, f'floor_{name}') for name in baselines_in(oof)}
    margin = best_margin(of(oof, 'y'), of(oof, 'p'), floors, oof['group'])
    assert any(str(margin) in str(finding) and '60 held-out rows' in str(finding) for finding in judge(whole))
    # steps and time of both
    status = [fold.status for fold in folds]
    assert whole.status['step'] == whole.status['of'] == sum(s['of'] for s in status)
    assert whole.status['elapsed_s'] == pytest.approx(sum(s['elapsed_s'] for s in status), abs=.11)


# ---- stopped
def stop_within(run, fold, steps):
    "Ask for an end once the `fold` of the `run` has made so many steps."
    def watch():
        while not whole_is_over.is_set():
            file = run.fold(fold).status_file
            try: reached = json.loads(file.read_text())['step'] >= steps
            except (OSError, ValueError): reached = False
            if reached: return run.stop_file.touch()
            time.sleep(.01)
    whole_is_over = threading.Event()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return whole_is_over


def test_stopped_in_any_fold_and_gone_on_with_elsewhere_it_is_the_same(world, whole, tmp_path):
    "In a first session within fold 0, in a second one within fold 1, each from a folder that is only read."
    at, earlier = [], ''
    for session, fold in enumerate((0, 1, None)):
        run = RunFolder(tmp_path/str(session)/'run')
        over = threading.Event() if fold is None else stop_within(run, fold, 1)
        small_run(world, run.path, fold='all', session=dict(resume_from=earlier), **FOLDS)
        over.set()
        at.append((run.status['state'], run.status['step']))
        earlier = str(run.path)
        for folder, _, _ in os.walk(earlier): os.chmod(folder, 0o555)
    for folder, _, _ in os.walk(tmp_path): os.chmod(folder, 0o755)
    assert [state for state, _ in at] == ['paused', 'paused', 'finished'] and at[0][1] < at[1][1] < at[2][1]
    for k in range(2): assert_same(run.fold(k), whole.fold(k))
    pd.testing.assert_frame_equal(run.oof(), whole.oof())
    assert run.metrics()['eval_loss'].dropna().tolist() == whole.metrics()['eval_loss'].dropna().tolist()


def test_what_was_killed_between_folds_goes_on(world, whole, tmp_path, monkeypatch):
    out = tmp_path/'run'
    shutil.copytree(whole.path, out)
    run = RunFolder(out)
    shutil.rmtree(run.fold(1).path)
    run.set_status('running')
    # only what is missing is trained
    launched = []
    launch = run_module.launch
    def noted(worker, args, *others, **options):
        launched.append(args[0])
        return launch(worker, args, *others, **options)
    monkeypatch.setattr(run_module, 'launch', noted)
    small_run(world, out, fold='all', **FOLDS)
    assert launched == [run.fold(1).path]
    pd.testing.assert_frame_equal(run.oof(), whole.oof())
    # the finished run is left alone
    small_run(world, out, fold='all', **FOLDS)
    assert len(launched) == 1


def test_no_fold_begins_that_could_not_make_a_step(world, whole, tmp_path, monkeypatch):
    "A first session has time for one fold and no more."
    out, prepare_fold = tmp_path/'run', run_module.prepare_fold
    def slow_one(*args):
        run = prepare_fold(*args)
        time.sleep(2)
        return run
    monkeypatch.setattr(run_module, 'prepare_fold', slow_one)
    # what is left of the session is shorter than twice that
    train_fold = lambda run, *args: shutil.copytree(whole.fold(0).path, run.path, dirs_exist_ok=True)
    monkeypatch.setattr(run_module, '_train_prepared', train_fold)
    run = small_run(world, out, fold='all', session=dict(time_limit=3/3600), **FOLDS)
    assert run.status['state'] == 'paused' and 'time limit' in run.status['reason']
    assert not run.fold(1).exists and len(run.oof()) == len(whole.fold(0).oof())


# ---- refused
def test_another_run_in_the_folder_is_refused_and_thrown_away_on_request(world, whole, finished, tmp_path):
    for source in (whole, finished): shutil.copytree(source.path, tmp_path/source.path.parent.name/'run')
    kept, single = (tmp_path/source.path.parent.name/'run' for source in (whole, finished))
    for out, changes in ((kept, dict(fold=0)), (kept, dict(fold='all', n_folds=3)), (kept, dict(fold='all', lr=1e-3)),
                         (single, dict(fold='all'))):
        with pytest.raises(UserError, match='holds another run'): small_run(world, out, **FOLDS | changes)
    with pytest.raises(UserError, match='that is another run'):
        small_run(world, tmp_path/'new', fold=0, session=dict(resume_from=str(kept)), **FOLDS)
    run = small_run(world, kept, fold=0, session=dict(restart=True), **FOLDS)
    assert run.trained and not run.fold(0).exists, 'nothing is left of the folds'
    # also where nobody can tell any more what it was
    run.config_file.write_text('{')
    run.clear()
    assert not run.exists and not run.folds


def test_the_word_is_known_to_the_kernel_and_to_the_config():
    path = find_kernel('train')
    for text, value in (('all', 'all'), ('2', 2), (-1, -1)):
        assert check_parameters(path, dict(fold=text)) == dict(fold=value)
        assert TrainConfig.of(dict(fold=text)).fold == value
    for wrong in ('each', '1.5', None, True):
        with pytest.raises(UserError, match="int or 'all' wanted"): check_parameters(path, dict(fold=wrong))
    with pytest.raises(UserError, match="'all' wanted"): TrainConfig.of(dict(fold='every'))


# ---- read
def test_inference_averages_its_models(world, whole, tmp_path):
    predict(str(whole.path), world/'test.csv', tmp_path/'all')
    predict([str(fold.path) for fold in whole.folds], world/'test.csv', tmp_path/'listed')
    one, other = (pd.read_csv(tmp_path/name/'submission.csv') for name in ('all', 'listed'))
    pd.testing.assert_frame_equal(one, other)
    tables = [pd.read_parquet(tmp_path/'all'/f'fold-{k}'/'predictions.parquet') for k in range(2)]
    assert all((table['orders'] > 0).all() for table in tables)
    held = gather_oof([whole])
    assert list(held.models) == list(gather_oof(whole.folds).models) == ['run'] and len(held.table) == 60
    # and the kernel that blends
    values = dict(runs=str(whole.path), predictions=str(tmp_path/'all'), out=str(tmp_path/'blend'))
    run_kernel('blend', values, tmp_path/'blend')
    assert len(pd.read_csv(tmp_path/'blend'/'submission.csv')) == 20


def test_one_that_is_not_whole_is_refused_and_in_a_scored_run_used(world, whole, tmp_path, monkeypatch):
    shutil.copytree(whole.path, tmp_path/'run')
    run = RunFolder(tmp_path/'run')
    shutil.rmtree(run.fold(1).path)
    with pytest.raises(UserError, match='1 of 2 folds are trained'):
        predict(str(run.path), world/'test.csv', tmp_path/'p')
    assert [check.state for check in run_checks(run.path)] == ['fail']
    monkeypatch.setenv('KAGGLE_IS_COMPETITION_RERUN', '1')
    submission = str(tmp_path/'submission.csv')
    table = predict(str(run.path), world/'test.csv', tmp_path/'scored', InferConfig(submission=submission))
    assert len(table) == 20 and np.isfinite(table.iloc[:, 1:]).all(axis=None)


def test_doctor_and_comparison_and_scaling_read_it(world, whole, finished):
    checks = run_checks(whole.path)
    assert {check.state for check in checks} <= {'ok', 'warn'}
    assert {'fold-0: reload equality', 'fold-1: state'} <= {check.name for check in checks}
    assert len(compare_runs([whole.path, finished.path]).table) == 3
    assert [path.name for path in find_runs([whole.path])] == ['fold-0', 'fold-1']


def test_a_plan_counts_its_folds():
    shape, card = model_shape('gemma-2-9b'), accelerator('2xT4')
    of_plan = lambda **changes: {line.what: line.value for line in make_plan(shape, card, Recipe(**changes))}
    one, five = of_plan(), of_plan(models=5)
    for what in ('training', 'weeks of quota', 'inference'): assert five[what] == pytest.approx(5*one[what])
    assert five['memory'] == one['memory'] and five['sessions'] > one['sessions']


# ---- on Kaggle
@slow
def test_a_relay_goes_on_with_the_fold_where_the_last_session_stopped(world, kaggle, tmp_path):   # noqa: F811
    server, root = kaggle
    cpu = ['--shape', '', '--poll', '.1']
    underdog(server, root, 'bundle', '--poll', '.1')
    ship_inputs(server, root, world)
    settings = TRAIN | dict(fold='all', n_folds=2)
    # the first session ends once a fold is done, as the server looks at the run of all folds
    server.stop_at = {'me/folds-1': 1}
    output = underdog(server, root, 'relay', 'train', '--name', 'folds', *p_of(settings), '--hours', '1', *cpu)
    assert 'session 1: paused' in output and 'session 2: finished' in output
    run = RunFolder.open(unpacked(server.job('me/folds-2'), tmp_path/'session')/'run')
    assert run.trained and len(run.oof()) == 60 and (run.path/'report.html').is_file()
    assert MODEL in json.dumps(run.config) or run.config['model']
