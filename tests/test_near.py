"Prompts that are nearly the same lie in one fold, whatever they are; files without such prompts keep their folds."
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from underdog.data.folds import fold_groups, make_folds, prompt_groups
from underdog.data.near import near_groups, tfidf

WORDS = [f'word{i}' for i in range(900)]


def texts_with_copies(rng, n, copies):
    "`n` texts of drawn words, of all lengths, and copies of some with a word more, a word less, other words' order."
    texts = [' '.join(rng.choice(WORDS, rng.integers(1, 120))) for _ in range(n)]
    for text in rng.choice(texts, copies):
        words, at = text.split(), rng.integers(100)
        if at < 30: words.append(str(rng.choice(WORDS)))
        elif at < 60 and len(words) > 1: del words[rng.integers(len(words))]
        elif at < 80: rng.shuffle(words)
        else: words = ['Please:', *words, '!']
        texts.append(' '.join(words))
    texts = list(dict.fromkeys(text.casefold() for text in texts))
    return [texts[i] for i in rng.permutation(len(texts))]


def frame(texts, rng):
    rows = pd.DataFrame(dict(prompt=[[text] for text in texts], response_a=[['x']]*len(texts)))
    rows[['a', 'b', 'tie']] = np.eye(3)[rng.integers(0, 3, len(texts))]
    return rows


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_no_pair_above_the_bound_is_divided(seed):
    "Against the cosines of all with all; a group is what hangs together by pairs, and no more."
    rng = np.random.default_rng(seed)
    texts = texts_with_copies(rng, 250, 120)
    unit = tfidf(texts).astype(float)
    cosines, groups = (unit @ unit.T).toarray(), near_groups(texts)
    together = groups[:, None] == groups
    assert together[cosines > .95 + 1e-6].all()
    # who is in a group with others is near one of them
    near = (cosines > .95 - 1e-6).sum(1) - (cosines.diagonal() > .95 - 1e-6)
    assert (near[np.bincount(groups)[groups] > 1] > 0).all()
    # and in one fold, which stays as large as the others
    rows = frame(texts, rng)
    folds = make_folds(rows, 5)
    assert all(len(set(folds[np.flatnonzero(row)])) == 1 for row in (cosines > .95 + 1e-6) if row.any())
    sizes, largest = np.bincount(folds), np.bincount(fold_groups(rows)).max()
    assert sizes.max() - sizes.min() <= 3*largest + 10


def test_the_same_prompts_are_together_and_a_file_without_near_ones_keeps_its_folds():
    rng = np.random.default_rng(1)
    texts = list(dict.fromkeys(' '.join(rng.choice(WORDS, 40)) for _ in range(300)))
    rows = frame(texts + texts[:100], rng)
    assert np.array_equal(fold_groups(rows), prompt_groups(rows))
    assert np.array_equal(make_folds(rows), make_folds(rows, groups=prompt_groups(rows)))
    # with a near one, the rows of both prompts
    rows = frame(texts + texts[:1] + [f'{texts[0].upper()} {WORDS[0]}'], rng)
    groups = fold_groups(rows)
    assert groups[0] == groups[-1] == groups[-2] == 0 and groups.max() == 299
    # in whatever order they come
    other = rows.assign(id=range(len(rows))).sample(frac=1, random_state=0).reset_index(drop=True)
    assert np.array_equal(make_folds(other), make_folds(rows)[other['id']])


@pytest.mark.parametrize('texts', [
    ['', '?', '…', 'a'],                                             # no words at all
    ['What is 2 + 2?', 'What is 3 + 3?', 'What is 2 + 3?'],
    ['翻译这句话', '解释这句话', '写一首诗'],
    ['Who is Ada Lovelace?', 'Who is Alan Turing?', 'Who is Grace Hopper?'],
], ids=['no words', 'numbers', 'Chinese', 'names'])
def test_short_prompts_that_ask_for_different_things_are_different(texts):
    assert len(set(near_groups(texts).tolist())) == len(texts)


def test_a_file_of_one_template_is_divided_all_the_same():
    "Where nearly everything is alike, only the same prompts are kept together: folds are made."
    rng = np.random.default_rng(2)
    long = ' '.join(rng.choice(WORDS, 400))
    rows = frame([f'{long} {i % 3} {i % 7}' for i in range(60)], rng)
    assert near_groups([p for p, in rows['prompt']]).max() == 0
    assert np.array_equal(fold_groups(rows), prompt_groups(rows)) and set(make_folds(rows, 3)) == {0, 1, 2}


def test_check_says_how_many(tmp_path):
    from underdog.console.main import app
    rng = np.random.default_rng(3)
    texts = [' '.join(rng.choice(WORDS, 30)) for _ in range(40)]
    texts += [f'{text} please' for text in texts[:4]]
    file = tmp_path/'train.csv'
    pd.DataFrame(dict(
        id=range(44), model_a='m', model_b='n', prompt=[json.dumps([text]) for text in texts],
        response_a=json.dumps(['x']), response_b=json.dumps(['y']),
        winner_model_a=[int(i % 3 == 0) for i in range(44)], winner_model_b=[int(i % 3 == 1) for i in range(44)],
        winner_tie=[int(i % 3 == 2) for i in range(44)])).to_csv(file, index=False)
    done = CliRunner().invoke(app, ['check', str(file), '--json'])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output.splitlines()[-1])['prompts nearly the same as another'] == 4


def test_a_second_start_does_not_look_for_them_again(world, monkeypatch):
    from underdog.model.settings import ModelConfig
    from underdog.training import prepare
    folds = lambda: prepare.describe(world/'train.csv', ModelConfig(str(world/'llama'), quantization='none')).rows['fold']
    first = folds()
    monkeypatch.setattr(prepare, 'fold_groups', None)
    assert folds().tolist() == first.tolist()
