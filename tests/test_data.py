"data: every bad file is one clear message, odd text is repaired and counted, swaps are involutions, folds do not leak."
import csv
import io
import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from underdog.core import UserError
from underdog.data.competition import LLM_FINETUNING, LMSYS, WSDM
from underdog.data.csvfile import mend_cells, read_cells, repair
from underdog.data.folds import (
    find_duplicates, fold_groups, labels_of, make_folds, prompt_groups, swap_probs, swap_rows)
from underdog.data.rows import TEXTS, data_hash, read_rows, read_whatever, write_rows

HEAD = 'id,model_a,model_b,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie\n'
slow_ok = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


def row(id=7, prompt=('Hi',), a=('x',), b=('y',), labels=(1, 0, 0)):
    "One csv line in the competition's format."
    cells = [id, 'gpt', 'llama', *(t if isinstance(t, str) else json.dumps(list(t)) for t in (prompt, a, b)), *labels]
    line = io.StringIO()
    csv.writer(line, lineterminator='\n').writerow(cells)
    return line.getvalue()


GOOD = HEAD + row(1) + row(2, ('p', 'q'), ('a', 'b'), ('c', 'd'), (0, 1, 0)) + row(3, labels=(0, 0, 1))


@pytest.fixture
def read(tmp_path):
    "Reads text or bytes as train.csv."
    def read(content, **kw):
        if isinstance(content, str): content = content.encode('utf-8', 'surrogatepass')
        (tmp_path/'train.csv').write_bytes(content)
        return read_rows(tmp_path/'train.csv', **kw)
    return read


