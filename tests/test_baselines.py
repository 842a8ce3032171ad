"The baselines that take longer: traits, trees, and the stack of all. Symmetric, honest, the same after a reload."
import json
import warnings

import numpy as np
import pytest
from hypothesis import given
from typer.testing import CliRunner

from test_floors import ROWS, held_out_losses, log_loss, longer_wins, make_rows, quick
from underdog.console.main import app
from underdog.core import UserError, read_json, write_json
from underdog.data.competition import LMSYS
from underdog.data.counts import count_rows
from underdog.data.floors import BASELINES, FLOORS, Floors, fit_floors
from underdog.data.folds import make_folds, swap_probs, swap_rows
from underdog.data.metrics import softmax
from underdog.data.pool import fit_pool, pooled
from underdog.data.sample import write_sample
from underdog.data.traits import read_traits
from underdog.data.trees import Forest, TreeDesign, Trees


@pytest.fixture(scope='module')
def rows(): return make_rows(400, label=longer_wins)


@pytest.fixture(scope='module')
def fitted(rows): return Floors.fit(rows, LMSYS, BASELINES)


# ---- traits

@quick
@given(ROWS)
def test_traits_change_sign_or_stay(rows):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        there, back = read_traits(rows), read_traits(swap_rows(rows))
    assert all(np.isfinite(part).all() for part in there)
    assert (there.odd == -back.odd).all() and (there.apart == back.apart).all() and (there.level == back.level).all()
    # equal answers differ in nothing
    same = read_traits(rows.assign(response_b=rows['response_a']))
    assert not same.odd.any() and not same.apart.any()


def test_traits_of_a_row_do_not_depend_on_its_neighbours(rows):
    together = read_traits(rows)
    for part, alone in zip(together, read_traits(rows.iloc[[7]])): np.testing.assert_array_equal(part[[7]], alone)


def test_counts_are_the_same_with_and_without_traits(rows):
    plain, whole = count_rows(rows), count_rows(rows, traits=True)
    assert whole.has_traits and not plain.has_traits
    for name in ('odd', 'even'): np.testing.assert_array_equal(getattr(plain, name), getattr(whole, name))
    for name in 'ab': assert (getattr(plain, name) != getattr(whole, name)).nnz == 0


# ---- trees

def designs(n, seed=0):
    "(`TreeDesign`, labels (n, 3)): the first odd feature decides."
    rng = np.random.default_rng(seed)
    odd, apart, level = rng.normal(size=(n, 4)), rng.random((n, 4)), rng.normal(size=(n, 3))
    winner = np.where(np.abs(odd[:, 0]) < .3, 2, (odd[:, 0] < 0).astype(int))
    return TreeDesign(odd, apart, level), np.eye(3)[winner]


def test_trees_are_symmetric_and_learn():
    x, y = designs(900)
    trees = Trees.grow(x, y)
    z, back = trees.logits(x, 3), trees.logits(x._replace(odd=-x.odd), 3)
    np.testing.assert_array_equal(z, back[:, [1, 0, 2]])
    held, truth = designs(500, seed=1)
    assert log_loss(truth, softmax(trees.logits(held, 3))) < .8
    # what a file keeps of them
    again = Trees.of({name: np.array(value) for name, value in trees.tensors().items()})
    np.testing.assert_array_equal(again.logits(held, 3), trees.logits(held, 3))


def test_a_forest_answers_as_the_library_that_grew_it():
    from sklearn.ensemble import HistGradientBoostingClassifier
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(600, 5)), rng.random(600) < .4
    grown = HistGradientBoostingClassifier(max_iter=20, max_leaf_nodes=6, random_state=0).fit(x, y)
    fresh = rng.normal(size=(300, 5))*3
    np.testing.assert_allclose(Forest.of(grown).log_odds(fresh), grown.decision_function(fresh), atol=1e-12)


def test_few_rows_or_one_class_grow_no_trees():
    x, y = designs(60)
    assert not Trees.grow(x, y).wins.value.size
    x, y = designs(400)
    ties = Trees.grow(x, np.tile([0., 0, 1], (400, 1)))
    assert (softmax(ties.logits(x, 3))[:, 2] > .99).all()


