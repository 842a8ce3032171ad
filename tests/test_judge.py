"What a report says of a run is what its rows say: verdict, curve, faults, errors, mistakes, other runs."
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from fixtures import predictions, small_run
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from underdog.console.compare import compare_runs, trial_verdicts
from underdog.console.errors import error_table, held_texts, worst_mistakes
from underdog.console.judge import judge, judge_curve, judge_position, judge_predictions
from underdog.console.main import app
from underdog.console.report import Folded, run_sections, write_report
from underdog.console.tryout import _lines, try_pair
from underdog.core import UserError, read_json, write_json
from underdog.data.competition import LMSYS
from underdog.data.metrics import apply_temperature, best_margin, log_loss
from underdog.runfolder import Cuts, RunFolder, columns


def drawn(n, seed=0):
    "Probabilities (n, 3) of a law, and labels drawn from it."
    rng = np.random.default_rng(seed)
    p = rng.dirichlet([2, 2, 1], n)
    return np.eye(3)[[rng.choice(3, p=row) for row in p]], p


# ---- the margin

@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), share=st.floats(.1, 1))
def test_a_margin_is_over_the_best_and_turns_with_the_sides(seed, share):
    y, p = drawn(60, seed)
    q, prior = share*p + (1 - share)/3, np.full_like(p, 1/3)
    margin = best_margin(y, p, dict(q=q, prior=prior))
    best = min((log_loss(y, q), 'q'), (log_loss(y, prior), 'prior'))
    assert margin.over == best[1] and margin.gain == pytest.approx(best[0] - log_loss(y, p))
    assert margin.low <= margin.gain <= margin.high
    # the other way round, the interval is mirrored
    back = best_margin(y, q if best[1] == 'q' else prior, dict(p=p))
    assert (back.gain, back.low, back.high) == pytest.approx((-margin.gain, -margin.high, -margin.low))


@pytest.mark.parametrize('sharper, word', [(1., 'beats'), (0., 'cannot be told'), (-1., 'is worse')])
def test_a_margin_says_what_the_interval_says(sharper, word):
    y, p = drawn(800)
    q = apply_temperature(p, 2)
    mine, its = dict([(1., (p, q)), (0., (p, p)), (-1., (q, p))])[sharper]
    assert word in str(best_margin(y, mine, dict(other=its)))


# ---- the curve, the predictions

def curve(*losses, rows=200):
    return pd.DataFrame([dict(step=10*i, eval_loss=x, eval_rows=rows) for i, x in enumerate(losses, 1)])


def test_a_curve_is_judged_by_evaluations_of_the_same_rows():
    assert 'since step 10' in judge_curve(curve(.9, .95, .97))[0].text
    assert '-p epochs=4' in judge_curve(curve(1., .95, .9), epochs=2)[0].remedy
    assert 'flat' in judge_curve(curve(1., .9, .9001))[0].text
    # one evaluation of its kind says nothing, nor does a run that has not begun
    assert not judge_curve(pd.concat([curve(1.), curve(.5, rows=900)])) and not judge_curve(pd.DataFrame())


def test_a_good_model_is_not_blamed_and_each_fault_is_named():
    y, p = drawn(3000)
    assert not judge_predictions(y, p, LMSYS.classes) and not judge_position(y, p)
    assert 'over-confident' in judge_predictions(y, apply_temperature(p, .5), LMSYS.classes)[0].text
    assert 'less sure' in judge_predictions(y, apply_temperature(p, 2), LMSYS.classes)[0].text
    blind = p*[1, 1, .05]
    blind /= blind.sum(1, keepdims=True)
    assert any('are ties' in f.text for f in judge_predictions(y, blind, LMSYS.classes))
    for side, word in enumerate(('first', 'second')):
        tilted = p*(1 + np.eye(3)[side])
        assert word in judge_position(y, tilted/tilted.sum(1, keepdims=True))[0].text


def test_what_is_cut_is_counted_and_much_of_it_said():
    cuts = Cuts.of(pd.DataFrame(dict(tokens=[100, 100, 200], cut=[0, 0, 100])))
    assert (cuts.rows, cuts.tokens, cuts.many) == (1/3, .25, False)
    assert Cuts.of(pd.DataFrame(dict(tokens=[100, 100], cut=[0, 90]))).many
    assert Cuts.of(pd.DataFrame(dict(tokens=[], cut=[]))).tokens == 0


# ---- errors

