"The law of small runs: exact without noise, honest with it, silent where there is only noise; read from run folders."
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from underdog.console.main import app
from underdog.core import UserError, write_json
from underdog.runfolder import RunFolder
from underdog.data.folds import prompt_groups
from underdog.data.rows import read_rows
from underdog.training.table import with_folds
from underdog.training.settings import TrainConfig
from underdog.console.figures import save_figure
from underdog.search.learning_rate import (Valley, Valleys, best_rates, check_valley, extrapolate_lr, plot_rates,
                                           valleys, vertex)
from underdog.search.scaling import Points, compare_settings, extrapolate, find_runs, fit_laws, law
from underdog.search.scaling import plot_laws, points_of, run_point, standard_errors

SIZES = np.array([1000., 2000, 4000, 8000])


# ---- the law
@given(st.floats(.5, 1.), st.floats(.5, 5.), st.floats(.2, .9))
def test_a_law_without_noise_is_found(a, b, c):
    fitted = fit_laws(SIZES, law(a, b, c, SIZES)[None], np.full(4, .001))
    assert abs(law(*(x[0] for x in fitted), 50_000) - law(a, b, c, 50_000)) < 5e-3


@pytest.mark.parametrize('level', [.5, .9])
def test_intervals_hold_what_they_promise(level):
    "The largest size is held out: over many laws and draws of the noise the interval covers it at its nominal rate."
    rng, inside = np.random.default_rng(7), []
    for i in range(250):
        truth = rng.uniform(.8, .95), rng.uniform(1., 4.), rng.uniform(.25, .6)
        se = np.full(4, rng.uniform(.001, .004))
        p = Points('x', SIZES, law(*truth, SIZES) + rng.normal(size=4)*se, se)
        try: q = extrapolate(p, 32_000, draws=200, level=level, seed=i)
        except UserError: continue
        inside.append(q.low <= law(*truth, 32_000) <= q.high)
    assert len(inside) > 150 and level - .08 < np.mean(inside) < level + .15


@pytest.mark.parametrize('sizes,losses,message', [
    (SIZES, [1., .999, .998, .997], 'that is noise'),
    (SIZES, [1., 1.01, 1.02, 1.03], 'that is noise'),
    (SIZES, [1., np.nan, .9, .8], 'finite'),
    (SIZES[[0, 0, 1, 1]], [1., 1., .9, .9], 'three different ones'),
])
def test_noise_is_refused_and_too_few_sizes(sizes, losses, message):
    points = Points('x', sizes, np.array(losses), np.full(4, .004))
    with pytest.raises(UserError, match=message): extrapolate(points, 1e5)


def exact(setting, a, b, error=.001, shift=0.):
    "Points on a law, with an error."
    return Points(setting, SIZES, law(a, b, .5, SIZES) + shift, np.full(4, error))


def test_the_setting_that_wins_later_is_found_and_a_tie_is_said():
    early, late = exact('early', .95, 3.), exact('late', .9, 6.)
    assert early.loss[0] < late.loss[0]
    table = compare_settings([early, late], 57_477, draws=300)
    assert table['setting'][0] == 'late' and table['best'][0] > .95 and table['best'].sum() == pytest.approx(1)
    alike = [exact('x', .9, 3., error=.004), exact('y', .9, 3., error=.004, shift=.0005)]
    assert compare_settings(alike, 57_477, draws=300)['best'].max() < .9
    assert len(plot_laws([early, late], 57_477).axes[0].lines) >= 2


def test_a_setting_that_is_noise_is_refused_and_the_others_are_not():
    good = exact('good', .9, 3.)
    flat = Points('flat', SIZES, np.array([1.09, 1.091, 1.089, 1.09]), np.full(4, .002))
    table = compare_settings([flat, good], 57_477, draws=200)
    assert table['setting'].tolist() == ['good', 'flat'] and table['best'][0] == 1
    assert 'noise' in table['refused'][1] and np.isnan(table['loss'][1])
    with pytest.raises(UserError, match='that is noise'): compare_settings([flat], 57_477)
    assert len(plot_laws([flat, good], 57_477).axes[0].lines) >= 2


# ---- learning rates
RATES = np.array([1e-5, 1e-4, 1e-3, 1e-2])


def bowl(best, depth=.02, rates=RATES): return 1. + depth*np.log(rates/best)**2


def cliff(best, gentle, steep, depth, lr):
    "A valley as trainings have them: a slow fall to `best`, a fast rise beyond; at both ends, the model knows nothing."
    x = np.log(lr/best)
    return .8 + .25*np.tanh(depth*(steep*np.exp(-gentle*x) + gentle*np.exp(steep*x))/(gentle + steep)/.25)


@given(st.floats(4e-5, 2.5e-3), st.floats(.001, 1.))
def test_the_vertex_of_a_parabola_is_found(best, depth):
    assert vertex(RATES, bowl(best, depth)[None])[0] == pytest.approx(best, rel=1e-6)


