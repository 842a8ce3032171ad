"Laws of scores, temperature, blend and submission."
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from underdog.core import UserError
from underdog.data.competition import LMSYS, WSDM
from underdog.data.folds import swap_probs
from underdog.data.metrics import apply_temperature, bootstrap_ci, fit_temperature, log_loss, paired_ci, softmax
from underdog.data.pool import fit_pool
from underdog.data.submission import check_submission, write_submission
from underdog.inference.blend import Blend, cross_fit


def drawn(n=400, seed=0, c=3):
    rng = np.random.default_rng(seed)
    truth = rng.dirichlet([2.]*c, n)
    return truth, np.eye(c)[[rng.choice(c, p=t) for t in truth]], rng


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([2, 3]))
def test_blend_is_at_least_as_good_as_its_best_member_and_symmetric(seed, c):
    truth, y, rng = drawn(60, seed, c)
    noise = dict(one=.5, two=1., three=2.)
    preds = {n: apply_temperature(truth*rng.lognormal(0, s, truth.shape), 1) for n, s in noise.items()}
    blend = Blend(fit_pool(y, preds, ridge=0., whole=0.))
    assert log_loss(y, blend.predict(preds)) <= min(log_loss(y, p) for p in preds.values()) + 1e-6
    assert all(w >= 0 for w in blend.weights.values())
    exchanged = blend.predict({k: swap_probs(p) for k, p in preds.items()})
    np.testing.assert_allclose(exchanged, swap_probs(blend.predict(preds)), atol=1e-12)


def test_cross_fit_predicts_every_row_with_weights_of_other_groups():
    truth, y, rng = drawn()
    groups = rng.integers(0, 80, len(y))
    out = cross_fit(y, {'truth': truth, 'noise': rng.dirichlet([1, 1, 1], len(y))}, groups)
    np.testing.assert_allclose(out.sum(1), 1)
    assert log_loss(y, out) < log_loss(y, np.tile(y.mean(0), (len(y), 1)))
    # labels of a group do not reach its own predictions
    changed, own = y.copy(), groups == 3
    changed[own] = [0, 0, 1]
    preds = {'truth': truth, 'noise': out}
    np.testing.assert_allclose(cross_fit(changed, preds, groups)[own], cross_fit(y, preds, groups)[own])


def test_temperature_undoes_sharpening():
    truth, y, _ = drawn(3000)
    assert fit_temperature(y, truth) == pytest.approx(1, abs=.15)
    assert fit_temperature(y, apply_temperature(truth, .5)) == pytest.approx(2, abs=.3)


def test_bootstrap_covers_the_expected_loss_at_about_its_rate():
    rng, covered = np.random.default_rng(1), 0
    for i in range(100):
        p = rng.dirichlet([2, 2, 2], 150)
        y = np.eye(3)[[rng.choice(3, p=t) for t in p]]
        low, high = bootstrap_ci(y, p, n=200, seed=i)
        # the expected loss over new rows of this law is the mean entropy of Dirichlet(2,2,2), from many draws
        covered += low <= 0.9500 <= high
    assert 88 <= covered <= 100


def test_the_mean_entropy_used_above():
    p = np.random.default_rng(0).dirichlet([2, 2, 2], 200_000)
    assert -(p*np.log(p)).sum(1).mean() == pytest.approx(.95, abs=2e-3)


def test_grouped_intervals_are_wider_when_rows_repeat():
    truth, y, _ = drawn(100)
    y10, p10, groups = np.repeat(y, 10, 0), np.repeat(truth, 10, 0), np.repeat(np.arange(100), 10)
    width = lambda ci: ci[1] - ci[0]   # noqa: E731
    assert width(bootstrap_ci(y10, p10, groups)) > 2*width(bootstrap_ci(y10, p10))
    assert paired_ci(y10, p10, p10)[0] == 0


@pytest.fixture
def sample(tmp_path):
    table = pd.DataFrame({'id': [4294967295, 7, 8], **{c: 1/3 for c in LMSYS.label_columns}})
    table.to_csv(tmp_path/'sample.csv', index=False)
    return tmp_path/'sample.csv'