# ---- bad input: (content, what the message must hold)
BAD = {
    'missing text column': (GOOD.replace('response_b,', 'answer_b,'), ["'response_b'", 'did you mean']),
    'missing id': (GOOD.replace('id,', 'key,', 1), ["'id'"]),
    'missing label column': (GOOD.replace('winner_tie', 'tied'), ["'winner_tie'"]),
    'column twice': (GOOD.replace('model_b,prompt', 'prompt,prompt'), ["'prompt'", 'twice']),
    'broken JSON': (GOOD + row(4, a='["x"'), ['row 4', 'id 4', 'response_a']),
    'not a list': (GOOD + row(4, b='"text"'), ['row 4', 'id 4', 'response_b', 'list']),
    'plain text': (GOOD + row(4, prompt='why?'), ['row 4', 'id 4', 'prompt', 'JSON list']),
    'an object': (GOOD + row(4, b='{"a": 1}'), ['row 4', 'response_b', 'list']),
    'list of numbers': (GOOD + row(4, prompt='[1]'), ['row 4', 'id 4', 'prompt', 'int']),
    'nested list': (GOOD + row(4, prompt='[["x"]]'), ['row 4', 'prompt', 'list']),
    'empty list': (GOOD + row(4, prompt='[]'), ['row 4', 'prompt', 'empty']),
    'empty cell': (GOOD + row(4, prompt=''), ['row 4', 'prompt']),
    'deep nesting': (GOOD + row(4, prompt='['*50_000), ['row 4', 'prompt']),
    'NaN turn': (GOOD + row(4, prompt='[NaN]'), ['row 4', 'prompt', 'float']),
    'unequal turns': (GOOD + row(4, a=('x', 'z')), ['row 4', 'id 4', '1, 2 and 1 turns', 'response_a']),
    'duplicate id': (GOOD + row(2), ['row 4', 'column id', '2', 'row 2']),
    'empty id': (GOOD + row(''), ['row 4', 'column id', 'empty']),
    'unprintable id': (GOOD + row('a\0b'), ['row 4', 'column id', 'printable']),
    'labels of sum 2': (GOOD + row(4, labels=(1, 1, 0)), ['row 4', 'id 4', 'winner_model_a', 'sum 2']),
    'labels of sum 0': (GOOD + row(4, labels=(0, 0, 0)), ['row 4', 'id 4', 'sum 0']),
    'negative label': (GOOD + row(4, labels=(-1, 1, 1)), ['row 4', 'winner_model_a', '-1']),
    'word as label': (GOOD + row(4, labels=(0, 'yes', 0)), ['row 4', 'id 4', 'winner_model_b', 'yes']),
    'empty label': (GOOD + row(4, labels=(1, '', 0)), ['row 4', 'winner_model_b']),
    'nan label': (GOOD + row(4, labels=('nan', 1, 0)), ['row 4', 'winner_model_a']),
    'too few fields': (GOOD + '4,"[""x""]"\n', ['row 4', 'id 4', '2 fields', '9']),
    'too many fields': (GOOD + row(4).strip() + ',1\n', ['row 4', '10 fields']),
    'cut within quotes': (GOOD + row(4)[:30], ['row 4', 'fields']),
    'Latin-1': (GOOD.encode() + row(4, prompt='["é"]').encode('latin-1'), ['line 5', 'not UTF-8', 'iconv']),
    'Windows-1252': (GOOD.encode() + '4,“'.encode('cp1252'), ['line 5', 'not UTF-8', '0x93']),
    'UTF-16 with mark': (GOOD.encode('utf-16'), ['UTF-16', 'iconv']),
    'UTF-16 without mark': (GOOD.encode('utf-16-le'), ['UTF-16']),
    'UTF-16 big endian': (GOOD.encode('utf-16-be'), ['UTF-16']),
    'zip archive': (b'PK\x03\x04\x14\0\0\0', ['zip', 'unpack']),
    'Excel workbook': (b'PK\x03\x04\x14\0\x06\0', ['Excel', 'save it as csv']),
    'semicolons': (GOOD.replace(',', ';'), ["';' or tabs", 'commas are wanted', 'save it as']),
    'tabs': (GOOD.replace(',', '\t'), ["';' or tabs", 'commas are wanted']),
    'gzip archive': (b'\x1f\x8b\x08\0', ['gzip', 'unpack']),
    'parquet called csv': (b'PAR1\x15\x04', ['parquet']),
    'empty file': ('', ['empty']),
    'only a mark': (b'\xef\xbb\xbf', ['empty']),
    'blank lines': ('\n\r\n\n', ['empty']),
    'header only': (HEAD, ['no rows']),
    'a carriage return by itself': (GOOD + '4,a\rb,c\n', ['train.csv']),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_files_are_one_clear_message(read, name):
    content, held = BAD[name]
    with pytest.raises(UserError) as e: read(content)
    message = str(e.value)
    assert all(h in message for h in ['train.csv', *held]), message
    assert '\n' not in message and len(message) < 500 and message.isprintable()
    assert '; ' in message or ': ' in message   # what, then the remedy


def test_missing_file_folder_and_broken_parquet_are_named(tmp_path):
    with pytest.raises(UserError, match='nowhere.csv.*no such file'): read_rows(tmp_path/'nowhere.csv')
    with pytest.raises(UserError, match='folder'): read_rows(tmp_path)
    (tmp_path/'x.parquet').write_bytes(b'PAR1 nothing')
    with pytest.raises(UserError, match='x.parquet.*parquet'): read_rows(tmp_path/'x.parquet')


def test_labels_that_are_asked_for_must_be_there(read):
    unlabelled = 'id,prompt,response_a,response_b\n1,"[""p""]","[""a""]","[""b""]"\n'
    df, report = read(unlabelled)
    assert not report.labelled and 'a' not in df
    with pytest.raises(UserError, match='winner_model_a'): read(unlabelled, labelled=True)
    with pytest.raises(UserError, match='no labels'): labels_of(df, LMSYS)
    assert 'a' not in read(GOOD, labelled=False)[0]
    # labels that nobody reads are nobody's problem
    assert read(GOOD.replace(',1,0,0', ',7,0,0'), labelled=False)[1].rows == 3


def test_a_competition_may_be_given_by_its_name(read):
    assert read(GOOD, comp='lmsys')[1].competition == read(GOOD, comp=LMSYS)[1].competition == 'lmsys'
    with pytest.raises(UserError, match="unknown competition 'lmsis': did you mean lmsys"): read(GOOD, comp='lmsis')


def test_files_are_found_by_their_name_as_text(tmp_path):
    (tmp_path/'t.csv').write_text('id,prompt\n1,x\n')
    for reader in (read_cells, mend_cells):
        assert reader(str(tmp_path/'t.csv')).values.tolist() == [['1', 'x']]
        with pytest.raises(UserError, match='no such file'): reader(str(tmp_path/'nowhere.csv'))


def test_no_rows_are_no_traceback(read, tmp_path):
    df = read(GOOD)[0].iloc[:0]
    with pytest.raises(UserError, match='0 distinct prompts cannot fill 5 folds'): make_folds(df)
    assert len(fold_groups(df)) == len(find_duplicates(df)) == 0
    (tmp_path/'test.csv').write_text(HEAD)
    assert [*read_whatever(tmp_path/'test.csv', LMSYS)] == ['id', *TEXTS]


# ---- what is fine, or repaired
def test_text_is_kept_to_the_letter(read):
    turns = ('null', 'NA', 'None', '', 'he/him "q" \\ \r\n\t \u2028 😀', '1.0', 'x'*200_000)
    df, report = read(HEAD + row(1, turns, turns, turns))
    assert tuple(df['prompt'][0]) == turns == tuple(df['response_b'][0]) and report.repaired == {'empty turns': 3}
    assert read(HEAD + row(1, prompt='["he\\/him"]'))[0]['prompt'][0] == ['he/him']


def test_line_ends_marks_blank_lines_and_spaces_in_the_header_do_not_matter(read):
    want = read(GOOD)[0]
    spellings = [
        GOOD.replace('\n', '\r\n'),
        '\ufeff' + GOOD,
        GOOD.replace('\n', '\n\n'),
        GOOD.rstrip('\n'),
        GOOD.replace('winner_tie', ' winner_tie ')]
    for same in spellings: pd.testing.assert_frame_equal(read(same)[0], want)


def test_null_turns_are_empty_and_counted(read):
    df, report = read(HEAD + row(1, ('a', 'b'), (None, ''), (None, None)))
    assert df['response_a'][0] == ['', ''] and report.repaired == {'null turns read as empty': 3, 'empty turns': 1}
    assert report.notes['rows with an empty answer'] == 1 and report.notes['rows with identical answers'] == 1


@pytest.mark.parametrize('cell,want', [
    ('["\\ud83d"]', '\ufffd'), ('["\ud83d"]', '\ufffd'), ('["a\\udc00b"]', 'a\ufffdb'),
    ('["\\ud83d\\ude00"]', '😀'), ('["\ud83d\ude00"]', '😀')])
def test_lone_surrogates_are_replaced_and_pairs_joined(read, cell, want):
    df, report = read(HEAD + row(1, prompt=cell))
    assert df['prompt'][0] == [want]
    assert report.repaired or want == '😀'
    df['prompt'][0][0].encode()


def test_surrogate_bytes_are_read_wherever_a_buffer_ends(read):
    for n in range(8180, 8196):
        text = 'x'*(n - len(HEAD)) + '\ud83dz'
        df, _ = read(HEAD + row(1, prompt=f'["{text}"]'))
        assert df['prompt'][0][0].endswith('x\ufffdz')


def test_nul_characters_are_removed_and_counted(read):
    df, report = read(HEAD + row(1, prompt='["a\\u0000b"]', a='["c\0d"]'))
    assert (df['prompt'][0], df['response_a'][0]) == (['ab'], ['cd'])
    assert report.repaired == {'NUL characters removed': 2}


@given(st.text(st.characters(categories=None)))
def test_repair_gives_text_that_can_be_encoded(text):
    counts = Counter()
    repaired = repair(text, counts)
    assert '\0' not in repaired and repaired.encode() is not None
    assert repair(repaired, Counter()) == repaired and (repaired == text) == (not counts)


@pytest.mark.parametrize('ids,want', [
    ((1, 2**32, 2**53 + 1), (1, 2**32, 2**53 + 1)),
    (('1.0', '2.0', '30'), (1, 2, 30)),
    (('a', '1.0', '2'), ('a', '1.0', '2')),
    (('007', '7', '8'), ('007', '7', '8')),
    ((2**63, 2**64, 5), (str(2**63), str(2**64), '5')),
    (('-1', '0', '1'), (-1, 0, 1)),
    (('None1', 'null', 'NA'), ('None1', 'null', 'NA'))])
def test_ids_are_int64_where_that_loses_nothing(read, ids, want):
    df = read(HEAD + ''.join(map(row, ids)))[0]
    assert tuple(df['id'].tolist()) == want
    assert df['id'].dtype == (np.int64 if isinstance(want[0], int) else df['id'].dtype)


@pytest.mark.parametrize('labels,want', [
    (('1.0', '0.0', '0'), (1, 0, 0)),
    ((.2, .3, .5), (.2, .3, .5)),
    ((.3333, .3333, .3334), (.3333, .3333, .3334)),
    (('1e-1', ' .4', .5), (.1, .4, .5))])
def test_float_and_soft_labels(read, labels, want):
    df = read(HEAD + row(1, labels=labels))[0]
    y = labels_of(df, LMSYS)
    assert y.dtype == np.float32 and np.allclose(y, want, atol=1e-6)
    assert np.isclose(df[['a', 'b', 'tie']].sum(axis=1)[0], 1)


def test_llm_classification_files_are_lmsys_files(read):
    df, report = read(GOOD, comp=LLM_FINETUNING)
    pd.testing.assert_frame_equal(df, read(GOOD)[0])
    assert (report.competition, report.rows, report.file) == ('llm-classification', 3, 'train.csv')
    assert ('rows', 3) in report.table()


# ---- WSDM
def wsdm_frame():
    return pd.DataFrame({
        'id': ['a1', 'b2', 'c3'],
        'prompt': ['Hi', '["not", "json"]', 'null'],
        'response_a': ['x', 'b\rc', ''],
        'response_b': ['y', '"q", z', None],
        'winner': ['model_a', 'model_b', 'model_a'],
        'language': ['English', 'Русский', 'unknown']}, dtype=object)


def test_wsdm_parquet_and_csv_read_alike(tmp_path):
    table = wsdm_frame()
    table.to_parquet(tmp_path/'train.parquet')
    df, report = read_rows(tmp_path/'train.parquet')
    assert report.competition == 'wsdm' and report.labelled and df['language'].tolist()[1] == 'Русский'
    assert df['prompt'].tolist() == [['Hi'], ['["not", "json"]'], ['null']] and df['response_b'][2] == ['']
    assert labels_of(df, WSDM).tolist() == [[1, 0], [0, 1], [1, 0]] and 'tie' not in df
    write_rows(tmp_path/'train.csv', df, WSDM)
    back = read_rows(tmp_path/'train.csv')[0]
    for c in df: assert back[c].tolist() == df[c].tolist(), c
    test = 'id,prompt,response_a,response_b,scored\nz9,"p, q",x\ud83d,y,1\n'
    (tmp_path/'test.csv').write_bytes(test.encode('utf-8', 'surrogatepass'))
    df, report = read_rows(tmp_path/'test.csv')
    assert report.competition == 'wsdm' and not report.labelled and report.repaired == {'lone surrogates replaced': 1}


def test_wsdm_winner_is_checked(tmp_path):
    for bad in ('tie', '', 'A'):
        wsdm_frame().assign(winner=['model_a', bad, 'model_b'], response_a='x').to_csv(tmp_path/'t.csv', index=False)
        with pytest.raises(UserError, match=r't.csv: row 2 \(id b2\), column winner'): read_rows(tmp_path/'t.csv')


def test_lmsys_as_parquet_with_lists_or_json(read, tmp_path):
    want = read(GOOD)[0]
    plain = pd.read_csv(tmp_path/'train.csv')
    plain.to_parquet(tmp_path/'json.parquet')
    plain.assign(**{c: plain[c].map(json.loads) for c in TEXTS}).to_parquet(tmp_path/'lists.parquet')
    for name in ('json', 'lists'):
        df = read_rows(tmp_path/f'{name}.parquet')[0]
        for c in want: assert df[c].tolist() == want[c].tolist(), c


# ---- fuzz: success or UserError, never another exception
def survives(read, content):
    try: df, report = read(content)
    except UserError as e: assert 'train.csv' in str(e)
    else:
        assert len(df) == report.rows > 0
        for c in TEXTS: assert all(isinstance(t, str) and t.encode() is not None for turns in df[c] for t in turns)
        data_hash(df)


@slow_ok
@given(content=st.binary(max_size=300))
def test_random_bytes(read, content): survives(read, content)


@slow_ok
@given(content=st.text(st.sampled_from('id,prompt"[]\n\r\\0 ') | st.characters(categories=None), max_size=200))
def test_random_text_under_a_good_header(read, content): survives(read, HEAD + content)


SPECIAL = st.sampled_from([b'"', b',', b'\n', b'\r', b'[', b']', b'\0', b'\xed\xa0\xbd', b'\\'])
EDIT = st.tuples(st.integers(0, len(GOOD)), st.integers(0, 12), st.binary(max_size=4) | SPECIAL)   # at, drop, put


@slow_ok
@given(edits=st.lists(EDIT, min_size=1, max_size=4))
def test_random_mutations_of_a_good_file(read, edits):
    raw = GOOD.encode()
    for at, drop, put in edits: raw = raw[:at] + put + raw[at + drop:]
    survives(read, raw)


ANY_TEXT = st.text(st.characters(categories=None))
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | ANY_TEXT,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=2), x, max_size=2))