def test_learning_rates_are_carried_over():
    assert extrapolate_lr([1000, 2000, 4000], [4e-4, 4e-4, 4e-4], 64_000) == pytest.approx(4e-4)
    assert extrapolate_lr([1000, 4000], [4e-4, 2e-4], 16_000, batch=16, at_batch=64) == pytest.approx(2e-4)
    # whatever the slope, through the middle of the points
    assert extrapolate_lr([1000, 4000], [1e-4, 1e-1], 2000) == pytest.approx(10**-2.5)
    with pytest.raises(UserError, match='at two sizes'): extrapolate_lr([1000, 1000], [4e-4, 2e-4], 16_000)


@pytest.mark.parametrize('shape', ['bowl', 'cliff'])
def test_intervals_of_learning_rates_hold_what_they_promise(shape):
    rng, inside, wide, rates = np.random.default_rng(3), [], [], np.geomspace(1e-5, 1e-2, 7)
    for i in range(200):
        middle, slope = 10**rng.uniform(-4, -3), rng.uniform(-.5, 0.)
        form = rng.uniform(.3, 1.), rng.uniform(1., 3.), rng.uniform(.05, .2)
        sizes = {}
        for n in (1000, 2000, 4000):
            best = middle*(n/2000)**slope
            losses = bowl(best, rates=rates) if shape == 'bowl' else cliff(best, *form, lr=rates)
            sizes[n] = Valley(rates, losses + rng.normal(size=7)*.005, np.full(7, .005))
        last = best_rates({'all runs': Valleys(16, sizes)}, 32_000, draws=200, seed=i).iloc[-1]
        if last['refused']: continue
        inside.append(last['low'] <= middle*16**slope <= last['high'])
        wide.append(last['high']/last['low'])
    assert len(inside) > 150 and np.mean(inside) > .88 and np.median(wide) < 8


@pytest.mark.parametrize('lr, losses, message', [
    (RATES[:2], bowl(1e-4)[:2], 'three at least'),
    (RATES, bowl(1e-4, 1e-4), 'noise'),
    (RATES, bowl(1e-1), 'the largest .* try larger'),
    (RATES, bowl(1e-7), 'the smallest .* try smaller'),
    (RATES, bowl(np.nan), 'not finite'),
])
def test_learning_rates_that_say_nothing_are_refused(lr, losses, message):
    with pytest.raises(UserError, match=message): check_valley(1000, Valley(lr, losses, np.full(len(lr), .01)))


# ---- run folders
Y, P = ['y_a', 'y_b', 'y_tie'], ['p_a', 'p_b', 'p_tie']


def copy_of(finished, path, times=1, truth=0., **train):
    "A copy of a run that says it learned from `times` the rows, with settings `train`; predictions move to the truth."
    shutil.copytree(finished.path, path)
    run = RunFolder(path)
    pd.concat([run.rows()]*times).to_parquet(run.rows_file)
    oof = run.oof()
    oof[P] = (1 - truth)*oof[P].to_numpy() + truth*oof[Y].to_numpy()
    oof.to_parquet(run.oof_file)
    write_json(run.config_file, finished.config | dict(train=finished.config['train'] | train))
    return run


def test_learning_rates_are_read_from_run_folders_and_told(finished, tmp_path):
    "Copies of a real run that say they learned with other rates from more rows; the best falls with the square root."
    n = run_point(finished.path).n
    for k in (1, 4):
        for lr in RATES:
            truth = .5 - .01*np.log(lr/(1e-3/np.sqrt(k)))**2
            copy_of(finished, tmp_path/'runs'/f'{k} {lr}', times=k, truth=truth, lr=lr)
    (batch, sizes), = valleys(find_runs([tmp_path])).values()
    assert batch == finished.config['train']['batch_rows'] and list(sizes) == [n, 4*n] and (sizes[n].lr == RATES).all()
    table = best_rates({'all runs': Valleys(batch, sizes)}, 16*n)
    assert table['lr'].tolist() == pytest.approx([1e-3, 5e-4, 2.5e-4], rel=.2)
    assert (table['low'] <= table['lr']).all() and (table['lr'] <= table['high']).all()
    told = CliRunner().invoke(app, ['scale', str(tmp_path/'runs'), '--at', str(16*n), '--out', str(tmp_path)])
    assert 'best learning rate' in told.output and (tmp_path/'learning_rate.png').stat().st_size > 10_000
    # two sizes are enough for a learning rate, not for a law
    assert isinstance(told.exception, UserError) and 'three different ones' in str(told.exception)


