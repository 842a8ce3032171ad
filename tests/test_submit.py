"The scored run: valid from the first seconds, better as models answer, on time, and whole after whatever dies."
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import slow
from fixtures import predictions
from safetensors.torch import load_file, save_file
from test_pipeline import probabilities

from underdog.core import UserError, read_json, write_json
from underdog.session import locked
from underdog.runfolder import RunFolder, baselines_in, columns
from underdog.data.competition import LMSYS
from underdog.data.floors import BASELINES, FLOORS, Floors
from underdog.data.rows import read_rows
from underdog.data.sample import write_sample
from underdog.data.submission import check_submission
from underdog.inference.blend import Blend, gather_oof, gather_test
from underdog.inference.evidence import Evidence
from underdog.inference.job import Job
from underdog.inference.publish import Answers, Publisher, blend_answers
from underdog.inference import schedule, scored
from underdog.inference.scored import conclude, predict, start_jobs
from underdog.inference.settings import InferConfig


def limited(world, hours): return InferConfig(sample_submission=str(world/'sample_submission.csv'), time_limit=hours)


def jobs_of(world, *runs, **cfg):
    df, _ = read_rows(world/'test.csv', labelled=False)
    return [Job(r, df, InferConfig(**cfg)) for r in runs], Evidence(list(runs))


def answer_with(job, rows, orders=None, seed=0):
    for k in orders or range(len(job.orders)):
        job.logits[k, rows] = np.random.default_rng(seed).normal(size=(len(rows), 3))


# ---- what is published
def test_the_child_takes_the_baselines_of_its_parent(world, finished, joint, tmp_path, monkeypatch):
    settings = dict(runs=[str(finished.path), str(joint.path)], test_csv=str(world/'test.csv'), cfg={})
    jobs, _ = start_jobs(settings)
    scored._hand_over(jobs, tmp_path/'baselines.npz')
    # the child counts no text
    monkeypatch.setattr(scored, 'count_rows', None)
    handed, _ = start_jobs(settings, scored._handed_over(tmp_path/'baselines.npz', 2))
    for one, other, alone in zip(jobs, handed, jobs_of(world, finished, joint)[0]):
        for name, p in one.floors.items():
            assert (p == other.floors[name]).all()
            np.testing.assert_allclose(p, alone.floors[name], atol=1e-12)
    # what is torn is made again
    (tmp_path/'baselines.npz').write_bytes(b'PK')
    assert scored._handed_over(tmp_path/'baselines.npz', 2) == []


def test_every_state_of_a_row_is_a_distribution_and_only_its_own_answers_count(world, finished, joint):
    jobs, evidence = jobs_of(world, finished, joint)
    floors = blend_answers(jobs, evidence)
    answer_with(jobs[0], range(4, 12))
    answer_with(jobs[1], range(8, 16), [0])
    answer_with(jobs[1], range(10, 14), [1], seed=1)
    p = blend_answers(jobs, evidence)
    np.testing.assert_allclose(p.sum(1), 1)
    np.testing.assert_array_equal(p[:4], floors[:4])
    np.testing.assert_array_equal(p[16:], floors[16:])
    assert (np.abs(p[4:16] - floors[4:16]).max(1) > 1e-3).all()
    predicted = jobs[1].predicted()
    assert predicted.orders.tolist() == [0]*8 + [1]*2 + [2]*4 + [1]*2 + [0]*4
    np.testing.assert_array_equal(predicted.both[8:10], predicted.one[8:10])   # one order answered: it is all there is


def test_blend_weights_belong_to_the_state(world, finished, joint):
    "The weights of a state are those of a blend that has the same predictions."
    evidence = Evidence([finished, joint])
    pair, both = evidence.model_of[finished.path], evidence.model_of[joint.path]
    assert pair != both
    best = finished.config['best_floor']
    assert set(evidence.blend({pair: 1}).weights) == {best, pair}
    assert set(evidence.blend({}).weights) == {best}
    def probs(prefix): return evidence.oof[columns(prefix, LMSYS)].to_numpy()
    members = {best: probs(f'floor_{best}'), both: probs(both)}
    assert evidence.blend({both: 2}).weights == pytest.approx(
        Blend.fit(evidence.y, members, [best], evidence.oof['group']).weights)
    alone = Evidence([finished], with_floors=False)
    (name,) = alone.model_of.values()
    assert alone.blend({name: 1}).weights.keys() == {name}


