"The floors: symmetric, never far below the prior, out of fold, saved without pickle."
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from underdog.data.competition import LMSYS, WSDM
from underdog.core import UserError
from underdog.data.folds import labels_of, make_folds, swap_probs, swap_rows
from underdog.data.rows import read_rows
from underdog.data.floors import FLOORS, Floors, best_floor, cross_predict, features
from underdog.data.sample import write_sample

WORDS = 'the of garden river music answer small green and please maybe paper number seven window'.split()
TEXT = st.text(st.characters(exclude_categories=['Cs']), max_size=60) | st.sampled_from(
    ['', ' ', 'x'*36_000, '- a\n- b\n1. c', '```py\nx = 1\n```', '**bold** # not\n# heading', '1234567890?!:', '\U0001f600\u4f60\u597d', '\ufffd\n\n\n'])
ROW = st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=3).map(lambda turns: [list(t) for t in zip(*turns)])   # as many turns in all three
ROWS = st.lists(ROW, min_size=1, max_size=4).map(
    lambda rows: pd.DataFrame({c: pd.Series([r[j] for r in rows], dtype=object) for j, c in enumerate(('prompt', 'response_a', 'response_b'))}))
quick = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


def log_loss(y, p): return float(-(y*np.log(p)).sum(1).mean())


def make_rows(n, seed=0, comp=LMSYS, label=lambda rng, a, b: rng.integers(3), words=lambda rng: rng.choice(WORDS, rng.integers(3, 30))):
    "Rows with answers of random words; `label` draws the class from both answers' words."
    rng = np.random.default_rng(seed)
    a, b = ([list(words(rng)) for _ in range(n)] for _ in 'ab')
    y = np.eye(comp.n_classes)[[label(rng, x, z) for x, z in zip(a, b)]]
    rows = {'id': range(n), 'prompt': [[f'question {i}'] for i in range(n)], 'response_a': [[' '.join(x)] for x in a], 'response_b': [[' '.join(x)] for x in b]}
    return pd.DataFrame(rows).assign(**dict(zip(comp.classes, y.T)))


@pytest.fixture(scope='module')
def rows(tmp_path_factory): return read_rows(write_sample(tmp_path_factory.mktemp('sample'), 150, 20)['train.csv'])[0]


@pytest.fixture(scope='module')
def floors(rows): return Floors.fit(rows, LMSYS)


def check(p, n, classes=3):
    assert tuple(p) == FLOORS
    for q in p.values():
        assert q.shape == (n, classes) and q.dtype == np.float64 and (q > 0).all()
        np.testing.assert_allclose(q.sum(1), 1, atol=1e-9)


# ---- symmetry and probabilities

@quick
@given(ROWS)
def test_features_change_sign_or_stay(rows):
    (odd, even), (odd_back, even_back) = features(rows), features(swap_rows(rows))
    assert np.isfinite(odd).all() and np.isfinite(even).all()
    assert (odd == -odd_back).all() and (even == even_back).all()


@quick
@given(rows=ROWS)
def test_any_text_gets_symmetric_probabilities(floors, rows):
    there, back = floors.predict(rows), floors.predict(swap_rows(rows))
    check(there, len(rows))
    for name in FLOORS: np.testing.assert_allclose(there[name], swap_probs(back[name]), atol=1e-12)
    same = rows.assign(response_b=rows['response_a'])
    for p in floors.predict(same).values(): np.testing.assert_allclose(p[:, 0], p[:, 1], atol=1e-12)   # equal answers, equal chances


def test_fitted_on_exchanged_rows_it_is_the_same(rows, floors):
    for name, p in Floors.fit(swap_rows(rows), LMSYS).predict(rows).items(): np.testing.assert_allclose(p, floors.predict(rows)[name], atol=.02)


def test_a_row_does_not_depend_on_its_neighbours(rows, floors):
    for name, p in floors.predict(rows.iloc[[5]]).items(): np.testing.assert_allclose(p[0], floors.predict(rows)[name][5], atol=1e-12)