def test_parts_of_the_rows_add_up(finished, world):
    oof = finished.oof()
    rows = finished.rows().set_index('id').loc[oof['id']]
    texts = held_texts(finished, world/'train.csv', LMSYS)
    assert texts['id'].tolist() == oof['id'].tolist()
    pd.testing.assert_frame_equal(error_table(oof, LMSYS, rows, texts).head(1), error_table(oof, LMSYS, rows).head(1))
    # with copies of the rows every part is large enough to be shown
    many = pd.concat([oof]*20, ignore_index=True)
    table = error_table(many, LMSYS, pd.concat([rows]*20), pd.concat([texts]*20)).set_index('part')
    whole = table.loc['all']
    for kind in ('label', 'length', 'read', 'turns'):
        parts = table[table.index.str.startswith(f'{kind}:')]
        if kind in ('read', 'turns') and not len(parts): continue   # all rows are of one kind
        assert parts['rows'].sum() == whole['rows'] == len(many)
        assert np.average(parts['model'], weights=parts['rows']) == pytest.approx(whole['model'])
        assert np.average(parts['gain'], weights=parts['rows']) == pytest.approx(whole['gain'])


def test_the_worst_mistakes_are_those_with_the_least_probability_of_the_truth(finished, world):
    oof, texts = finished.oof(), held_texts(finished, world/'train.csv', LMSYS)
    worst = worst_mistakes(oof, LMSYS, texts, n=5)
    truth = [row[f'p_{LMSYS.classes[i]}'] for (_, row), i in
             zip(oof.iterrows(), oof[[f'y_{c}' for c in LMSYS.classes]].to_numpy().argmax(1))]
    assert np.exp(-worst['loss']).tolist() == pytest.approx(sorted(truth)[:5])
    of_the_file = texts.set_index('id').loc[worst['id'], 'response_a'].tolist()
    assert worst['response_a'].tolist() == of_the_file


def test_texts_of_another_file_are_refused(finished, world, tmp_path):
    other = pd.read_csv(world/'train.csv').head(3)
    other.to_csv(tmp_path/'other.csv', index=False)
    with pytest.raises(UserError, match='lacks held-out rows'): held_texts(finished, tmp_path/'other.csv', LMSYS)


# ---- the report

def test_a_report_opens_with_its_verdict_and_shows_mistakes_as_text(finished, world, tmp_path):
    texts = held_texts(finished, world/'train.csv', LMSYS)
    texts['response_a'] = [['<script>alert(1)</script>']]*len(texts)
    sections = run_sections(finished, LMSYS, texts=texts)
    page = write_report(tmp_path/'r.html', 'a run', sections).read_text()
    assert page.index('its best baseline') < page.index('<img')
    assert '<script' not in page and '&lt;script&gt;' in page
    mistakes = dict(sections)['Mistakes']
    assert page.count('<details>') == len(mistakes) == 20 and all(isinstance(m, Folded) for m in mistakes)


def test_a_run_without_held_out_rows_is_judged_by_what_it_has(finished, tmp_path):
    finished.copy_to(tmp_path/'run')
    run = RunFolder(tmp_path/'run')
    write_json(run.config_file, finished.config)
    run.oof_file.unlink()
    findings = judge(run)
    assert len(findings) == 2 and 'finished after' in findings[0].text and 'never read' in findings[1].text
    assert [title for title, _ in run_sections(run, LMSYS)] == ['Verdict', 'Lengths', 'Loss', 'Settings']


# ---- runs side by side
def test_runs_in_folders_of_one_name_are_told_apart_by_what_they_lie_in(finished, tmp_path):
    "The kernels call each `run`: best/run and 1/run, the trials of a sweep, sessions of Kaggle."
    for name, rate in (('best', 1e-3), ('1', 1e-4)):
        shutil.copytree(finished.path, tmp_path/name/'run')
        config = read_json(tmp_path/name/'run'/'config.json')
        write_json(tmp_path/name/'run'/'config.json', config | dict(train=config['train'] | dict(lr=rate)))
    compared = compare_runs([tmp_path/'best'/'run', tmp_path/'1'/'run'])
    assert compared.costs['run'].tolist() == ['best', '1'] and {'best', '1'} < set(compared.table['prediction'])


def test_runs_are_compared_on_shared_rows_and_ties_are_said(finished, world, tmp_path):
    other = small_run(world, tmp_path/'other', lr=1e-4)
    compared = compare_runs([finished.path, other.path])
    assert compared.settings['setting'].tolist() == ['train.lr'] and compared.costs['run'].tolist() == ['run', 'other']
    assert compared.costs['folder'].tolist() == [str(finished.path), str(other.path)]
    table = compared.table.set_index('prediction')
    losses = [finished.metrics()['eval_loss'].dropna().iloc[-1], other.metrics()['eval_loss'].dropna().iloc[-1]]
    assert table.loc[['run', 'other'], 'log loss'].tolist() == pytest.approx(losses)
    assert table['verdict'].iloc[0] == 'best' and table['behind the best'].is_monotonic_increasing
    for _, row in table.iloc[1:].iterrows(): assert (row['verdict'] == 'worse') == (row['from'] > 0)
    # the command says the same, in the terminal and on a page
    answer = CliRunner().invoke(app, ['compare', str(finished.path), str(other.path), '--json',
                                      '--out', str(tmp_path/'page.html')], catch_exceptions=False)
    assert json.loads(answer.output.splitlines()[-1])['other']['log loss'] == pytest.approx(losses[1])
    page = (tmp_path/'page.html').read_text()
    assert 'train.lr' in page and page.count('data:image/png') == 1