def with_baselines(run, folder, names, best):
    "A copy of the `run` that has these baselines, `best` of them the best one."
    shutil.copytree(run.path, folder)
    copy = RunFolder(folder)
    write_json(copy.config_file, copy.config | dict(best_floor=best))
    if names == BASELINES: return copy
    # as an earlier build left it
    for file in (copy.oof_file, copy.rows_file):
        table = pd.read_parquet(file)
        gone = [c for c in table if c.startswith('floor_') and c.split('_')[1] not in names]
        table.drop(columns=gone).to_parquet(file)
    floors = Floors.load(copy.floors)
    slow = ('traits', 'trees', 'stack')
    Floors(floors.competition, {k: v for k, v in floors.tensors.items() if not k.startswith(slow)}).save(copy.floors)
    return copy


def test_runs_with_other_baselines_are_blended_by_those_that_both_have(world, finished, joint, tmp_path):
    new = with_baselines(finished, tmp_path/'new', BASELINES, best='stack')
    old = with_baselines(joint, tmp_path/'old', FLOORS, best='length')
    for runs in ([new, old], [old, new]):
        assert baselines_in(gather_oof(runs).table) == [*FLOORS]
        jobs, evidence = start_jobs(dict(runs=[str(r.path) for r in runs], test_csv=str(world/'test.csv'), cfg={}))
        for job in jobs: answer_with(job, range(10))
        assert evidence.baseline in FLOORS and np.isfinite(blend_answers(jobs, evidence)).all()
        tables = {}
        for job in jobs:
            job.write(tmp_path/'p')
            tables[job.run.path] = pd.read_parquet(tmp_path/'p'/'predictions.parquet')
        assert set(gather_test({'m': list(tables)}, tables, LMSYS)[1]) == {'m', *FLOORS}


def test_the_quick_baselines_answer_first_and_all_of_them_later(world, finished, tmp_path):
    run = with_baselines(finished, tmp_path/'run', BASELINES, best='stack')
    settings = dict(runs=[str(run.path)], test_csv=str(world/'test.csv'), cfg={})
    (quick,), evidence = start_jobs(settings, quick=True)
    assert tuple(quick.floors) == FLOORS and quick.baseline == evidence.baseline == 'tfidf'
    # a model that starts from the stack must not be asked on top of another baseline
    with pytest.raises(UserError, match='starts from the baseline stack'): quick.open()
    scored._add_baselines([quick], evidence, tmp_path/'s.csv')
    (whole,), _ = start_jobs(settings)
    assert quick.baseline == evidence.baseline == 'stack' and tuple(quick.floors) == BASELINES
    np.testing.assert_array_equal(quick.best, whole.best)
    np.testing.assert_allclose(blend_answers([quick], evidence), blend_answers([whole], evidence))


def test_answers_come_back_from_disk_only_for_the_same_job(world, finished, tmp_path, capsys):
    (job,), _ = jobs_of(world, finished)
    answer_with(job, range(7))
    Answers(tmp_path/'a.npz', [job]).save()
    (again,), _ = jobs_of(world, finished, batch_tokens=99)   # speed is not the job
    Answers(tmp_path/'a.npz', [again]).load()
    np.testing.assert_array_equal(again.logits, job.logits)
    (other,), _ = jobs_of(world, finished, quantization='nf4')
    Answers(tmp_path/'a.npz', [other]).load()
    assert np.isnan(other.logits).all()
    content = (tmp_path/'a.npz').read_bytes()
    for broken in (content[:-40], b'', content[:200] + b'xxxx' + content[204:]):
        (tmp_path/'a.npz').write_bytes(broken)
        Answers(tmp_path/'a.npz', [again]).load()
    assert 'every row is answered anew' in capsys.readouterr().out