def test_points_are_read_from_run_folders(finished, tmp_path):
    "A real run; two more of it that say they learned from more rows and did better."
    point = run_point(finished.path)
    last = finished.metrics()['eval_loss'].dropna().iloc[-1]
    assert point.n == finished.config['data']['train_rows']
    assert len(point.held) == finished.config['data']['rows'] - point.n
    assert abs(point.held['loss'].mean() - last) < 1e-6 and point.hours > 0
    assert 0 < standard_errors([point.held])[0] < .5
    assert run_point(finished.path, 'steps').n == finished.status['step']
    with pytest.raises(UserError, match='rows or steps'): points_of([finished.path], 'tokens')
    # one setting
    for k, lower in ((1, 0.), (2, .1), (4, .17)): copy_of(finished, tmp_path/f'run{k}', times=k, truth=2*lower)
    points, = points_of(find_runs([tmp_path]))
    assert points.setting == 'all runs' and len(points.n) == 3 and (np.diff(points.loss) < 0).all()
    told = CliRunner().invoke(app, ['scale', str(tmp_path), '--out', str(tmp_path/'figures'), '--json'])
    tables = json.loads(told.output.splitlines()[-1])
    assert tables['rates'] == [] and [row['setting'] for row in tables['losses']] == ['all runs'], told.exception
    # two settings
    other = copy_of(finished, tmp_path/'other', lr=.5)
    assert sorted(p.setting for p in points_of(find_runs([tmp_path]))) == ['lr=0.01', 'lr=0.5']
    # a run that is not finished
    other.set_status('paused')
    with pytest.raises(UserError, match='only finished runs'): points_of([other.path])
    messages = []
    assert len(find_runs([tmp_path], messages.append)) == 3
    assert messages == ['1 of 4 runs are not finished and left out']
    with pytest.raises(UserError, match='no finished run there'): find_runs([other.path])
    with pytest.raises(UserError, match='no run folder there'): find_runs([tmp_path/'nothing'])


def test_runs_that_hold_out_the_same_rows_are_compared_row_by_row():
    "The error of the differences is found: draws of the noise scatter as much as it says, however hard some rows are."
    rng, hard, group = np.random.default_rng(0), np.random.default_rng(1).normal(1, .6, 300), np.arange(300)//2
    table = lambda e: pd.DataFrame(dict(loss=hard + e, group=group), index=range(300))
    noise = lambda: np.repeat(rng.normal(0, .05, (4, 150)), 2, 1)   # rows of a prompt err together
    drawn = [[table(e) for e in noise()] for _ in range(200)]
    scatter = np.std([d[0]['loss'].mean() - d[3]['loss'].mean() for d in drawn])/2**.5
    error = np.mean([standard_errors(d)[0] for d in drawn])
    assert abs(error/scatter - 1) < .15 and standard_errors(drawn[0][:1])[0] > 5*error
    other = drawn[0][0].rename(index=lambda i: i + 1)
    assert standard_errors([drawn[0][0], other])[0] > 5*error   # other rows: nothing is shared


@given(st.integers(0, 20), st.floats(.05, .9))
def test_a_share_holds_out_the_same_rows_and_lies_in_a_larger_one(world, seed, share):
    df, _ = read_rows(world/'train.csv')
    of_share = lambda s: with_folds(df, TrainConfig(n_folds=3, seed=seed, share=s))
    small, large, whole = of_share(share), of_share((1 + share)/2), of_share(1.)
    held = lambda d: d[d['fold'] == 0]['id'].tolist()
    assert held(small) == held(large) == held(whole)
    assert set(small['id']) <= set(large['id']) <= set(whole['id']) == set(df['id'])
    # as many as wanted, but for the last prompt
    learned = whole[whole['fold'] != 0]
    most = np.bincount(prompt_groups(learned)).max()
    assert share*len(learned) <= len(small) - len(held(small)) <= share*len(learned) + 1 + most
    # whole prompts
    rows_of = lambda d, prompt: (d['prompt'].map(tuple) == prompt).sum()
    assert all(rows_of(whole, prompt) == rows_of(small, prompt) for prompt in set(small['prompt'].map(tuple)))


@pytest.mark.parametrize('share', [0, 1.5, -.1])
def test_shares_that_are_none(share):
    with pytest.raises(UserError, match='share='): TrainConfig(share=share)


def test_learning_rates_that_tell_nothing_are_drawn_all_the_same(tmp_path):
    "As of a first sweep on few rows, whose losses are all alike: each row of the table is refused."
    lr = np.array([1e-4, 3e-4, 1e-3])
    tried = {'all runs': Valleys(16, {60: Valley(lr, np.full(3, 1.0856), np.full(3, .01))})}
    table = best_rates(tried, 57_477)
    assert table['lr'].isna().all() and (table['refused'] != '').all()
    save_figure(plot_rates(tried, table), tmp_path/'learning_rate.png')
    assert (tmp_path/'learning_rate.png').read_bytes()[:4] == b'\x89PNG'
