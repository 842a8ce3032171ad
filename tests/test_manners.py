"Manners at the terminal: tables that can be read anywhere, inputs refused before Jupyter starts."
import io
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from underdog.console import tables
from underdog.console.main import main
from underdog.core import UserError
from underdog.kernels import check_injected, find_kernel, kernel_parameters

# words as they come in tables, a few of them longer than a line
WORDS = st.text('abcdefgh/-_.,0123456789', min_size=1, max_size=100)
CELLS = st.one_of(st.none(), st.floats(allow_infinity=False), st.integers(), st.lists(WORDS, max_size=8).map(' '.join))


def printed(title, columns, rows, width, monkeypatch):
    "What `print_table` writes to something that is `width` columns wide and no terminal."
    monkeypatch.setenv('COLUMNS', str(width))
    out = io.StringIO()
    monkeypatch.setattr(sys, 'stdout', out)
    tables.print_table(title, columns, rows)
    return out.getvalue()


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=9), st.data(), st.sampled_from([40, 80, 120]))
def test_no_table_breaks_a_word_or_is_wider_than_the_terminal(columns, data, width):
    row = st.tuples(*[CELLS]*len(columns))
    rows = data.draw(st.lists(row, min_size=1, max_size=4))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv('FORCE_COLOR', '1')   # Jupyter sets it, and logs are full of ANSI codes
        text = printed('title', columns, rows, width, monkeypatch)
    assert '\x1b' not in text
    words = [word for row in rows for cell in row for word in tables.shown(cell).split()]
    for word in words: assert word in text
    # wider is only the line of a word that has no room beside its column's name
    longest = max(map(len, [*words, *columns, '']))
    for line in text.splitlines(): assert len(line) <= max(width, max(map(len, columns)) + 2 + longest)


@pytest.mark.parametrize('environment, coloured', [({}, True), ({'NO_COLOR': '1'}, False), ({'TERM': 'dumb'}, False)])
def test_colours_are_for_a_terminal_that_wants_them(monkeypatch, environment, coloured):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, 'stdout', terminal)
    monkeypatch.setenv('TERM', 'xterm-256color')
    monkeypatch.delenv('NO_COLOR', raising=False)
    for name, value in environment.items(): monkeypatch.setenv(name, value)
    tables.print_table('doctor', ['', 'check'], [('fail', 'disk')])
    assert ('\x1b' in terminal.getvalue()) == coloured


def test_html_says_what_the_text_says():
    page = tables._html('a < b', ['name', 'loss'], [['<b>', '1.0']])
    assert '<caption' in page and 'a &lt; b' in page and '&lt;b&gt;' in page and 'text-align:right' in page


# ---- inputs of a run
@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with a csv and a model folder, in which no kernel may start."
    monkeypatch.chdir(tmp_path)
    (tmp_path/'train.csv').write_text('id\n')
    (tmp_path/'model').mkdir()
    (tmp_path/'model'/'config.json').write_text('{}')
    monkeypatch.setattr('underdog.kernels.run_kernel', lambda *args: pytest.fail('Jupyter was started'))
    return tmp_path


@pytest.mark.parametrize('kernel, mistake, said', [
    ('train', ['trian_csv=train.csv'], "no parameter 'trian_csv': did you mean train_csv"),
    ('train', ['train_csv=trian.csv'], 'train_csv: trian.csv: no such file'),
    ('train', ['train_csv=model'], 'train_csv: model: a folder'),
    ('train', ['train_csv='], 'wants train_csv'),
    ('train', ['model=modell'], 'model: modell: no such'),
    ('train', ['model=.'], 'model=.: not a model folder'),
    ('train', ['lr=fast'], "lr='fast': float wanted"),
    ('train', ['epochs=-1'], 'epochs=-1.0'),
    ('train', ['epochs=1e15'], 'at most 1,000 makes sense'),
    ('train', ['rank=1e6'], 'at most 4,096 makes sense'),
    ('train', [f'seed={2**64}'], 'at most 4,294,967,295 makes sense'),
    ('train', ['processes=-1'], 'processes=-1'),
    ('train', ['head=pear'], "head='pear': did you mean pair"),
    ('train', ['template=chatt'], "template='chatt'"),
    ('train', ['time_limit=-2'], 'time_limit=-2'),
    ('train', ['competition=wsmd'], "'wsmd': did you mean wsdm"),
    ('train', ['resume_from=gone'], 'resume_from: gone: no such'),
    ('infer', ['run=model,gone', 'test_csv=train.csv'], 'run: gone: no such'),
    ('infer', ['run=.', 'test_csv=train.csv'], 'run=.: not a run folder'),
    ('blend', ['runs=model', 'predictions=gone'], 'predictions: gone: no such'),
    ('sweep', ['sweep=gone.yaml'], 'sweep: gone.yaml: no such'),
])
def test_a_mistake_is_named_before_jupyter_starts(place, capsys, kernel, mistake, said):
    rest = ['train_csv=train.csv', 'model=model'] if kernel == 'train' else []
    before = set(place.rglob('*'))
    with pytest.raises(SystemExit, match='1'): main(['run', kernel, *(x for p in rest + mistake for x in ('-p', p))])
    assert said in capsys.readouterr().err
    assert set(place.rglob('*')) == before, 'nothing is left'


