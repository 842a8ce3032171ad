"The baselines: symmetric, hardly ever worse than the prior, fitted on other folds, saved without pickle."
import json
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from scipy.sparse import vstack

from underdog.core import UserError
from underdog.data.competition import LMSYS, WSDM
from underdog.data.counts import HASHED, count_rows, count_words, features, turned
from underdog.data.designs import Units
from underdog.data.floors import FLOORS, Floors, best_floor, fit_floors, cross_predict
from underdog.data.folds import labels_of, make_folds, swap_probs, swap_rows
from underdog.data.logistic import Dense, fit_logistic
from underdog.data.metrics import softmax
from underdog.data.rows import TEXTS, read_rows
from underdog.data.sample import write_sample

WORDS = 'the of garden river music answer small green and please maybe paper number seven window'.split()
ODD_TEXTS = ['', ' ', 'x'*3_600, '- a\n- b\n1. c', '```py\nx = 1\n```', '**bold** # not\n# heading', '1234567890?!:',
             '\U0001f600\u4f60\u597d', '\ufffd\n\n\n']
TEXT = st.text(st.characters(exclude_categories=['Cs']), max_size=60) | st.sampled_from(ODD_TEXTS)
# a list of turns for each of the three columns, equally many in all of them
ROW = st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=3).map(lambda turns: [list(t) for t in zip(*turns)])


def table_of(rows):
    "DataFrame of drawn rows."
    return pd.DataFrame({c: pd.Series([row[j] for row in rows], dtype=object) for j, c in enumerate(TEXTS)})


ROWS = st.lists(ROW, min_size=1, max_size=4).map(table_of)
quick = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


def log_loss(y, p): return float(-(y*np.log(p)).sum(1).mean())


def any_class(rng, a, b): return rng.integers(3)


def longer_wins(rng, a, b): return int(len(a) < len(b)) if len(a) != len(b) else 2


def some_words(rng): return rng.choice(WORDS, rng.integers(3, 30))


def make_rows(n, seed=0, comp=LMSYS, label=any_class, words=some_words):
    "Rows with answers of random words; `label` draws the class from both answers' words."
    rng = np.random.default_rng(seed)
    a = [list(words(rng)) for _ in range(n)]
    b = [list(words(rng)) for _ in range(n)]
    y = np.eye(comp.n_classes)[[label(rng, x, z) for x, z in zip(a, b)]]
    rows = pd.DataFrame({
        'id': range(n),
        'prompt': [[f'question {i}'] for i in range(n)],
        'response_a': [[' '.join(x)] for x in a],
        'response_b': [[' '.join(x)] for x in b]})
    return with_labels(rows, y, comp)


def with_labels(rows, y, comp=LMSYS): return rows.assign(**dict(zip(comp.classes, y.T)))


def held_out_losses(rows, names=FLOORS):
    "{baseline of `names`: log loss} on held-out folds."
    predictions = cross_predict(rows, LMSYS, make_folds(rows, 3), names)
    return {name: log_loss(labels_of(rows, LMSYS), p) for name, p in predictions.items()}


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    paths = write_sample(tmp_path_factory.mktemp('sample'), 150, 20)
    return read_rows(paths['train.csv'])[0]


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
    # equal answers, equal chances
    same = rows.assign(response_b=rows['response_a'])
    for p in floors.predict(same).values(): np.testing.assert_allclose(p[:, 0], p[:, 1], atol=1e-12)


def test_fitted_on_exchanged_rows_it_is_the_same(rows, floors):
    predictions = floors.predict(rows)
    exchanged = Floors.fit(swap_rows(rows), LMSYS)
    for name, p in exchanged.predict(rows).items(): np.testing.assert_allclose(p, predictions[name], atol=.02)


def test_a_row_does_not_depend_on_its_neighbours(rows, floors):
    predictions = floors.predict(rows)
    alone = floors.predict(rows.iloc[[5]])
    for name, p in alone.items(): np.testing.assert_allclose(p[0], predictions[name][5], atol=1e-12)