@slow_ok
@given(cell=ANY_JSON)
def test_any_json_in_a_cell(read, cell): survives(read, HEAD + row(1, prompt=json.dumps(cell)))


@slow_ok
@given(cell=st.text(st.characters(categories=None), max_size=20),
       column=st.sampled_from(['model_a', 'id', 'prompt', 'winner_tie']))
def test_any_text_in_a_cell(read, cell, column):
    values = dict(zip(HEAD.strip().split(','), (1, 'gpt', 'llama', '["p"]', '["a"]', '["b"]', 1, 0, 0)))
    values[column] = cell
    line = io.StringIO()
    csv.writer(line).writerow(values.values())
    survives(read, HEAD + line.getvalue())


# ---- swap
texts = st.lists(st.text(max_size=8), min_size=1, max_size=2)


@st.composite
def frames(draw, min_size=1, max_size=12, soft=True):
    "Random labelled rows, two or three classes, with and without models."
    n, three = draw(st.integers(min_size, max_size)), draw(st.booleans())
    df = pd.DataFrame({'id': range(n), **{c: pd.Series([draw(texts) for _ in range(n)], dtype=object) for c in TEXTS}})
    if draw(st.booleans()): df['model_a'], df['model_b'] = [f'm{i}' for i in range(n)], [f'k{i}' for i in range(n)]
    y = np.array([draw(st.lists(st.integers(1, 9), min_size=2 + three, max_size=2 + three)) for _ in range(n)], float)
    for c, v in zip(('a', 'b', 'tie'), (y/y.sum(1, keepdims=True)).T): df[c] = v
    return df


