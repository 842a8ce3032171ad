"The law of small runs: exact without noise, honest with it, silent where there is nothing but noise; and read from real run folders."
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from underdog.core import UserError, write_json
from underdog.runfolder import RunFolder
from underdog.data.folds import prompt_groups
from underdog.data.rows import read_rows
from underdog.search.learning_rate import best_rates, check_valley, extrapolate_lr, valleys, vertex
from underdog.training.prepare import with_folds
from underdog.search.scaling import Points, check_points, compare, find_runs, fit_laws, law, plot_laws, points_of, predict, run_point, standard_errors
from underdog.training.settings import TrainConfig

SIZES = np.array([1000., 2000, 4000, 8000])


@given(st.floats(.5, 1.), st.floats(.5, 5.), st.floats(.2, .9))
def test_a_law_without_noise_is_found(a, b, c):
    got = fit_laws(SIZES, law(a, b, c, SIZES)[None], np.full(4, .001))
    assert abs(law(*(x[0] for x in got), 50_000) - law(a, b, c, 50_000)) < 5e-3


@pytest.mark.parametrize('level', [.5, .9])
def test_intervals_hold_what_they_promise(level):
    "The largest size is held out: over many laws and draws of the noise the interval covers it at its nominal rate."
    rng, inside = np.random.default_rng(7), []
    for i in range(250):
        truth = rng.uniform(.8, .95), rng.uniform(1., 4.), rng.uniform(.25, .6)
        se = np.full(4, rng.uniform(.001, .004))
        p = Points('x', SIZES, law(*truth, SIZES) + rng.normal(size=4)*se, se)
        try: q = predict(p, 32_000, draws=200, level=level, seed=i)
        except UserError: continue
        inside.append(q.low <= law(*truth, 32_000) <= q.high)
    assert len(inside) > 150 and level - .08 < np.mean(inside) < level + .15


def test_noise_is_refused_and_too_few_sizes(): 
    se = np.full(4, .004)
    for loss, message in ((np.array([1., .999, .998, .997]), 'that is noise'), (np.array([1., 1.01, 1.02, 1.03]), 'that is noise'), (np.array([1., np.nan, .9, .8]), 'finite')):
        with pytest.raises(UserError, match=message): check_points(Points('x', SIZES, loss, se))
    with pytest.raises(UserError, match='three different ones'): check_points(Points('x', SIZES[[0, 0, 1, 1]], np.array([1., 1., .9, .9]), se))


def test_the_setting_that_wins_later_is_found_and_a_tie_is_said():
    early, late = Points('early', SIZES, law(.95, 3., .5, SIZES), np.full(4, .001)), Points('late', SIZES, law(.9, 6., .5, SIZES), np.full(4, .001))
    assert early.loss[0] < late.loss[0]
    table = compare([early, late], 57_477, draws=300)
    assert table['setting'][0] == 'late' and table['best'][0] > .95 and table['best'].sum() == pytest.approx(1)
    noisy = [Points(n, SIZES, law(.9, 3., .5, SIZES) + d, np.full(4, .004)) for n, d in (('x', 0.), ('y', .0005))]
    assert compare(noisy, 57_477, draws=300)['best'].max() < .9
    assert len(plot_laws([early, late], 57_477).axes[0].lines) >= 2


RATES = np.array([1e-5, 1e-4, 1e-3, 1e-2])

def bowl(best, depth=.02): return 1. + depth*np.log(RATES/best)**2


@given(st.floats(4e-5, 2.5e-3), st.floats(.001, 1.))
def test_the_vertex_of_a_parabola_is_found(best, depth):
    assert vertex(RATES, bowl(best, depth)[None])[0] == pytest.approx(best, rel=1e-6)


def test_learning_rates_are_carried_over():
    assert extrapolate_lr([1000, 2000, 4000], [4e-4, 4e-4, 4e-4], 64_000) == pytest.approx(4e-4)
    assert extrapolate_lr([1000, 4000], [4e-4, 2e-4], 16_000, batch=16, at_batch=64) == pytest.approx(2e-4)
    assert extrapolate_lr([1000, 4000], [1e-4, 1e-1], 2000) == pytest.approx(10**-2.5)   # whatever the slope, through the middle of the points
    with pytest.raises(UserError, match='at two sizes'): extrapolate_lr([1000, 1000], [4e-4, 2e-4], 16_000)


def cliff(best, gentle, steep, depth, lr):
    "A valley as trainings have them: it falls slowly to `best`, rises fast beyond, and ends at the loss of who knows nothing on either side."
    x = np.log(lr/best)
    return .8 + .25*np.tanh(depth*(steep*np.exp(-gentle*x) + gentle*np.exp(steep*x))/(gentle + steep)/.25)