def test_something_never_seen_moves_the_odds_only_so_far():
    plain = make_rows(200)
    plain.at[0, 'response_a'] = ['? ' + plain['response_a'][0][0]]   # one question mark in all rows
    odd = plain.iloc[[1]].assign(response_a=[['?'*5000 + '9'*5000 + '!'*5000]])
    # labels are noise here; without the cut it is 1e-9 and less
    for p in Floors.fit(plain, LMSYS).predict(odd).values(): assert p.min() > .001


# ---- the same as scikit-learn's, on every row in both orders

@quick
@given(st.lists(TEXT, min_size=1, max_size=5))
def test_words_are_hashed_as_scikit_learn_does(texts):
    from sklearn.feature_extraction.text import HashingVectorizer
    vectorizer = HashingVectorizer(n_features=HASHED, ngram_range=(1, 2), alternate_sign=False, norm=None)
    assert (count_words(texts) != vectorizer.transform(texts)).nnz == 0


@quick
@given(TEXT | st.text(st.sampled_from('7²٣½a🙂 \n\t\x85-*#.)')))
def test_characters_are_counted_as_one_by_one(text):
    counts = np.expm1(features({c: [[text]] for c in TEXTS})[1][0, 12:24]).round()
    assert counts[3] == len(re.findall(r'^\s*(?:[-*•]|\d+[.)])\s', text, re.M))
    assert counts[5] == len(re.findall(r'^#+ ', text, re.M))
    assert counts[7] == sum(map(str.isdigit, text))
    assert counts[11] == sum(not c.isascii() for c in text)


def drawn_labels(kind, wins, rng):
    "Labels (n, C) of one `kind`, in which the larger `wins`, the likelier A."
    y = np.eye(3)[np.where(np.abs(wins) < .4, 2, (wins < 0).astype(int))]
    if kind == 'two classes': y = np.eye(2)[(wins < 0).astype(int)]
    if kind == 'no tie': y = np.eye(3)[(wins < 0).astype(int)]
    return rng.dirichlet(np.ones(3), len(y))*.3 + .7*y if kind == 'soft' else y


@pytest.mark.parametrize('kind', ['hard', 'soft', 'two classes', 'no tie'])
def test_half_the_rows_give_what_scikit_learn_finds_with_all(kind):
    from sklearn.linear_model import LogisticRegression
    rng, n = np.random.default_rng(0), 200
    odd, even = rng.normal(size=(n, 6)), rng.normal(size=(n, 4))
    y = drawn_labels(kind, odd[:, 0] + rng.normal(size=n), rng)
    k = y.shape[1]
    # soft labels and missing classes: a row for each class, weighted
    x = np.vstack([np.hstack([odd, even]), np.hstack([-odd, even])])
    weights = np.vstack([y, swap_probs(y)])
    if kind in ('soft', 'no tie'): weights = weights + 1e-9
    x, classes, weights = np.vstack([x]*k), np.repeat(np.arange(k), 2*n), weights.T.ravel()
    used = weights > 0
    model = LogisticRegression(C=.1, max_iter=300, tol=1e-3).fit(x[used], classes[used], sample_weight=weights[used])
    p = softmax(fit_logistic(Dense(odd, even), y, .1).logits(Dense(odd, even), k))
    np.testing.assert_allclose(p, model.predict_proba(np.hstack([odd, even])), atol=1e-7)


