"The pages of the site say what the library says; what nobody reads is not in them; broken links are found."
import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT/'docs'))

from make_site import configuration, made_pages   # noqa: E402
from links import check_site                  # noqa: E402
from outputs import results_of                # noqa: E402
from pages import for_site, notebook, repository   # noqa: E402


@pytest.fixture(scope='module')
def pages(): return repository()


@pytest.fixture(scope='module')
def made(pages): return made_pages(pages)


def test_every_notebook_has_a_page_of_its_own(pages):
    notebooks = [f for f in (ROOT/'nbs').rglob('*.ipynb') if f.name != 'index.ipynb' and '.ipynb_' not in str(f)]
    assert len([path for path in pages if path.endswith('.ipynb')]) == len(notebooks) > 100
    assert len(set(pages.values())) == len(pages)
    navigation = configuration()
    for page in pages.values(): assert f'"{page}"' in navigation, page


def test_a_lesson_shows_its_code_and_not_its_plumbing(pages):
    for path in pages:
        if not path.endswith('.ipynb'): continue
        text, pictures = notebook(path, pages)
        assert not re.search(r'^#\|', text, re.M), path
        cells = json.loads((ROOT/path).read_text())['cells']
        for cell in cells:
            source = ''.join(cell['source'])
            hidden = source.removeprefix('#| hide\n')
            # a line alone may stand in another cell, too
            if hidden != source and '\n' in hidden: assert hidden not in text, path
            exported = source.removeprefix('#| export\n')
            if exported != source and '#|' not in exported: assert exported.strip('\n') in text, path
        assert all(f']({name})' in text for name in pictures)


def test_every_command_and_option_is_told(made):
    from underdog.console.main import app
    for name, command in typer.main.get_command(app).commands.items():
        assert f'\n### {name}\n' in made['reference/commands.md']
        for parameter in command.params:
            for option in parameter.opts[:1] if parameter.param_type_name == 'option' else ():
                assert option in made['reference/commands.md'], (name, option)


@pytest.mark.parametrize('where', ['model.settings.ModelConfig', 'text.prompt.PromptConfig', 'session.SessionConfig',
                                   'training.settings.TrainConfig', 'inference.settings.InferConfig'])
def test_a_table_of_settings_says_what_the_config_says(where, made):
    module, _, name = where.rpartition('.')
    config = getattr(importlib.import_module(f'underdog.{module}'), name)
    table = made['reference/settings.md'].split(f'\n## {name}\n')[1].split('\n## ')[0]
    for field in dataclasses.fields(config):
        must = field.default is dataclasses.MISSING
        row, = [line for line in table.splitlines() if line.startswith(f'| `{field.name}` |')]
        assert ('must be given' if must else f'`{field.default!r}`') in row
        assert len(row.split('|')[3]) > 5, f'{field.name}: no meaning'


def test_the_names_of_the_front_door_are_told(made):
    import underdog
    api = ''.join(text for page, text in made.items() if '/api/' in page)
    for name in underdog.__all__: assert f'\n### {name}\n' in api


def test_markdown_of_github_is_made_that_of_the_site(pages):
    text = ('so:\n* one `[a](b.md)`\n* two\n\n1. first\n   more\n\n[rows](../1_data/03_rows.ipynb#x) '
            '[L](../../LICENSE) [all](..)')
    assert for_site(text, 'nbs/guides/kaggle.md', pages) == (
        'so:\n\n* one `[a](b.md)`\n* two\n\n1. first\n    more\n\n[rows](../lessons/data/rows.md#x) '
        '[L](https://github.com/underdog-llm/underdog/blob/main/LICENSE) [all](../lessons/index.md)')
    # code stays as it is
    assert for_site('```\na\n* b\n   c\n```', 'README.md', pages) == '```\na\n* b\n   c\n```'
    # a comment that has no room beside its command stands above it
    short, long = 'underdog check train.csv     # what is in it', f"underdog run -p {'x'*50}   # what # it does"
    assert for_site(f'```sh\n{short}\n{long}\n```\n```text\n{long}\n```', 'README.md', pages) == (
        f"```sh\n{short}\n# what # it does\nunderdog run -p {'x'*50}\n```\n```text\n{long}\n```")
    with pytest.raises(SystemExit, match='nothing.md'): for_site('[x](nothing.md)', 'README.md', pages)


def test_kernels_show_results_and_nothing_of_a_machine(pages):
    kept = (ROOT/'docs'/'outputs.json').read_text()
    assert not any(place in kept for place in ('/root', '/home', '/tmp', 'doctor'))
    # cells that have changed since show nothing; when none is left, it is time to make them anew
    shown = {}
    for name, results in json.loads(kept).items():
        shown |= notebook(f'nbs/kernels/{name}.ipynb', pages, results=results)[1]
    assert shown, 'make demo, then docs/outputs.py'

    # a bar of progress, and the same without its steps
    printed = [dict(output_type='stream', text=['\rrows: 0%', '\rrows: 100%\n', 'done\n'])]
    assert results_of(printed) == [dict(text='done\n')]


def test_faults_of_a_site_are_found(tmp_path):
    (tmp_path/'index.html').write_text('<h1 id="top">x</h1><a href="#top"></a><a href="other.html#there"></a>')
    (tmp_path/'other.html').write_text('<p id="there"></p><a href="index.html"></a>')
    assert check_site(tmp_path) == ([], 3)
    (tmp_path/'other.html').write_text('<script src="https://cdn.example/x.js"></script><a href="gone.html"></a>')
    faults, _ = check_site(tmp_path)
    assert faults == ['index.html: other.html#there has no such anchor', 'other.html: loads https://cdn.example/x.js',
                      'other.html: gone.html is not there']