@pytest.mark.parametrize('shape', ['bowl', 'cliff'])
def test_intervals_of_learning_rates_hold_what_they_promise(shape):
    rng, inside, wide, rates = np.random.default_rng(3), [], [], np.geomspace(1e-5, 1e-2, 7)
    for i in range(200):
        middle, slope = 10**rng.uniform(-4, -3), rng.uniform(-.5, 0.)
        form = rng.uniform(.3, 1.), rng.uniform(1., 3.), rng.uniform(.05, .2)
        valley = lambda best: 1. + .02*np.log(rates/best)**2 if shape == 'bowl' else cliff(best, *form, rates)
        sizes = {n: (rates, valley(middle*(n/2000)**slope) + rng.normal(size=7)*.005, np.full(7, .005)) for n in (1000, 2000, 4000)}
        last = best_rates({'all runs': (16, sizes)}, 32_000, draws=200, seed=i).iloc[-1]
        if last['refused']: continue
        inside.append(last['low'] <= middle*16**slope <= last['high'])
        wide.append(last['high']/last['low'])
    assert len(inside) > 150 and np.mean(inside) > .88 and np.median(wide) < 8


@pytest.mark.parametrize('lr, losses, message', [(RATES[:2], bowl(1e-4)[:2], 'three at least'), (RATES, bowl(1e-4, 1e-4), 'noise'), (RATES, bowl(1e-1), 'the largest .* try larger'), (RATES, bowl(1e-7), 'the smallest .* try smaller'), (RATES, bowl(np.nan), 'not finite')])
def test_learning_rates_that_say_nothing_are_refused(lr, losses, message):
    with pytest.raises(UserError, match=message): check_valley(1000, lr, losses, np.full(len(lr), .01))


def test_learning_rates_are_read_from_run_folders_and_told(finished, tmp_path):
    "Copies of a real run that say they learned with other rates from more rows; the best rate falls with the square root of the rows."
    import pandas as pd
    from typer.testing import CliRunner

    from underdog.console.main import app
    _, n, *_ = run_point(finished.path)
    rows, oof = (pd.read_parquet(finished.path/f) for f in ('rows.parquet', 'oof.parquet'))
    y, p = oof[['y_a', 'y_b', 'y_tie']].to_numpy(), oof[['p_a', 'p_b', 'p_tie']].to_numpy()
    for k in (1, 4):
        for lr in RATES:
            to = tmp_path/'runs'/f'{k} {lr}'
            shutil.copytree(finished.path, to)
            pd.concat([rows]*k).to_parquet(to/'rows.parquet')
            share = .5 - .01*np.log(lr/(1e-3/np.sqrt(k)))**2
            oof.assign(**dict(zip(('p_a', 'p_b', 'p_tie'), ((1 - share)*p + share*y).T))).to_parquet(to/'oof.parquet')
            write_json(to/'config.json', finished.config | dict(train=finished.config['train'] | dict(lr=lr)))
    (batch, sizes), = valleys(find_runs([tmp_path])).values()
    assert batch == finished.config['train']['batch_rows'] and list(sizes) == [n, 4*n] and (sizes[n][0] == RATES).all()
    table = best_rates({'all runs': (batch, sizes)}, 16*n)
    assert table['lr'].tolist() == pytest.approx([1e-3, 5e-4, 2.5e-4], rel=.2) and (table['low'] <= table['lr']).all() and (table['lr'] <= table['high']).all()
    told = CliRunner().invoke(app, ['scale', str(tmp_path/'runs'), '--at', str(16*n), '--out', str(tmp_path)])
    assert 'best learning rate' in told.output and (tmp_path/'learning_rate.png').stat().st_size > 10_000
    assert isinstance(told.exception, UserError) and 'three different ones' in str(told.exception)   # two sizes are enough for a learning rate, not for a law