def test_the_words_of_a_design_are_tfidf_vectors(rows):
    from sklearn.feature_extraction.text import TfidfTransformer
    counts = count_rows(rows)
    units = Units.of([counts.span(0, 50), counts.span(50, len(rows))])
    design = units.design('tfidf', [counts.span(0, 50), counts.span(50, len(rows))])
    a, b = (count_words(['\n'.join(turns) for turns in rows[c]]).astype(float) for c in TEXTS[1:])
    # scikit-learn's weights are ours where at least two answers hold a word
    tfidf = TfidfTransformer(sublinear_tf=True).fit(vstack([a, b]))
    tfidf.idf_ = np.where(units.idf > 0, tfidf.idf_, 0)
    difference = 8*(tfidf.transform(a) - tfidf.transform(b))
    rng = np.random.default_rng(0)
    u, g = rng.normal(size=design.odd_size), rng.normal(size=len(rows))
    np.testing.assert_allclose(design.odd_dot(u), difference @ u[:HASHED] + design.dense.odd @ u[HASHED:], atol=1e-9)
    np.testing.assert_allclose(design.odd_sum(g)[:HASHED], difference.T @ g, atol=1e-9)


def test_fits_that_share_their_counts_are_those_of_the_rows_alone(rows):
    folds = np.random.default_rng(0).permutation(len(rows)) % 4 - 1
    floors, predictions = fit_floors(rows, LMSYS, folds)
    for fold, train in ((-1, folds >= 0), (1, (folds >= 0) & (folds != 1))):
        alone = Floors.fit(rows[train], LMSYS).predict(rows[folds == fold])
        for name in FLOORS: np.testing.assert_allclose(predictions[name][folds == fold], alone[name], atol=1e-9)
    for name, p in floors.predict(rows[folds == -1]).items(): assert (p == predictions[name][folds == -1]).all()


# ---- what they learn

def test_the_length_baseline_learns_lengths():
    train, test = make_rows(300, 0, label=longer_wins), make_rows(200, 1, label=longer_wins)
    p, y = Floors.fit(train, LMSYS).predict(test), labels_of(test, LMSYS)
    assert log_loss(y, p['length']) < .5 < log_loss(y, p['prior']) - .1


def test_the_words_baseline_learns_words():
    def eight_words(rng): return rng.permutation(WORDS)[:8]
    def polite_wins(rng, a, b): return 2 if ('please' in a) == ('please' in b) else int('please' in b)
    train, test = (make_rows(n, seed, label=polite_wins, words=eight_words) for n, seed in ((400, 0), (200, 1)))
    p, y = Floors.fit(train, LMSYS).predict(test), labels_of(test, LMSYS)
    assert log_loss(y, p['tfidf']) < log_loss(y, p['length']) - .1
    assert best_floor(y, p) == 'tfidf'


@pytest.mark.parametrize('comp', [LMSYS, WSDM])
def test_noise_is_never_much_worse_than_the_prior(comp):
    noise = dict(comp=comp, label=lambda rng, a, b: rng.integers(comp.n_classes))
    train, test = make_rows(150, 0, **noise), make_rows(400, 1, **noise)
    p, y = Floors.fit(train, comp).predict(test), labels_of(test, comp)
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
    soft = Floors.fit(with_labels(rows, y), LMSYS).predict(rows)
    for name, p in floors.predict(rows).items(): np.testing.assert_allclose(soft[name], p, atol=.03)


def test_soft_labels_teach_more_than_their_rounding():
    def law(df):
        "Of five people one sees a tie; the others prefer A the more, the more words it has than B."
        words = lambda column: np.array([len(turns[0].split()) for turns in column])
        a = 1/(1 + np.exp(-.15*(words(df['response_a']) - words(df['response_b']))))
        return np.stack([.8*a, .8*(1 - a), np.full(len(df), .2)], 1)

    def predictions(y): return Floors.fit(with_labels(train, y), LMSYS).predict(test)['length']

    train, test = make_rows(300, 0), make_rows(300, 1)
    shares, truth = law(train), law(test)
    rounded = np.eye(3)[shares.argmax(1)]
    best = log_loss(truth, truth)
    assert log_loss(truth, predictions(shares)) < best + .02 < log_loss(truth, predictions(rounded))


# ---- held out

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