def test_parts_hold_every_unanswered_row_once_by_priority(world, finished):
    (job,), _ = jobs_of(world, finished, batch_tokens=300)
    job.open()
    answer_with(job, [3, 4])
    priority = np.arange(20)[::-1].astype(float)
    parts, costs = job.parts(job.orders, priority, together=1)
    rows = [r for part in parts for r in part.rows]
    assert sorted(rows) == [r for r in range(20) if r not in (3, 4)] and all(c > 0 for c in costs)
    lag = np.abs(np.argsort([r for r in rows]) - np.arange(18))
    assert lag.max() < 8   # near to the order asked for


# ---- which rows first
def test_the_ranking_follows_what_rows_show():
    rng = np.random.default_rng(0)
    tokens, unsure = rng.lognormal(5, .7, 2000), rng.uniform(0, 1, 2000)
    noise = rng.normal(0, .1, 2000)
    assert schedule.best_ranking(.1 + noise, tokens, unsure) == 'shortest first'
    assert schedule.best_ranking(.3*(unsure > .8) + noise, np.full(2000, 100.), unsure) == 'most uncertain first'
    assert schedule.best_ranking(.3*unsure**2 + .1*noise, tokens, unsure) == 'uncertainty per token'
    x, y = schedule.gain_curve(noise, tokens, -tokens)
    assert x[0] == y[0] == 0 and x[-1] == pytest.approx(1) and y[-1] == pytest.approx(noise.mean())
    assert (np.diff(x) > 0).all()


def test_passes_come_by_worth_per_token_and_never_before_their_first_order(world, finished, joint):
    jobs, evidence = jobs_of(world, finished, joint)
    plan = evidence.plan(jobs)
    order = [(jobs.index(p.job), p.order) for p in plan.passes]
    assert sorted(order) == [(0, False), (1, False), (1, True)] and len(plan.reasons) == 3
    assert order.index((1, False)) < order.index((1, True))
    assert {p.ranking for p in plan.passes} <= set(schedule.RANKINGS)


def test_a_full_disk_costs_a_version_not_the_run(world, finished, tmp_path, monkeypatch, capsys):
    jobs, evidence = jobs_of(world, finished, sample_submission=str(world/'sample_submission.csv'))
    publisher = Publisher(jobs, evidence, tmp_path, tmp_path/'submission.csv')
    publisher.now()
    before = (tmp_path/'submission.csv').read_bytes()
    answer_with(jobs[0], range(20))
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(pd.DataFrame, 'to_csv', full)
        publisher.now()
    assert (tmp_path/'submission.csv').read_bytes() == before and not list(tmp_path.glob('.*'))
    assert 'the version before stands' in capsys.readouterr().out
    publisher.now()
    assert (tmp_path/'submission.csv').read_bytes() != before


def test_runs_of_different_data_are_not_blended(finished, joint, tmp_path):
    other = shutil.copytree(joint.path, tmp_path/'other')
    config = joint.config
    write_json(other/'config.json', config | dict(data=config['data'] | dict(hash='of other rows')))
    with pytest.raises(UserError, match='trained on different data'): gather_oof([finished, RunFolder.open(other)])
    # the same texts with another label
    write_json(other/'config.json', config)
    table = pd.read_parquet(other/'oof.parquet')
    table.loc[3, ['y_a', 'y_b', 'y_tie']] = 1 - table.loc[0:0, ['y_a', 'y_b', 'y_tie']].to_numpy()[0]
    table.to_parquet(other/'oof.parquet')
    with pytest.raises(UserError, match='1 held-out rows .* other labels'):
        gather_oof([finished, RunFolder.open(other)])


# ---- the whole
@slow
def test_with_time_enough_it_is_what_infer_gives_with_the_blend(world, finished, tmp_path):
    "A generous limit gives the predictions of no limit, blended by the held-out rows; the files are whole."
    alone, out = predictions(finished.path, world/'test.csv', tmp_path/'alone'), tmp_path/'out'
    submission = predict(str(finished.path), world/'test.csv', out, limited(world, 1.))
    table = pd.read_parquet(out/'predictions.parquet')
    np.testing.assert_allclose(probabilities(table), probabilities(alone), atol=1e-5)
    assert check_submission(out/'submission.csv', LMSYS, world/'sample_submission.csv') == 20 == len(submission)
    assert read_json(out/'summary.json')['answered'] == {str(finished.path): [0, 20]}
    jobs, evidence = jobs_of(world, finished)
    Answers(out/'answers.npz', jobs).load()
    blended = submission.set_index('id').loc[jobs[0].df['id']]
    np.testing.assert_allclose(blended, blend_answers(jobs, evidence), atol=1e-6)
    assert not [f for f in out.rglob('.*') if f.name != '.lock']