def test_one_run_and_runs_of_other_rows_are_refused(finished, world, tmp_path):
    with pytest.raises(UserError, match='two runs'): compare_runs([finished.path])
    finished.copy_to(tmp_path/'run')
    other = finished.config['data'] | dict(hash='another')
    write_json(tmp_path/'run'/'config.json', finished.config | dict(data=other))
    with pytest.raises(UserError, match='different data'): compare_runs([finished.path, tmp_path/'run'])


def test_trials_that_cannot_be_told_apart_are_marked(finished, tmp_path):
    "The same predictions are a tie, ruined ones are worse; what has failed, or held out nothing in common, has none."
    for name, lr in dict(one=.1, same=.2, ruined=.3).items():
        finished.copy_to(tmp_path/name/'run')
        train = finished.config['train'] | dict(lr=lr)
        write_json(tmp_path/name/'run'/'config.json', finished.config | dict(train=train))
    ruined = RunFolder(tmp_path/'ruined'/'run')
    oof, p, y = ruined.oof(), columns('p', LMSYS), columns('y', LMSYS)
    oof[p] = np.where(oof[y] == 1, .01, .495)
    oof.to_parquet(ruined.oof_file)
    trials = pd.DataFrame(dict(trial=['one', 'same', 'ruined', 'failed'], state=[*['complete']*3, 'failed']))
    verdicts = trial_verdicts(tmp_path, trials)
    assert sorted(verdicts[name] for name in ('one', 'same')) == ['best', 'tie'] and verdicts['ruined'] == 'worse'
    assert trial_verdicts(tmp_path, trials[:1]) == {} == trial_verdicts(tmp_path/'nothing', trials)
    # the same fold of one model twice
    write_json(tmp_path/'same'/'run'/'config.json', RunFolder(tmp_path/'one'/'run').config)
    assert trial_verdicts(tmp_path, trials) == {}


# ---- one pair

def test_a_pair_is_answered_as_inference_answers_it(finished, world, tmp_path):
    predicted = predictions(finished.path, world/'test.csv', tmp_path/'predictions').set_index('id')
    test = pd.read_csv(world/'test.csv', index_col='id')
    # a row of one turn, with all its texts
    turns = test[['prompt', 'response_a', 'response_b']].map(json.loads)
    whole = turns.map(lambda cell: len(cell) == 1 and bool(cell[0])).all(axis=1)
    row, texts = turns.index[whole][0], [cell[0] for cell in turns[whole].iloc[0]]
    table, lines = try_pair(finished.path, *texts)
    shown = table[list(LMSYS.classes)].to_numpy()
    assert shown[0].tolist() == pytest.approx(predicted.loc[row, columns('p', LMSYS)].tolist(), abs=1e-5)
    # a pair head sees no order
    assert shown[1] == pytest.approx(shown[0], abs=1e-5)
    assert lines[0].startswith('The model expects')


def test_what_was_cut_of_a_pair_is_said():
    p = np.array([.2, .3, .5])
    assert _lines(p, LMSYS, dict(cut=0, full=9)) == ['The model expects a tie, with 50%.']
    assert _lines(p, LMSYS, dict(cut=4, full=9))[1] == 'It has not read 4 of 9 tokens.'


def test_nothing_and_a_run_that_is_not_finished_are_no_pair(finished, tmp_path):
    with pytest.raises(UserError, match='both answers are empty'): try_pair(finished.path, 'why?', '', '')
    finished.copy_to(tmp_path/'run')
    write_json(tmp_path/'run'/'config.json', finished.config)
    shutil.rmtree(tmp_path/'run'/'adapter')
    with pytest.raises(UserError, match='not finished'): try_pair(tmp_path/'run', 'why?', 'a', 'b')
    # told before anything is asked for: there is nobody who answers
    done = subprocess.run([sys.executable, '-m', 'underdog', 'try', tmp_path/'run'], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True)
    assert 'not finished' in done.stderr and not done.stdout, done.stdout + done.stderr


def test_a_pair_is_asked_for_and_written_as_a_page(finished, tmp_path):
    done = subprocess.run([sys.executable, '-m', 'underdog', 'try', finished.path, '--out', tmp_path/'page.html'],
                          input='Is 1 < 2?\nyes\n<b>no</b>\n', capture_output=True, text=True)
    assert done.returncode == 0 and 'prompt: ' in done.stdout and '[]' not in done.stdout, done.stderr
    page = (tmp_path/'page.html').read_text()
    assert 'The model expects' in page and 'baseline: ' in page and 'tokens cut' in page
    assert 'Is 1 &lt; 2?' in page and '&lt;b&gt;no&lt;/b&gt;' in page and '<b>no' not in page