def test_a_competition_by_name_other_names_and_no_rows(rows):
    assert Floors.fit(rows, 'lmsys').competition == 'lmsys'
    for names in (['length'], 'length', ('prior', 'length')):
        with pytest.raises(UserError, match='FLOORS .*prior, length, tfidf.* or BASELINES .*stack.* wanted'):
            Floors.fit(rows, 'lmsys', names)
    with pytest.raises(UserError, match='no rows'): Floors.fit(rows, 'lmsys').predict(rows.iloc[:0])
    with pytest.raises(UserError, match='no rows'): Floors.fit(rows.iloc[:0], 'lmsys')


def test_best_floor():
    predictions = dict(prior=np.full((3, 3), 1/3), length=np.eye(3)*.7 + .1, tfidf=np.eye(3)*.4 + .2)
    assert best_floor(np.eye(3), predictions) == 'length'


# ---- files

def test_saved_and_loaded(rows, floors, tmp_path):
    for _ in range(2): floors.save(tmp_path/'new'/'floors')   # also over an older one
    assert sorted(p.name for p in (tmp_path/'new'/'floors').iterdir()) == ['floors.json', 'floors.safetensors']
    loaded = Floors.load(tmp_path/'new'/'floors')
    assert loaded.competition == 'lmsys'
    for name, p in loaded.predict(rows).items(): assert (p == floors.predict(rows)[name]).all()


def change_json(**changes):
    "Damage: other values in floors.json."
    def damage(folder):
        values = json.loads((folder/'floors.json').read_text()) | changes
        (folder/'floors.json').write_text(json.dumps(values))
    return damage


def change_length_coef(change):
    "Damage: `change` of the tensors takes away all or a part of one."
    from safetensors.numpy import load_file, save_file
    def damage(folder):
        tensors = load_file(folder/'floors.safetensors')
        change(tensors)
        save_file(tensors, folder/'floors.safetensors')
    return damage


def cut_column(tensors): tensors['length_coef'] = np.ascontiguousarray(tensors['length_coef'][:, :-1])


def cut_file(folder):
    whole = (folder/'floors.safetensors').read_bytes()
    (folder/'floors.safetensors').write_bytes(whole[:-100])


@pytest.mark.parametrize('damage,message', [
    (lambda folder: (folder/'floors.json').unlink(), 'floors.json: no such file'),
    (lambda folder: (folder/'floors.json').write_text('{'), 'not readable as JSON'),
    (lambda folder: (folder/'floors.json').write_text('[]'), 'floors.json'),
    (change_json(competition='lmsis'), 'did you mean lmsys'),
    (change_json(hashed=1024), 'another version'),
    (change_json(competition='wsdm'), 'floors.safetensors'),
    (lambda folder: (folder/'floors.safetensors').unlink(), 'floors.safetensors'),
    (lambda folder: (folder/'floors.safetensors').write_bytes(b''), 'floors.safetensors'),
    (cut_file, 'floors.safetensors'),
    (change_length_coef(lambda tensors: tensors.pop('length_coef')), 'length_coef'),
    (change_length_coef(cut_column), 'length_coef')])
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
    scores = held_out_losses(rows)
    assert scores['length'] > best + .1 and scores['tfidf'] > best + .05


def test_real_rows(shared_data):
    rows, _ = read_rows(shared_data/'lmsys_train_1000.csv')
    scores = held_out_losses(rows)
    assert 1.09 < scores['prior'] < 1.1 and scores['length'] < 1.08 and scores['tfidf'] < 1.075


def test_a_span_of_rows_shares_its_words_with_the_whole(rows):
    "Also where it is a small part, and turned: two fits at a time would hold half a gigabyte of copies."
    whole = count_rows(rows)
    part = whole.span(3, 9)
    for m, all_of_it in ((part.a, whole.a), (part.b, whole.b)):
        for view in (m, turned(m)):
            assert np.shares_memory(view.data, all_of_it.data) and np.shares_memory(view.indices, all_of_it.indices)
        np.testing.assert_array_equal(m.toarray(), all_of_it[3:9].toarray())
        np.testing.assert_array_equal(turned(m).toarray(), m.toarray().T)
