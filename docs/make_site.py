"""The documentation site: `python docs/make_site.py` writes pages, configuration and site to _docs/, checks its links.

`make docs` sets up .venv-docs and runs this. The site is plain files: `_docs/site/index.html` opens in a browser
without a server, and asks no other machine for anything."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

from pages import ROOT, TEXTS, for_site, lessons, lessons_page, notebook, repository, title_of

OUT = ROOT/'_docs'
GUIDES = ('kaggle', 'rehearsal', 'two_t4s', 'own_competition', 'sweep', 'report', 'troubleshooting', 'how_it_works',
          'glossary')
SHOWN = '*What cells show on this page is of `make demo`: generated rows, twelve layers of SmolLM2, two CPU cores.*\n'
KERNELS = ('train', 'infer', 'blend', 'sweep', 'probe', 'wheels')
LOOKED_UP = {'Commands': 'commands', 'Settings': 'settings', 'Benchmarks': 'benchmarks',
             'Contributing': 'contributing', 'Changelog': 'changelog'}


def main():
    sys.path.insert(0, str(ROOT/'lib'))
    from links import check_site
    written = write_pages(OUT/'pages')
    (OUT/'zensical.toml').write_text(configuration(), encoding='utf-8')
    # strict: a link that leads nowhere ends the build
    zensical = Path(sys.executable).with_name('zensical')
    done = subprocess.run([zensical, 'build', '--clean', '--strict', '-f', OUT/'zensical.toml'])
    if done.returncode: sys.exit(done.returncode)
    faults, links = check_site(OUT/'site')
    if faults: sys.exit('\n'.join(faults))
    print(f'{written} pages, {links:,} links within the site, each of which leads somewhere: _docs/site/index.html')


def write_pages(out):
    "Write every page below the folder `out`, which is made anew; how many there are."
    from latex2mathml.converter import convert
    from reference import parameters_table
    shutil.rmtree(out, ignore_errors=True)
    pages, texts, results = repository(), {}, json.loads((ROOT/'docs'/'outputs.json').read_text())
    for path, page in pages.items():
        if path.endswith('.ipynb'):
            shown = results.get(Path(path).stem, {}) if page.startswith('kernels/') else {}
            texts[page], pictures = notebook(path, pages, formula=convert, results=shown)
            if shown: texts[page] = texts[page].replace('\n```', f'\n{SHOWN}\n```', 1)
            if page.startswith('kernels/'): texts[page] += parameters_table(ROOT/path)
            for name, picture in pictures.items(): _write(out/Path(page).parent/name, picture)
        else: texts[page] = for_site((ROOT/path).read_text(), path, pages) + '\n'
    for picture in (ROOT/'nbs'/'images').glob('*.png'): _write(out/'images'/picture.name, picture.read_bytes())
    texts |= made_pages(pages)
    for page, text in texts.items(): _write(out/page, text.encode())
    for name in ('style.css', 'iframe-worker.js'): _write(out/name, (ROOT/'docs'/name).read_bytes())
    return len(texts)


def made_pages(pages):
    "{page: markdown} of the pages that no file of the repository holds."
    from reference import api_pages, commands_page, settings_page
    return {'lessons/index.md': lessons_page(pages), 'reference/commands.md': commands_page(),
            'reference/settings.md': settings_page(), **api_pages()}


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# ---- configuration
def configuration():
    "docs/zensical.toml with the navigation filled in."
    return (ROOT/'docs'/'zensical.toml').read_text().replace('nav = []', f'nav = {_toml(navigation())}')


def navigation():
    "The navigation: a list of {title: page or list}."
    pages = repository()
    kernels = [{title_of(ROOT/f'nbs/kernels/{name}.ipynb')[0]: f'kernels/{name}.md'} for name in KERNELS]
    rooms = lessons(pages)
    by_room = [{room.capitalize(): [{title: page} for page, title, _ in listed]} for room, listed in rooms.items()]
    api = [{room.capitalize(): f'reference/api/{room}.md'} for room in rooms if room != 'stories']
    return [
        {'Quick start': TEXTS['README.md']},
        {'Guides': [{_heading(f'nbs/guides/{name}.md'): f'guides/{name}.md'} for name in GUIDES]},
        {'Kernels': kernels},
        {'Lessons': [{'All lessons': 'lessons/index.md'}, *by_room]},
        {'Reference': [*({title: f'reference/{name}.md'} for title, name in LOOKED_UP.items()), {'API': api}]},
    ]


def _heading(path): return (ROOT/path).read_text().partition('\n')[0].removeprefix('# ')


def _toml(value):
    "Lists, mappings and texts as TOML on one line; its texts are written as JSON's are."
    if isinstance(value, str): return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list): return f"[{', '.join(map(_toml, value))}]"
    return '{' + ', '.join(f'{_toml(key)} = {_toml(part)}' for key, part in value.items()) + '}'


if __name__ == '__main__': main()