def test_no_time_at_all_is_the_floors(world, finished, joint, tmp_path):
    submission = predict([finished.path, joint.path], world/'test.csv', tmp_path/'out', limited(world, 3/3600))
    assert len(submission) == 20
    assert check_submission(tmp_path/'out'/'submission.csv', LMSYS, world/'sample_submission.csv') == 20


@slow
def test_a_model_that_fails_costs_its_rows_only_the_fallback(world, finished, joint, tmp_path, capsys, monkeypatch):
    "One of two heads is broken: the other answers, the log names it. Alone it is an error, but not in a scored run."
    broken = tmp_path/'broken'
    shutil.copytree(joint.path, broken)
    (broken/'adapter'/'head.safetensors').write_bytes(b'no')
    predict([finished.path, broken], world/'test.csv', tmp_path/'out', limited(world, .5))
    summary = read_json(tmp_path/'out'/'summary.json')
    assert summary['answered'] == {str(finished.path): [0, 20], str(broken): [20, 0, 0]}
    assert 'head.safetensors: cannot be read' in summary['failed'][str(broken)]
    assert 'head.safetensors' in capsys.readouterr().out
    write_json(tmp_path/'out'/'summary.json', summary | dict(answered={'run': [20, 0]}))   # … had it been alone
    end = partial(conclude, tmp_path/'out', tmp_path/'out'/'submission.csv', 0, '')
    with pytest.raises(UserError, match='no model answered.*head.safetensors'): end()
    monkeypatch.setenv('KAGGLE_IS_COMPETITION_RERUN', '1')
    assert len(end()) == 20


def test_mistakes_are_said_before_anything_is_written(world, finished, tmp_path):
    run, test_csv, out = str(finished.path), world/'test.csv', tmp_path/'out'
    with pytest.raises(UserError, match='no run folder'): predict('', test_csv, out)
    with pytest.raises(UserError, match='not a run folder'): predict(str(world), test_csv, out)
    with pytest.raises(UserError, match='time_limit'): predict(run, test_csv, out, InferConfig(time_limit=-3.))
    with pytest.raises(UserError, match='no such file'): predict(run, tmp_path/'none.csv', out)
    assert not out.exists()


FIRST = '''
import sys
from underdog.inference import scored
run, test_csv, out = sys.argv[1:]
jobs, evidence = scored.start_jobs(dict(runs=[run], test_csv=test_csv, cfg={}))
scored.write_blend(jobs, evidence, out)
print([name for name in ('torch', 'transformers', 'datasets', 'peft', 'sklearn') if name in sys.modules])
'''


def test_the_first_submission_waits_for_no_library_of_the_models(world, finished, tmp_path):
    "They take ten seconds and more to import on Kaggle."
    out = tmp_path/'submission.csv'
    args = [sys.executable, '-c', FIRST, *map(str, (finished.path, world/'test.csv', out))]
    assert subprocess.check_output(args, text=True).strip() == '[]'
    assert check_submission(out, LMSYS) == 20


INFERENCE = '''# warm
import sys
from underdog.inference.scored import predict
from underdog.inference.settings import InferConfig
run, test_csv, sample, out = sys.argv[1:]
predict(run, test_csv, out, InferConfig(batch_tokens=250, sample_submission=sample, time_limit=1., publish_s=.1))
'''


def start_inference(run, test_csv, sample, out):
    "A process that predicts in small batches and publishes all the time."
    args = [str(a) for a in (run, test_csv, sample, out)]
    return subprocess.Popen([sys.executable, '-c', INFERENCE, *args],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope='session')
def large(tmp_path_factory):
    "A test file that takes a while."
    return write_sample(tmp_path_factory.mktemp('large'), n_train=20, n_test=96)


def until_answers(out, process):
    began = time.monotonic()
    while time.monotonic() - began < 120 and process.poll() is None:
        if (out/'answers.npz').exists() and answered(out): return
        time.sleep(.01)
    assert process.poll() is None, process.stdout.read()