@given(frames())
def test_swapping_twice_is_identity_and_once_exchanges_all(df):
    once = swap_rows(df)
    pd.testing.assert_frame_equal(swap_rows(once), df)
    assert list(once.columns) == list(df.columns) and once['prompt'].tolist() == df['prompt'].tolist()
    assert once['response_a'].tolist() == df['response_b'].tolist() and once['a'].tolist() == df['b'].tolist()
    if 'model_a' in df: assert once['model_b'].tolist() == df['model_a'].tolist()
    comp = LMSYS if 'tie' in df else WSDM
    assert np.array_equal(labels_of(once, comp), swap_probs(labels_of(df, comp)))
    assert data_hash(swap_rows(once)) == data_hash(df)
    assert (data_hash(once) == data_hash(df)) == (df['response_a'].tolist() == df['response_b'].tolist())


def test_swap_probs_works_for_numpy_and_torch():
    import torch
    for shape in ((4, 3), (4, 2), (2, 4, 3), (3,)):
        p = np.random.default_rng(0).random(shape)
        assert np.array_equal(swap_probs(swap_probs(p)), p)
        assert np.array_equal(swap_probs(torch.tensor(p)).numpy(), swap_probs(p))


@given(frames())
@settings(deadline=None, max_examples=50)
def test_what_is_written_reads_back(tmp_path_factory, df):
    comp = LMSYS if 'tie' in df else WSDM
    for c in TEXTS: df[c] = [[t.replace('\0', '') for t in (v*2)[:2 if comp is LMSYS else 1]] for v in df[c]]
    path = tmp_path_factory.mktemp('w')/'train.csv'
    write_rows(path, df, comp)
    back = read_rows(path, comp)[0]
    for c in ('id', *TEXTS): assert back[c].tolist() == df[c].tolist()
    if comp is LMSYS: assert np.allclose(labels_of(back, comp), labels_of(df, comp), atol=1e-6)
    assert [p.name for p in path.parent.iterdir()] == ['train.csv']