def test_every_parameter_that_is_a_path_is_looked_at():
    "A new one is added to `console.inputs`, or here."
    from underdog.console.inputs import MAY, MUST
    written = {'out', 'submission'}
    for kernel in ('train', 'infer', 'blend', 'sweep', 'probe'):
        for name, (default, meaning) in kernel_parameters(find_kernel(kernel)).items():
            if default != '' or name in written: continue
            if any(word in meaning for word in ('folder', 'file', 'csv', 'path', 'where the base')):
                assert name in {*MUST, *MAY, 'sweep', 'run', 'runs', 'predictions'}, f'{kernel}: {name}'


# ---- plain papermill
CELL = 'lr = 1e-4   # rate\nmodel = \'\'   # folder'


@pytest.mark.parametrize('injected, said', [
    ('lrr = 1', "no parameter 'lrr': did you mean lr"),
    ('lr = "fast"', "lr='fast'"),
    ('model = 3', 'model=3'),
])
def test_what_papermill_passes_on_is_refused(injected, said):
    with pytest.raises(UserError, match=said): check_injected(['', CELL, f'# Parameters\n{injected}', 'import sys'])


def test_what_papermill_may_pass_on():
    check_injected(['', CELL, '# Parameters\nlr = 3\nmodel = "m"', 'import sys'])
    check_injected(['', CELL, 'import sys'])


@pytest.mark.parametrize('kernel', ['train', 'infer', 'blend', 'sweep', 'probe', 'wheels'])
def test_a_kernel_refuses_a_parameter_of_plain_papermill(tmp_path, kernel, monkeypatch):
    "Its cells up to the check are run, as papermill leaves the notebook; nothing after them is reached."
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook
    monkeypatch.setattr('underdog.machine.quiet', lambda: pytest.fail('it goes on'))
    nb = parameterize_notebook(load_notebook_node(str(find_kernel(kernel))), dict(modle='x'), kernel_name='python3',
                               language='python')
    ran, space = [''], {}
    space['In'] = ran
    with pytest.raises(UserError, match="no parameter 'modle'"):
        for cell in nb.cells:
            if cell.cell_type != 'code': continue
            ran.append(cell.source)
            exec(cell.source.replace('%matplotlib inline', ''), space)


# ---- every model on one machine
@pytest.mark.parametrize('name, known', [
    ('google/gemma-2-9b-it', 'gemma-2-9b'), ('Gemma-2-2b-it', 'gemma-2-2b'), ('Qwen/Qwen3-8B-Base', 'qwen3-8b'),
    ('mistralai/Mistral-7B-Instruct-v0.2', 'mistral-7b'), ('meta-llama/Meta-Llama-3.1-8B-Instruct', 'llama-3-8b'),
    ('unsloth/gemma-2-9b-it-bnb-4bit', 'gemma-2-9b'), ('mistralai/Mistral-Nemo-Instruct-2407', 'mistral-nemo-12b'),
    ('models/google/gemma-2/transformers/gemma-2-9b-it/2', 'gemma-2-9b'),
    ('microsoft/deberta-v3-large', 'deberta-v3-large')])
def test_a_model_is_known_by_the_names_that_hubs_give_it(name, known):
    from underdog.search.shapes import model_shape
    assert model_shape(name).name == known


def test_what_is_ranked_fits_and_its_command_is_one(capsys):
    import shlex
    from dataclasses import replace

    from underdog.search.estimate import make_plan
    from underdog.search.lengths import lmsys_lengths
    from underdog.search.ranking import best_of, rank_models
    from underdog.search.recipe import Recipe
    from underdog.search.shapes import accelerator, model_shape
    card, lengths = accelerator('2xT4'), lmsys_lengths()[:1000]
    ranked = rank_models(card, .5, lengths=lengths)
    assert {r.hours is None for r in ranked} == {True, False}
    for r in ranked:
        if r.hours is None: continue
        assert r.from_hours < r.hours < r.to_hours and 0 <= r.headroom_gib < card.memory_gib
        lines = make_plan(model_shape(r.model), card, replace(Recipe(), **r.changes), lengths)
        assert [line.value for line in lines if line.what == 'training'] == pytest.approx([r.hours])
    # more hours never lose a model
    sizes = [best_of(rank_models(card, hours, lengths=lengths), hours).parameters for hours in (.1, .5, 2.)]
    assert sizes == sorted(sizes)

    with pytest.raises(SystemExit, match='0'): main(['plan', '--hours', '20', '--rows', '500'])
    *_, verdict, command, owner = capsys.readouterr().out.splitlines()
    assert verdict.startswith('the largest for 20 h is') and shlex.split(command)[:3] == ['underdog', 'relay', 'train']
    assert owner.startswith('(OWNER/')
    given = dict(text.split('=', 1) for text in shlex.split(command)[4::2])
    assert set(given) <= set(kernel_parameters(find_kernel('train')))