def test_submission_round_trip_in_the_order_of_the_sample(sample, tmp_path):
    p = np.random.default_rng(0).dirichlet([1, 1, 1], 3)
    write_submission(tmp_path/'s.csv', [7, 8, 4294967295], p, LMSYS, sample)
    assert check_submission(tmp_path/'s.csv', LMSYS, sample) == 3
    back = pd.read_csv(tmp_path/'s.csv')
    assert back['id'].tolist() == [4294967295, 7, 8]
    np.testing.assert_allclose(back[list(LMSYS.label_columns)], p[[2, 0, 1]], atol=1e-15)
    assert abs(back[list(LMSYS.label_columns)].sum(axis=1) - 1).max() < 1e-9


@pytest.mark.parametrize('ids,change,message', [
    ([7, 8], None, '1 ids are missing'), ([7, 8, 9], None, '4294967295'), ([7, 7, 8], None, 'twice'),
    ([7, 8, 4294967295], (1, 0, np.nan), 'row 2 .id 8.*not finite'), ([7, 8, 4294967295], (0, 0, 1.5), 'not between'),
    ([7, 8, 4294967295], (2, 1, .9), 'sum to 1')])
def test_bad_submissions_are_named_and_leave_the_file_alone(sample, tmp_path, ids, change, message):
    (tmp_path/'s.csv').write_text('earlier')
    p = np.full((len(ids), 3), 1/3)
    if change: p[change[0], change[1]] = change[2]
    with pytest.raises(UserError, match=message): write_submission(tmp_path/'s.csv', ids, p, LMSYS, sample)
    assert (tmp_path/'s.csv').read_text() == 'earlier' and len(list(tmp_path.iterdir())) == 2


HEADER = 'id,winner_model_a,winner_model_b,winner_tie\n'


@pytest.mark.parametrize('text,message', [
    ('id,a\n1,2\n', 'columns'), ('', 'is empty'), (HEADER, 'no rows'),
    (HEADER + ',.3,.3,.4\n7,.3,.3,.4\n8,.3,.3,.4\n', "row 1, column id: '' is empty"),
    (HEADER + '7,.3,.3,.4\n7,.3,.3,.4\n8,.3,.3,.4\n', "row 2, column id: '7' is there already"),
    (HEADER + '0,4294967295,.3,.3,.4\n1,7,.3,.3,.4\n2,8,.3,.3,.4\n', 'row 1 .id 0. has 5 fields, the header has 4'),
    (HEADER + '4294967295,.3,.3,.4,\n7,.3,.3,.4,\n8,.3,.3,.4,\n', 'row 1 .* has 5 fields'),
    (HEADER.replace(',', ';') + '7;.3;.3;.4\n', 'commas are wanted'),
    (HEADER + '4294967295,.3,.3,.4\n7,.3,.3,.4\n8,.3,.3,".4\n', 'a quote is open at its end'),
    (HEADER + '4294967295,.3,.3,.4\n7,.3,.3,.4\n8,.3,x,.4\n', 'row 3'),
    (HEADER + '7,.3,.3,.4\n8,.3,.3,.4\n4294967295,.3,.3,.4\n', 'order')])
def test_check_submission_names_the_defect(sample, tmp_path, text, message):
    (tmp_path/'s.csv').write_text(text)
    with pytest.raises(UserError, match=message): check_submission(tmp_path/'s.csv', LMSYS, sample)
    with pytest.raises(UserError, match='a parquet file'): check_submission(sample.rename(tmp_path/'s.parquet'), LMSYS)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 90), st.sampled_from('\n,";\t x.01'))