# ---- groups, duplicates, folds
CLASSES = ['a', 'b', 'tie']


def frame(prompts, outcomes=None, classes=CLASSES):
    "Rows with one-turn `prompts` and equal answers; `outcomes`: the index of the class of each."
    n = len(prompts)
    df = pd.DataFrame({'id': range(n), 'prompt': [[p] for p in prompts],
                       'response_a': [['x']]*n, 'response_b': [['y']]*n})
    if outcomes is not None: df[classes] = np.eye(len(classes))[outcomes]
    return df


def test_prompts_are_grouped_and_duplicates_found():
    df = pd.DataFrame({
        'id': range(6),
        'prompt': [['Hi  there'], ['hi\nthere '], ['Hi there'], ['Ho'], ['Ho', 'Hi'], ['Hi there']],
        'response_a': [['x'], ['y'], ['x'], ['x'], ['x', ''], ['x']],
        'response_b': [['y'], ['x'], ['y'], ['y'], ['y', ''], ['z']]})
    assert prompt_groups(df).tolist() == [0, 0, 0, 1, 2, 0]
    assert find_duplicates(df).to_dict('list') == {'row': [1, 2], 'first_row': [0, 0], 'kind': ['swapped', 'exact']}
    same = df.assign(response_a=df['response_b'])
    assert set(find_duplicates(same)['kind']) == {'exact'}
    assert find_duplicates(df.iloc[[0, 3]]).empty


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(2, 3))
@settings(deadline=None, max_examples=15)
def test_folds_keep_groups_together_and_classes_even(seed, n_folds, n_classes):
    rng, n, classes = np.random.default_rng(seed), 400, CLASSES[:n_classes]
    prompts = [f'q {i}' for i in rng.integers(0, 150, n)]
    df = frame(prompts, rng.integers(0, n_classes, n), classes)
    folds, groups = make_folds(df, n_folds, seed), prompt_groups(df)
    assert set(folds) == set(range(n_folds)) and np.array_equal(folds, make_folds(df, n_folds, seed))
    assert np.array_equal(folds, make_folds(df, n_folds, seed, groups))
    assert pd.Series(folds).groupby(groups).nunique().max() == 1
    share = df[classes].groupby(folds).mean()
    assert (share - share.mean()).abs().to_numpy().max() < .12
    assert abs(np.bincount(folds)/n - 1/n_folds).max() < .1


