"The generated competition: its law, its odd rows, its files."
import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

from underdog.core import UserError
from underdog.data.answers import davidson
from underdog.data.competition import LMSYS
from underdog.data.facts import all_facts
from underdog.data.folds import find_duplicates, labels_of, make_folds, swap_probs
from underdog.data.metrics import expected_loss
from underdog.data.rows import TEXTS, read_rows
from underdog.data.sample import make_sample, write_sample


@pytest.fixture(scope='module')
def sample(): return make_sample(400, 40, seed=2)


@pytest.fixture(scope='module')
def paths(tmp_path_factory): return write_sample(tmp_path_factory.mktemp('sample'), 400, 40, seed=2)


# ---- the law

@given(st.floats(-20, 20), st.floats(-20, 20), st.floats(-5, 5), st.floats(-5, 5))
def test_davidson(s_a, s_b, tie, shift):
    a, b, t = p = davidson(np.array(s_a), np.array(s_b), tie)
    assert abs(p.sum() - 1) < 1e-12 and (p > 0).all()
    np.testing.assert_allclose(swap_probs(p), davidson(np.array(s_b), np.array(s_a), tie), atol=1e-12)
    # only differences count
    np.testing.assert_allclose(p, davidson(np.array(s_a + shift), np.array(s_b + shift), tie), atol=1e-9)
    # Davidson's tie: the geometric mean of both wins
    np.testing.assert_allclose(t, np.exp(tie)*np.sqrt(a*b), rtol=1e-6)
    assert (a >= b) == (s_a >= s_b) or abs(s_a - s_b) < 1e-9


def test_labels_are_drawn_from_the_law():
    s = make_sample(3000, 20, seed=1)
    y = labels_of(s.train, LMSYS).astype(float)
    assert ((y == 1).sum(1) == 1).all() and set(np.unique(y)) == {0, 1}
    spread = np.sqrt((s.true_train*(1 - s.true_train)).sum(0))
    assert (np.abs((y - s.true_train).sum(0)) < 4*spread).all()
    losses = -np.log((y*s.true_train).sum(1))
    assert abs(losses.mean() - s.best_possible) < 4*losses.std()/np.sqrt(len(y))


@given(st.integers(0, 2**31), st.floats(.01, 2))
def test_nothing_beats_the_law_in_expectation(seed, noise):
    true = davidson(*np.random.default_rng(seed).normal(0, 2, (2, 30)))
    other = np.exp(np.log(true) + np.random.default_rng(seed + 1).normal(0, noise, true.shape))
    other /= other.sum(1, keepdims=True)
    assert -(true*np.log(other)).sum(1).mean() >= expected_loss(true)


def test_room_between_the_prior_and_the_best_possible(sample):
    prior = sample.true_train.mean(0)
    assert sample.true_train.shape == (400, 3) and sample.true_test.shape == (40, 3)
    np.testing.assert_allclose(sample.true_train.sum(1), 1)
    assert sample.best_possible < -(prior*np.log(prior)).sum() - .2
    assert sample.best_possible == expected_loss(sample.true_train)


def test_lengths_say_little(sample):
    n = lambda c: sample.train[c].map(lambda turns: sum(len(t or '') for t in turns)).to_numpy()
    difference, odds = n('response_a') - n('response_b'), np.log(sample.true_train[:, 0]/sample.true_train[:, 1])
    assert abs(pd.Series(difference).corr(pd.Series(odds), method='spearman')) < .4


def test_equal_arguments_equal_rows(sample):
    again, other = make_sample(400, 40, seed=2), make_sample(400, 40, seed=3)
    for x, y in ((sample.train, again.train), (sample.test, again.test)): pd.testing.assert_frame_equal(x, y)
    assert (sample.true_train == again.true_train).all() and not sample.train['id'].equals(other.train['id'])


# ---- the files

def test_every_odd_case_is_there(paths):
    raw = paths['train.csv'].read_text(encoding='utf-8')   # plain ASCII JSON inside: no lone surrogate breaks UTF-8
    odd = [r'\ud83d"', r'\ud83d\ude00', r'\u4f60', r'\u0645', 'null', '""""', '```python', r'\n', r'\""Quoted',
           r'\\backslash', '[SEP]', '<|im_end|>']
    for text in odd: assert text in raw, text
    df, report = read_rows(paths['train.csv'])
    repairs = ['null turns read as empty', 'empty turns', 'lone surrogates replaced']
    for what in repairs: assert report.repaired[what] >= 1, what
    notes = ['rows of several turns', 'rows with identical answers', 'rows with an empty answer',
             'rows repeated exactly', 'rows repeated with A and B exchanged']
    for what in notes: assert report.notes[what] >= 1, what
    assert report.notes['distinct prompts'] < len(df)
    assert df['id'].dtype == np.int64 and 2**31 < df['id'].max() < 2**32
    long = [max(len(t) for c in TEXTS for t in df[c][i]) for i in range(len(df))]
    assert 35_000 < max(long) < 37_000 and sum(n > 2000 for n in long) <= 2