# ---- the stack

def test_a_pool_is_not_worse_than_its_best_part_and_ignores_noise():
    rng = np.random.default_rng(0)
    y = np.eye(3)[rng.integers(3, size=2000)]
    good, noise = softmax(y + rng.normal(size=y.shape)), softmax(rng.normal(size=y.shape))
    weights = fit_pool(y, dict(good=good, noise=noise))
    assert min(weights.values()) >= 0 and weights['noise'] < .1
    assert log_loss(y, pooled(weights, dict(good=good, noise=noise))) < log_loss(y, good) + .002
    # what another one contains is left out, unless there is no other
    assert fit_pool(y, dict(good=good, noise=noise), inside=['noise'])['noise'] < weights['noise'] + .01
    assert abs(fit_pool(y, dict(good=good), inside=['good'])['good'] - fit_pool(y, dict(good=good))['good']) < 1e-9
    # a second copy adds nothing
    twice = dict(good=good, copy=good)
    one, two = fit_pool(y, dict(good=good)), fit_pool(y, twice)
    assert abs(log_loss(y, pooled(one, twice)) - log_loss(y, pooled(two, twice))) < 1e-3


# ---- all together

@quick
@given(rows=ROWS)
def test_any_text_gets_symmetric_probabilities_from_all(fitted, rows):
    there, back = fitted.predict(rows), fitted.predict(swap_rows(rows))
    assert tuple(there) == BASELINES
    for name, p in there.items():
        assert np.isfinite(p).all() and (p > 0).all(), name
        np.testing.assert_allclose(p.sum(1), 1, atol=1e-9)
        np.testing.assert_allclose(p, swap_probs(back[name]), atol=1e-12)


def test_what_can_be_seen_is_found_and_noise_is_not():
    "Labels that are noise: nobody is worse than the prior by more than noise."
    seen = held_out_losses(make_rows(900, label=longer_wins), BASELINES)
    noise = held_out_losses(make_rows(600, seed=3), BASELINES)
    assert max(seen[name] for name in ('traits', 'trees', 'stack')) < .5*seen['prior'], seen
    assert max(noise.values()) < noise['prior'] + .02, noise


def test_each_fold_is_predicted_by_a_fit_on_the_others(rows):
    folds = np.r_[make_folds(rows.iloc[:300], 3), [-1]*100]
    whole, predictions = fit_floors(rows, LMSYS, folds, BASELINES)
    assert whole.names == BASELINES
    alone = Floors.fit(rows[(folds >= 0) & (folds != 1)].reset_index(drop=True), LMSYS, BASELINES)
    for name, p in alone.predict(rows[folds == 1]).items():
        np.testing.assert_allclose(predictions[name][folds == 1], p, atol=.02)


def test_saved_and_loaded(fitted, rows, tmp_path):
    fitted.save(tmp_path)
    loaded = Floors.load(tmp_path)
    assert loaded.names == BASELINES
    for name, p in fitted.predict(rows).items(): np.testing.assert_array_equal(loaded.predict(rows)[name], p)
    # counts without traits are answered by the quick ones
    assert tuple(loaded.predict(count_rows(rows))) == FLOORS
    # one of an earlier build, and one of a later one
    meta = read_json(tmp_path/'floors.json')
    write_json(tmp_path/'floors.json', {k: v for k, v in meta.items() if k != 'baselines'})
    assert tuple(Floors.load(tmp_path).tensors) == tuple(loaded.tensors)
    write_json(tmp_path/'floors.json', meta | dict(baselines=['oracle']))
    with pytest.raises(UserError, match='another version'): Floors.load(tmp_path)


def test_floors_ends_with_one_line_of_json(tmp_path):
    paths = write_sample(tmp_path, 120, 10)
    done = CliRunner().invoke(app, ['floors', str(paths['train.csv']), '--json'])
    assert done.exit_code == 0, done.output
    losses = json.loads(done.output.splitlines()[-1])['baselines']
    assert tuple(losses) == BASELINES and all(0 < loss < 1.3 for loss in losses.values())