def test_folds_that_cannot_be_are_refused():
    n = 30
    prompts, outcomes = [f'q{i}' for i in range(n)], np.arange(n) % 3
    df = frame(prompts, outcomes)
    with pytest.raises(UserError, match='label'): make_folds(frame(prompts))
    with pytest.raises(UserError, match='n_folds=1'): make_folds(df, 1)
    few = frame([f'q{i % 3}' for i in range(n)], outcomes)
    with pytest.raises(UserError, match='3 distinct prompts cannot fill 5 folds'): make_folds(few)
    rare = df.assign(a=1., b=0., tie=0.)
    rare.loc[0, CLASSES] = [0, 0, 1.]
    with pytest.raises(UserError, match="class 'b'"): make_folds(rare)
    # all ties share a prompt: one fold has them all
    one_group = frame(['same' if outcome == 2 else p for p, outcome in zip(prompts, outcomes)], outcomes)
    with pytest.raises(UserError, match="no row of class 'tie'"): make_folds(one_group)


# ---- the real files
def test_real_training_rows(shared_data):
    df, report = read_rows(shared_data/'lmsys_train_1000.csv')
    raw = pd.read_csv(shared_data/'lmsys_train_1000.csv', dtype=str, keep_default_na=False)
    nulls = sum(t is None for c in TEXTS for cell in raw[c] for t in json.loads(cell))
    assert (report.rows, report.labelled, report.competition) == (1000, True, 'llm-classification')
    assert df['id'].dtype == np.int64
    assert report.repaired.get('null turns read as empty', 0) == nulls
    assert df[CLASSES].sum().tolist() == [344, 348, 308] and df['id'].astype(str).tolist() == raw['id'].tolist()
    assert df['prompt'].map(len).tolist() == raw['prompt'].map(lambda c: len(json.loads(c))).tolist()
    folds = make_folds(df, 5)
    assert pd.Series(folds).groupby(prompt_groups(df)).nunique().max() == 1 and np.bincount(folds).min() > 150