def test_texts_are_short_enough_for_a_demo(sample):
    words = [len(f'{p[-1]} {a[-1]}'.split()) for p, a in zip(sample.train['prompt'], sample.train['response_a'])]
    assert 15 < np.median(words) < 50 and np.mean(np.array(words) > 80) < .01


def test_read_back_as_made(sample, paths):
    train, report = read_rows(paths['train.csv'])
    assert report.labelled and report.competition == 'llm-classification' and len(train) == 400
    assert train['id'].tolist() == sample.train['id'].tolist()
    assert (labels_of(train, LMSYS) == labels_of(sample.train, LMSYS)).all()
    fixed = lambda turns: [(t or '').encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') for t in turns]
    for c in TEXTS: assert train[c].tolist() == sample.train[c].map(fixed).tolist()
    test, report = read_rows(paths['test.csv'])
    assert not report.labelled and list(test.columns) == ['id', *TEXTS]
    assert test['id'].tolist() == sample.test['id'].tolist()


def test_truth_and_sample_submission(sample, paths):
    truth = json.loads(paths['truth.json'].read_text())
    assert truth['best_possible'] == sample.best_possible and truth['classes'] == ['a', 'b', 'tie']
    for part, true in (('train', sample.true_train), ('test', sample.true_test)):
        ids = getattr(sample, part)['id']
        np.testing.assert_allclose([truth[part][str(i)] for i in ids], true, atol=1e-6)
        assert len(truth[part]) == len(ids)
    submission = pd.read_csv(paths['sample_submission.csv'])
    assert tuple(submission.columns) == LMSYS.submission_columns
    assert submission['id'].tolist() == sample.test['id'].tolist()
    np.testing.assert_allclose(submission.iloc[:, 1:], 1/3)


def test_writing_again_gives_the_same_bytes_and_no_other_file(paths, tmp_path):
    for _ in range(2): again = write_sample(tmp_path/'new'/'folder', 400, 40, seed=2)
    assert sorted(p.name for p in (tmp_path/'new'/'folder').iterdir()) == sorted(again)
    for name, path in again.items(): assert path.read_bytes() == paths[name].read_bytes()


def test_folds_can_be_made_from_few_rows(tmp_path):
    train, _ = read_rows(write_sample(tmp_path, 60, 20)['train.csv'])
    assert set(make_folds(train)) == set(range(5))


def test_one_test_row_and_least_training_rows(tmp_path):
    paths = write_sample(tmp_path, 20, 1)
    train, test = (read_rows(paths[n])[0] for n in ('train.csv', 'test.csv'))
    assert len(train) == 20 and len(test) == 1 and set(find_duplicates(train)['kind']) == {'exact', 'swapped'}


@pytest.mark.parametrize('n', [(19, 60), (0, 60), (600, 0), (600, -1)])
def test_too_few_rows(n):
    with pytest.raises(UserError, match='at least'): make_sample(*n)


# ---- the facts: only fit to the prompt tells

def test_every_answer_is_as_often_right_as_wrong():
    right, wrong = Counter(), Counter()
    for fact in all_facts():
        right[fact.answer, fact.sayings] += 1
        for other in fact.others: wrong[other, fact.sayings] += 1/len(fact.others)
    assert set(right) == set(wrong)
    for answer, n in right.items(): assert abs(wrong[answer] - n) < 1e-9, answer


def test_a_fact_is_asked_once_so_that_held_out_prompts_are_new(sample):
    facts = {fact.question for fact in all_facts()}
    assert len(facts) == len(all_facts()) > 500
    assert np.mean([turns[-1] in facts for turns in sample.train['prompt']]) > .98


def test_letters_of_the_question_do_not_tell_the_answer():
    def grams(text): return {text.lower()[i:i + 4] for i in range(len(text) - 3)}
    def overlap(fact, answer): return len(grams(fact.question) & grams(answer))
    right = np.mean([overlap(fact, fact.answer) for fact in all_facts()])
    wrong = np.mean([np.mean([overlap(fact, other) for other in fact.others]) for fact in all_facts()])
    assert right < wrong + .02, (right, wrong)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path/'data').write_text('mine')
    with pytest.raises(UserError, match='a file has this name'): write_sample(tmp_path/'data', 40, 10)
    assert (tmp_path/'data').read_text() == 'mine'