def answered(out):
    "Rows of the first run that are answered on disk."
    with np.load(out/'answers.npz') as saved: return int((~np.isnan(saved['0']).any((0, 2))).sum())


@pytest.mark.parametrize('end', ['SIGKILL', pytest.param('SIGTERM', marks=slow)])
def test_whatever_ends_it_the_submission_is_valid_and_a_new_start_goes_on(world, finished, large, tmp_path, end):
    "SIGTERM publishes what there is; SIGKILL of everything loses at most that. A new start goes on to the whole."
    out, sample = tmp_path/'out', large['sample_submission.csv']
    start = partial(start_inference, finished.path, large['test.csv'], sample, out)
    process = start()
    until_answers(out, process)
    before = answered(out)
    if end == 'SIGTERM': process.send_signal(signal.SIGTERM)
    else:
        for p in [*psutil.Process(process.pid).children(recursive=True), process]: p.kill()
    process.communicate(timeout=60)
    assert process.returncode == (0 if end == 'SIGTERM' else -signal.SIGKILL)
    assert check_submission(out/'submission.csv', LMSYS, sample) == 96
    assert before <= answered(out)
    # left alone
    done = start()
    text = done.communicate(timeout=300)[0]
    assert done.returncode == 0 and 'earlier answers' in text and answered(out) == 96
    whole = predictions(finished.path, large['test.csv'], tmp_path/'whole')
    table = pd.read_parquet(out/'predictions.parquet')
    np.testing.assert_allclose(probabilities(table), probabilities(whole), atol=1e-4)


@slow
def test_a_killed_worker_is_replaced(world, finished, large, tmp_path):
    process = start_inference(finished.path, large['test.csv'], large['sample_submission.csv'], tmp_path/'out')
    until_answers(tmp_path/'out', process)
    child = psutil.Process(process.pid).children()[0]
    workers = [p for p in child.children() if 'spawn_main' in ' '.join(p.cmdline())]
    if workers: workers[-1].kill()
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and answered(tmp_path/'out') == 96
    assert not workers or 'it starts again' in text


def test_what_a_killed_parent_leaves_ends_and_the_folder_is_free(world, finished, large, tmp_path):
    out = tmp_path/'out'
    process = start_inference(finished.path, large['test.csv'], large['sample_submission.csv'], out)
    until_answers(out, process)
    left = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(left, timeout=30)
    assert left and not alive
    with locked(out): pass
    assert check_submission(out/'submission.csv', LMSYS, large['sample_submission.csv']) == 96


def test_the_second_of_two_starts_is_refused(world, finished, tmp_path):
    with locked(tmp_path/'out'), pytest.raises(UserError, match='is at work there'):
        predict(str(finished.path), world/'test.csv', tmp_path/'out')


def test_runs_without_held_out_rows_count_alike(world, finished, joint, tmp_path):
    runs = []
    for name, run in (('pair', finished), ('joint', joint)):
        shutil.copytree(run.path, tmp_path/name)
        runs.append(RunFolder.open(tmp_path/name))
        runs[-1].oof_file.unlink()
    jobs, evidence = jobs_of(world, *runs)
    assert evidence.blend({str(runs[0].path): 1}).weights == {str(runs[0].path): 1.}
    assert evidence.blend({str(run.path): 1 for run in runs}).weights == {str(run.path): .5 for run in runs}
    passes = evidence.plan(jobs).passes
    assert [(jobs.index(p.job), p.order) for p in passes] == [(0, False), (1, False), (1, True)]   # in the given order
    assert {p.ranking for p in passes} == {'shortest first'}


def test_logits_that_are_not_finite_are_not_passed_off_as_answers(world, finished, tmp_path):
    broken = tmp_path/'run'
    shutil.copytree(finished.path, broken)
    for file in broken.glob('adapter/*.safetensors'):
        # finite, but not what is computed with them
        save_file({k: torch.full_like(v, 1e38) for k, v in load_file(file).items()}, file)
    with pytest.raises(UserError, match='20 of 20 rows got no finite logits'):
        predictions(broken, world/'test.csv', tmp_path/'pred')
    assert (pd.read_parquet(tmp_path/'pred'/'predictions.parquet')['orders'] == 0).all()   # each row has its baseline