def test_points_are_read_from_run_folders(finished, tmp_path):
    "A real run; two more of it that say they learned from more rows and did better."
    shown, n, held, hours = run_point(finished.path)
    scores = finished.metrics()['eval_loss'].dropna().iloc[-1]
    assert n == finished.config['data']['train_rows'] and len(held) == finished.config['data']['rows'] - n
    assert abs(held['loss'].mean() - scores) < 1e-6 and 0 < standard_errors([held])[0] < .5 and hours > 0
    assert run_point(finished.path, 'steps')[1] == finished.status['step']
    with pytest.raises(UserError, match='rows or steps'): points_of([finished.path], 'tokens')
    import pandas as pd
    for k, lower in ((1, 0.), (2, .1), (4, .17)):
        to = tmp_path/f'run{k}'
        shutil.copytree(finished.path, to)
        rows = pd.read_parquet(to/'rows.parquet')
        pd.concat([rows]*k).to_parquet(to/'rows.parquet')
        oof = pd.read_parquet(to/'oof.parquet')
        y, p = oof[['y_a', 'y_b', 'y_tie']].to_numpy(), oof[['p_a', 'p_b', 'p_tie']].to_numpy()
        oof[['p_a', 'p_b', 'p_tie']] = (1 - 2*lower)*p + 2*lower*y
        oof.to_parquet(to/'oof.parquet')
    points, = points_of(find_runs([tmp_path]))
    assert points.setting == 'all runs' and len(points.n) == 3 and (np.diff(points.loss) < 0).all()
    other = tmp_path/'other'
    shutil.copytree(finished.path, other)
    write_json(other/'config.json', finished.config | dict(train=finished.config['train'] | dict(lr=.5)))
    assert sorted(p.setting for p in points_of(find_runs([tmp_path]))) == ['lr=0.01', 'lr=0.5']
    RunFolder(other).set_status('paused')
    with pytest.raises(UserError, match='only finished runs'): points_of([other])
    said = []
    assert len(find_runs([tmp_path], said.append)) == 3 and said == ['1 of 4 runs are not finished and left out']
    with pytest.raises(UserError, match='no finished run there'): find_runs([other])
    with pytest.raises(UserError, match='no run folder there'): find_runs([tmp_path/'nothing'])


def test_runs_that_hold_out_the_same_rows_are_compared_row_by_row():
    "The error of the differences is found: repeated draws of the noise scatter as much as it says, however hard some rows are."
    import pandas as pd
    rng, hard, group = np.random.default_rng(0), np.random.default_rng(1).normal(1, .6, 300), np.arange(300)//2
    draw = lambda: [pd.DataFrame(dict(loss=hard + e, group=group), index=range(300)) for e in np.repeat(rng.normal(0, .05, (4, 150)), 2, 1)]   # rows of a prompt err together
    drawn = [draw() for _ in range(200)]
    scatter = np.std([d[0]['loss'].mean() - d[3]['loss'].mean() for d in drawn])/2**.5
    said = np.mean([standard_errors(d)[0] for d in drawn])
    assert abs(said/scatter - 1) < .15 and standard_errors(drawn[0][:1])[0] > 5*said
    other = drawn[0][0].rename(index=lambda i: i + 1)
    assert standard_errors([drawn[0][0], other])[0] > 5*said   # other rows: nothing is shared


@given(st.integers(0, 20), st.floats(.05, .9))
def test_a_share_holds_out_the_same_rows_and_lies_in_a_larger_one(world, seed, share):
    df, _ = read_rows(world/'train.csv')
    small, large, whole = (with_folds(df, TrainConfig(n_folds=3, seed=seed, share=s)) for s in (share, (1 + share)/2, 1.))
    held = lambda d: d[d['fold'] == 0]['id'].tolist()
    assert held(small) == held(large) == held(whole) and set(small['id']) <= set(large['id']) <= set(whole['id']) == set(df['id'])
    learned = whole[whole['fold'] != 0]
    most = prompt_groups(learned)
    assert share*len(learned) <= len(small) - len(held(small)) <= share*len(learned) + 1 + np.bincount(most).max()
    assert all((whole['prompt'].map(tuple) == q).sum() == (small['prompt'].map(tuple) == q).sum() for q in set(small['prompt'].map(tuple)))   # whole prompts


@pytest.mark.parametrize('share', [0, 1.5, -.1])
def test_shares_that_are_none(share):
    with pytest.raises(UserError, match='share='): TrainConfig(share=share)


def test_a_setting_that_is_noise_is_refused_and_the_others_are_not():
    good = Points('good', SIZES, law(.9, 3., .5, SIZES), np.full(4, .001))
    flat = Points('flat', SIZES, np.array([1.09, 1.091, 1.089, 1.09]), np.full(4, .002))
    table = compare([flat, good], 57_477, draws=200)
    assert table['setting'].tolist() == ['good', 'flat'] and table['best'][0] == 1 and 'noise' in table['refused'][1] and np.isnan(table['loss'][1])
    with pytest.raises(UserError, match='that is noise'): compare([flat], 57_477)
    assert len(plot_laws([flat, good], 57_477).axes[0].lines) >= 2