def test_what_passes_the_check_is_read_so_by_others(tmp_path, at, character):
    "Kaggle reads it with pandas, which takes a field too many in every row for the numbers of the rows."
    text = HEADER + '10,.3,.3,.4\n7,.3,.3,.4\n8,.3,.3,.4\n'
    inserted, removed = text[:at] + character + text[at:], text[:at] + text[at + 1:]
    for changed in (inserted, removed, text.replace('\n', f',{character}\n')):
        (tmp_path/'s.csv').write_text(changed)
        try: rows = check_submission(tmp_path/'s.csv', 'lmsys')
        except UserError: continue
        table = pd.read_csv(tmp_path/'s.csv')
        assert len(table) == rows and isinstance(table.index, pd.RangeIndex) and [*table] == HEADER.strip().split(',')
        np.testing.assert_allclose(table[list(LMSYS.label_columns)].sum(axis=1), 1)


@pytest.mark.parametrize('shape', [(3,), (3, 2), (3, 4), (3, 3, 1)])
def test_probabilities_of_another_shape_are_refused(tmp_path, shape):
    with pytest.raises(UserError, match='s.csv: probabilities of shape .* column for each of a, b, tie are wanted'):
        write_submission(tmp_path/'s.csv', [7, 8, 9], np.full(shape, 1/3), LMSYS)
    assert not (tmp_path/'s.csv').exists()


def test_wsdm_submissions_name_the_winner(tmp_path):
    pd.DataFrame({'id': ['x', 'y'], 'winner': 'model_a'}).to_csv(tmp_path/'sample.csv', index=False)
    t = write_submission(tmp_path/'s.csv', ['y', 'x'], np.array([[.1, .9], [.8, .2]]), WSDM, tmp_path/'sample.csv')
    assert t.values.tolist() == [['x', 'model_a'], ['y', 'model_b']]
    assert check_submission(tmp_path/'s.csv', WSDM, tmp_path/'sample.csv') == 2


# ---- what a blend is worth on rows that nobody has seen

def two_views(rng, n, starts):
    """(labels, {baseline, model}) of `n` rows: both see who wins, each with noise of its own.

    With `starts` the model is the baseline and something more, else it knows nothing of it."""
    signal, tie = rng.normal(0, .8, n), np.full(n, -.9)
    truth = softmax(np.stack([signal/2, -signal/2, tie], 1))
    y = np.eye(3)[(np.log(truth) + rng.gumbel(size=truth.shape)).argmax(1)]
    seen, other = (.3*(signal + rng.normal(0, 1.2, n)) for _ in range(2))
    both = seen + other if starts else other
    return y, {name: softmax(np.stack([x/2, -x/2, tie], 1)) for name, x in dict(baseline=seen, model=both).items()}


def test_rows_of_one_prompt_have_one_vote():
    "Copies of 60 rows weigh as those rows do; taken for 600 rows they would be believed (85 prompts of PandaLM)."
    y, preds = two_views(np.random.default_rng(3), 60, True)
    copies = np.repeat(np.arange(60), 10)
    copied = {name: p[copies] for name, p in preds.items()}
    of_copies = lambda groups: Blend.fit(y[copies], copied, ['baseline'], groups).weights
    once, told, untold = Blend.fit(y, preds, ['baseline']).weights, of_copies(copies), of_copies(None)
    assert told == pytest.approx(once, abs=1e-3)
    assert abs(untold['model'] - 1) > 1.5*abs(told['model'] - 1)


@pytest.mark.parametrize('starts', [True, False])
def test_a_blend_does_not_lose_to_its_best_part(starts):
    rng, worse, optimism = np.random.default_rng(0), [], []
    inside = ['baseline'] if starts else []
    for _ in range(30):
        y, preds = two_views(rng, 400, starts)
        fresh, fresh_preds = two_views(rng, 10_000, starts)
        blend, part = log_loss(fresh, Blend.fit(y, preds, inside).predict(fresh_preds)), fresh_preds['model']
        worse.append(blend - min(log_loss(fresh, p) for p in fresh_preds.values()))
        # what the rows promise beyond the model, less what comes
        promised = log_loss(y, preds['model']) - log_loss(y, cross_fit(y, preds, inside=inside, repeats=1))
        optimism.append(promised - (log_loss(fresh, part) - blend))
    assert np.mean(np.array(worse) <= .002) >= .95 and np.mean(worse) < .0005, worse
    assert np.mean(optimism) < 2*np.std(optimism)/len(optimism)**.5