def test_something_never_seen_moves_the_odds_only_so_far():
    plain = make_rows(200, label=lambda rng, a, b: rng.integers(3))
    plain.at[0, 'response_a'] = ['? ' + plain['response_a'][0][0]]   # one question mark in all rows
    odd = plain.iloc[[1]].assign(response_a=[['?'*5000 + '9'*5000 + '!'*5000]])
    for p in Floors.fit(plain, LMSYS).predict(odd).values(): assert p.min() > .001   # labels are noise here; without the cut it is 1e-9 and less


# ---- what they learn

def test_length_floor_learns_lengths():
    longer = dict(label=lambda rng, a, b: int(len(a) < len(b)) if len(a) != len(b) else 2)
    train, test = make_rows(300, 0, **longer), make_rows(200, 1, **longer)
    p, y = Floors.fit(train, LMSYS).predict(test), labels_of(test, LMSYS)
    assert log_loss(y, p['length']) < .5 < log_loss(y, p['prior']) - .1


def test_words_floor_learns_words():
    good = dict(words=lambda rng: rng.permutation(WORDS)[:8], label=lambda rng, a, b: 2 if ('please' in a) == ('please' in b) else int('please' in b))
    train, test = make_rows(400, 0, **good), make_rows(200, 1, **good)
    p, y = Floors.fit(train, LMSYS).predict(test), labels_of(test, LMSYS)
    assert log_loss(y, p['tfidf']) < log_loss(y, p['length']) - .1
    assert best_floor(y, p) == 'tfidf'


@pytest.mark.parametrize('comp', [LMSYS, WSDM])
def test_noise_is_never_much_worse_than_the_prior(comp):
    noise = dict(comp=comp, label=lambda rng, a, b: rng.integers(comp.n_classes))
    p, y = Floors.fit(make_rows(150, 0, **noise), comp).predict(test := make_rows(400, 1, **noise)), labels_of(make_rows(400, 1, **noise), comp)
    check(p, len(test), comp.n_classes)
    for name in FLOORS: assert log_loss(y, p[name]) < log_loss(y, p['prior']) + .02, name


def test_two_classes():
    longer = dict(comp=WSDM, label=lambda rng, a, b: int(len(a) < len(b)))
    train, test = make_rows(200, 0, **longer), make_rows(100, 1, **longer)
    floors = Floors.fit(train, WSDM)
    p, back = floors.predict(test), floors.predict(swap_rows(test))
    check(p, 100, 2)
    assert (p['prior'] == .5).all() and log_loss(labels_of(test, WSDM), p['length']) < .4
    for name in FLOORS: np.testing.assert_allclose(p[name], swap_probs(back[name]), atol=1e-12)


def test_a_class_that_never_occurs_keeps_a_chance():
    train = make_rows(100, label=lambda rng, a, b: rng.integers(2))
    p = Floors.fit(train, LMSYS).predict(train)
    check(p, 100)
    for q in p.values(): assert (q[:, 2] < .1).all()


@pytest.mark.parametrize('n', [1, 2, 5])
def test_a_handful_of_rows(n):
    rows = make_rows(n)
    check(Floors.fit(rows, LMSYS).predict(rows), n)


# ---- soft labels

def test_soft_labels_that_are_almost_hard(rows, floors):
    y = .999*labels_of(rows, LMSYS) + .001/3
    soft = Floors.fit(rows.assign(**dict(zip(LMSYS.classes, y.T))), LMSYS).predict(rows)
    for name, p in floors.predict(rows).items(): np.testing.assert_allclose(soft[name], p, atol=.03)


def test_soft_labels_teach_more_than_their_rounding():
    true = lambda df: np.stack([z := 1/(1 + np.exp(-np.array([.15*(len(a[0].split()) - len(b[0].split())) for a, b in zip(df.response_a, df.response_b)]))), 1 - z, 0*z], 1)*.8 + np.array([0, 0, .2])
    train, test = make_rows(300, 0), make_rows(300, 1)
    y = true(train)
    soft, hard = (Floors.fit(train.assign(**dict(zip(LMSYS.classes, lab.T))), LMSYS).predict(test)['length'] for lab in (y, np.eye(3)[y.argmax(1)]))
    best = log_loss(true(test), np.clip(true(test), 1e-12, 1))
    assert log_loss(true(test), soft) < best + .02 < log_loss(true(test), hard)