def test_real_test_file_and_other_sets(shared_data):
    df, report = read_rows(shared_data/'lmsys_test.csv')
    assert (report.rows, report.labelled) == (3, False)
    assert df['id'].tolist() == pd.read_csv(shared_data/'lmsys_sample_submission.csv')['id'].tolist()
    for name, rows, prompts in (('tulu1_1150', 1150, 332), ('pandalm_999', 999, 170)):
        df, report = read_rows(shared_data/f'{name}.csv')
        assert report.rows == rows and abs(report.notes['distinct prompts'] - prompts) <= 2


def test_real_rows_survive_writing(shared_data, tmp_path):
    df, _ = read_rows(shared_data/'lmsys_train_1000.csv')
    write_rows(tmp_path/'train.csv', df, LMSYS)
    back, report = read_rows(tmp_path/'train.csv')
    assert data_hash(back) == data_hash(df) and not [k for k in report.repaired if 'empty' not in k]


def test_folds_are_the_same_in_every_version_and_order():
    """A run on Kaggle and one here must agree on what falls into which fold.

    Whatever numpy or scikit-learn they have, and however the rows are ordered."""
    df = frame([f'Question {i//2}' for i in range(12)], np.arange(12) % 3)
    folds = make_folds(df, 2)
    assert folds.tolist() == [1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0]
    other = df.sample(frac=1, random_state=3).reset_index(drop=True)
    assert dict(zip(other['id'], make_folds(other, 2))) == dict(zip(df['id'], folds))


@pytest.mark.parametrize('n,k', [(15, 5), (60, 5), (1000, 5), (997, 10)])
def test_classes_are_spread_as_evenly_as_can_be(n, k):
    rng = np.random.default_rng(n)
    y = np.arange(n) % 3
    rng.shuffle(y)
    df = frame([f'q{i}' for i in range(n)], y)
    counts = pd.crosstab(make_folds(df, k), y).to_numpy()
    assert (counts.max(0) - counts.min(0) <= 1).all()
