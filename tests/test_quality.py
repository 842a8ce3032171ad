"The rules of `benchmarks.quality`: who is first, what is paired, and that the peers read the same rows."
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import quality   # noqa: E402
from benchmarks.quality import BLEND, OURS, STACK, START, figures_of, promises, some_rows, verdict   # noqa: E402
from benchmarks.quality_peers import Classified   # noqa: E402


def sure(y, share): return share*y + (1 - share)/3


def test_first_tied_and_behind_are_told_apart():
    rng = np.random.default_rng(0)
    y = np.eye(3)[rng.integers(0, 3, 300)]
    sides = {OURS: sure(y, .1), BLEND: sure(y, .2), STACK: sure(y, .1), 'Trainer, LoRA': sure(y, .05)}
    groups = np.arange(300)//2
    figures = figures_of(y, sides, groups)
    assert verdict(figures) == 'first' and figures[BLEND]['behind_blend'] == 0
    assert figures[OURS]['behind_interval'][0] > 0, 'the blend is better on every row'
    # better on every other prompt, worse on the others
    half = np.where(groups[:, None] % 2, sure(y, .335), sure(y, .09))
    assert verdict(figures_of(y, sides | {STACK: half}, groups)) == f'tied with {STACK}'
    assert verdict(figures_of(y, sides | {STACK: sure(y, .5)}, groups)) == f'behind {STACK}'


def test_a_model_that_is_its_baseline_is_tied_with_it():
    y = np.eye(3)[np.random.default_rng(0).integers(0, 3, 300)]
    stack, groups = sure(y, .1), np.arange(300)
    sides = {OURS: stack, BLEND: sure(y, .09), STACK: stack, START: stack, 'Trainer, LoRA': sure(y, .05)}
    figures = figures_of(y, sides, groups)
    assert figures[STACK]['behind_interval'][1] < 0, 'the blend is behind on every row'
    assert verdict(figures) == f'tied with {STACK}'
    kept = promises(y, sides, groups)
    assert kept['model less its start'] == [0, 0, 0] and kept['blend less its best part'][1] > 0


class Words:
    "A tokenizer of words, each its own id."
    def __init__(self): self.known = {}

    def __call__(self, text, add_special_tokens, truncation=False, max_length=None):
        ids = [self.known.setdefault(word, len(self.known)) for word in text.split()]
        return SimpleNamespace(input_ids=ids[:max_length] if truncation else ids)


def test_the_trainer_gets_whole_texts_up_to_its_budget_and_swapped_labels():
    tok, names = Words(), ['prompt', 'left', 'right']
    rows = [tuple(f'{name}{i} '*40 for name in names) for i in range(50)]
    plain = Classified(tok, rows, [0, 1, 2]*16 + [0, 1], 30)
    assert max(len(item['input_ids']) for item in plain.items) <= 60
    swapped = Classified(tok, rows, [0, 1, 2]*16 + [0, 1], 30, np.random.default_rng(0))
    for i, (one, other) in enumerate(zip(plain.items, swapped.items)):
        assert sorted(one['input_ids']) == sorted(other['input_ids'])
        exchanged = one['input_ids'] != other['input_ids']
        assert other['labels'] == ((1, 0, 2)[one['labels']] if exchanged else one['labels']), i
    assert 10 < sum(one['input_ids'] != other['input_ids'] for one, other in zip(plain.items, swapped.items)) < 40


def test_the_first_rows_of_a_file_are_a_file(tmp_path):
    pd.DataFrame(dict(id=['01', '2', '3'], text=['a', '', 'null'])).to_csv(tmp_path/'rows.csv', index=False)
    part = some_rows(tmp_path/'rows.csv', tmp_path/'out', 2)
    assert part.read_text() == 'id,text\n01,a\n2,\n'
    assert some_rows(tmp_path/'rows.csv', tmp_path/'out', 0) == tmp_path/'rows.csv'


@pytest.mark.parametrize('more', ['{"lrr": 1}', '{"layers": 3}', '[1]', '{bad'])
def test_settings_that_would_be_for_one_side_or_for_none_are_refused(more, monkeypatch, capsys):
    "A mistyped name would be left out, and other layers than those of the peers are another contest."
    monkeypatch.setattr(sys, 'argv', ['quality', '--train', 'x.csv', '--more', more])
    with pytest.raises(SystemExit): quality.main()
    assert '--more' in capsys.readouterr().err