# ---- out of fold

def test_a_fold_is_predicted_without_its_labels(rows):
    folds = make_folds(rows, 3)
    first = cross_predict(rows, LMSYS, folds)
    check(first, len(rows))
    changed = rows.copy()
    changed.loc[folds == 0, list(LMSYS.classes)] = [0., 0., 1.]
    again = cross_predict(changed, LMSYS, folds)
    for name in FLOORS:
        assert (first[name][folds == 0] == again[name][folds == 0]).all()
        assert not np.allclose(first[name][folds == 1], again[name][folds == 1])


def test_best_floor(): assert best_floor(np.eye(3), dict(prior=np.full((3, 3), 1/3), length=np.eye(3)*.7 + .1, tfidf=np.eye(3)*.4 + .2)) == 'length'


# ---- files

def test_saved_and_loaded(rows, floors, tmp_path):
    for _ in range(2): floors.save(tmp_path/'new'/'floors')   # also over an older one
    assert sorted(p.name for p in (tmp_path/'new'/'floors').iterdir()) == ['floors.json', 'floors.safetensors']
    loaded = Floors.load(tmp_path/'new'/'floors')
    assert loaded.competition == 'lmsys'
    for name, p in loaded.predict(rows).items(): assert (p == floors.predict(rows)[name]).all()


def edit_json(**changes): return lambda folder: (folder/'floors.json').write_text(json.dumps(json.loads((folder/'floors.json').read_text()) | changes))


def drop_tensor(folder):
    from safetensors.numpy import load_file, save_file
    tensors = load_file(folder/'floors.safetensors')
    save_file({k: v for k, v in tensors.items() if k != 'length_coef'}, folder/'floors.safetensors')


def cut_tensor(folder):
    from safetensors.numpy import load_file, save_file
    tensors = load_file(folder/'floors.safetensors')
    save_file(tensors | {'length_coef': np.ascontiguousarray(tensors['length_coef'][:, :-1])}, folder/'floors.safetensors')


@pytest.mark.parametrize('damage, message', [
    (lambda f: (f/'floors.json').unlink(), 'floors.json: no such file'),
    (lambda f: (f/'floors.json').write_text('{'), 'not readable as JSON'),
    (lambda f: (f/'floors.json').write_text('[]'), 'floors.json'),
    (edit_json(competition='lmsis'), 'did you mean lmsys'),
    (edit_json(hashed=1024), 'another version'),
    (edit_json(competition='wsdm'), 'floors.safetensors'),
    (lambda f: (f/'floors.safetensors').unlink(), 'floors.safetensors'),
    (lambda f: (f/'floors.safetensors').write_bytes(b''), 'floors.safetensors'),
    (lambda f: (f/'floors.safetensors').write_bytes((f/'floors.safetensors').read_bytes()[:-100]), 'floors.safetensors'),
    (drop_tensor, 'length_coef'), (cut_tensor, 'length_coef')])
def test_broken_folders(floors, tmp_path, damage, message):
    floors.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message): Floors.load(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match='no such file or folder'): Floors.load(tmp_path/'nothing')


def test_rows_without_labels(rows):
    with pytest.raises(UserError, match='no labels'): Floors.fit(rows.drop(columns=list(LMSYS.classes)), LMSYS)


# ---- real and generated competitions

def test_generated_competition_needs_reading(tmp_path):
    paths = write_sample(tmp_path, 300, 20)
    rows, _ = read_rows(paths['train.csv'])
    best = json.loads(paths['truth.json'].read_text())['best_possible']
    scores = {n: log_loss(labels_of(rows, LMSYS), p) for n, p in cross_predict(rows, LMSYS, make_folds(rows, 3)).items()}
    assert scores['length'] > best + .1 and scores['tfidf'] > best + .05


def test_real_rows(shared_data):
    rows, _ = read_rows(shared_data/'lmsys_train_1000.csv')
    scores = {n: log_loss(labels_of(rows, LMSYS), p) for n, p in cross_predict(rows, LMSYS, make_folds(rows, 3)).items()}
    assert 1.09 < scores['prior'] < 1.1 and scores['length'] < 1.08 and scores['tfidf'] < 1.075
