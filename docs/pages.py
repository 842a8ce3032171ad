"""Markdown pages of the site from what the repository holds: README, guides, notebooks and other texts.

A notebook becomes a page here, in a few lines, and not by a plugin: nbdev's directives and hidden cells must go, and
links must lead to pages where there are some, and to files of the repository where not."""
import base64
import hashlib
import json
import os
import re
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
FILES = 'https://github.com/underdog-llm/underdog/blob/main'   # of the repository, for what is no page

# texts of the repository -> pages
TEXTS = {
    'README.md': 'index.md',
    'CONTRIBUTING.md': 'reference/contributing.md',
    'CHANGELOG.md': 'reference/changelog.md',
    'benchmarks/README.md': 'reference/benchmarks.md',
}

LESSONS = {'nbs': 'lessons/index.md'}   # a folder, and the page that lists what is in it


def repository():
    "{path in the repository: path of its page}: texts, guides, and every notebook in the order of reading."
    pages = dict(TEXTS)
    for file in sorted((ROOT/'nbs').rglob('*')):
        path = file.relative_to(ROOT)
        if path.name == 'index.ipynb' or '.ipynb_checkpoints' in path.parts: continue   # README is made of the index
        if file.suffix == '.ipynb' or (file.suffix == '.md' and 'guides' in path.parts):
            pages[path.as_posix()] = _page(path)
    return pages


def _page(path):
    "The page of a notebook or guide: folders and names without their numbers."
    *folders, name = [re.sub(r'^\d+[a-z]?_', '', part) for part in path.with_suffix('.md').parts[1:]]
    if folders in (['guides'], ['kernels']): return f'{folders[0]}/{name}'
    return '/'.join(['lessons', *(folders or ['ground']), name])


# ---- text
def for_site(text, source, pages):
    "Markdown as GitHub reads it -> as Python-Markdown does, with the links of `source` led to pages."
    lines, fence, shell, before = [], None, False, ''
    for line in text.splitlines():
        mark = re.match(r'(`{3,})', line)
        if fence:
            fence = None if line.startswith(fence) and not line.strip('`').strip() else fence
            if shell and fence: line = _above(line)
        elif mark: fence, shell = mark[1], line.strip('`') == 'sh'
        else:
            # a list wants an empty line before it, and what belongs to an item four spaces
            item = re.match(r'([*-]|\d+\.) ', line)
            if item and before.strip() and not re.match(r'([*-]|\d+\.) | {2,}', before): lines.append('')
            line = re.sub(r'^ {3}(?=\S)', ' '*4, line)
            line = _led(line, source, pages)
        lines.append(line)
        before = line
    return '\n'.join(lines)


_WIDTH = 76   # characters of code that a page has room for


def _above(line):
    "A line of shell with its comment; where both have no room side by side, the comment above the command."
    command, gap, comment = re.match(r'(.*?)(\s{2,}# )?((?(2).*|))$', line).groups()
    return line if len(line) <= _WIDTH or not gap else f'# {comment}\n{command}'


def _led(line, source, pages):
    "A line with its relative links led to pages, or to files of the repository."
    def lead(match):
        target, _, anchor = match[2].partition('#')
        if re.match(r'\w+:', match[2]) or not target: return match[0]
        path = os.path.normpath(PurePosixPath(source).parent/target)
        if not (ROOT/path).exists(): raise SystemExit(f'{source}: links to {target}, which is not there')
        page = (pages | LESSONS).get(path) or (f'images/{Path(path).name}' if path.endswith('.png') else '')
        if page: target = os.path.relpath(page, Path(pages[source]).parent)
        else: target = f'{FILES}/{path}'
        return f"{match[1]}({target}{'#' + anchor if anchor else ''})"
    # what stands in backticks is no link
    parts = re.split(r'(`[^`]*`)', line)
    parts[::2] = [re.sub(r'(\])\(([^)\s]+)\)', lead, part) for part in parts[::2]]
    return ''.join(parts)


def fenced(text, language=''):
    "`text` in a fence that is longer than any in it."
    longest = max(map(len, re.findall(r'`{3,}', text)), default=2)
    fence = '`'*(longest + 1)
    return f'{fence}{language}\n{text.rstrip()}\n{fence}'


# ---- notebooks
def title_of(path):
    "(title, summary) of a notebook: the first line of its first cell, and the paragraph below."
    title, _, rest = ''.join(json.loads(path.read_text())['cells'][0]['source']).partition('\n')
    return title.removeprefix('# '), rest.strip().split('\n\n')[0].removeprefix('> ')


def notebook(path, pages, formula=None, results=None):
    """(markdown, {name: bytes of a picture}) of the notebook at `path` in the repository.

    `formula`: makes MathML of LaTeX, which browsers show without a script; None leaves formulas as they are.
    `results`: {key: outputs} of cells that are kept without."""
    blocks, pictures = [], {}
    for cell in json.loads((ROOT/path).read_text())['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            source = for_site(source, path, pages)
            blocks.append(_with_formulas(source, formula) if formula else source)
            continue
        # directives are for nbdev; what is hidden is plumbing
        directives, code = re.findall(r'^#\| *(\S+)', source, re.M), re.sub(r'^#\|.*\n?', '', source, flags=re.M)
        if 'default_exp' in directives: blocks.append(_module_line(source.split()[-1], pages[path]))
        if {'hide', 'default_exp'} & set(directives): continue
        code = re.sub(r'^%%?\w+.*\n', '', code, flags=re.M).strip('\n')
        if code: blocks.append(fenced(code, 'python'))
        outputs = cell.get('outputs') or (results or {}).get(code_key(cell), [])
        for output in outputs: blocks += _output(output, pictures, Path(pages[path]).stem)
    return '\n\n'.join(blocks) + '\n', pictures


def code_key(cell):
    "What a code cell is known by."
    return hashlib.sha256(''.join(cell['source']).encode()).hexdigest()[:16]


def _module_line(module, page):
    "The line that leads from a lesson to the names of its module."
    room = module.partition('.')[0] if '.' in module else 'ground'
    there = os.path.relpath(f'reference/api/{room}.md', Path(page).parent)
    return f"Module [`underdog.{module}`]({there}#underdog{module.replace('.', '')})"


def _with_formulas(text, formula):
    "Markdown with the formulas outside of its code as MathML."
    parts = re.split(r'(```.*?```|`[^`\n]*`)', text, flags=re.S)
    for i in range(0, len(parts), 2):
        block = re.sub(r'\$\$(.+?)\$\$', lambda m: formula(m[1], display='block'), parts[i], flags=re.S)
        parts[i] = re.sub(r'\$([^$]+)\$', lambda m: formula(m[1]), block)
    return ''.join(parts)


def _output(output, pictures, name):
    "Markdown blocks of an output; a picture is put into `pictures` under a `name`."
    data = output.get('data', {})
    if 'image/png' in data:
        file = f'{name}_{len(pictures)}.png'
        pictures[file] = base64.b64decode(data['image/png'])
        return [f'![Output of the cell above]({file})']
    if 'text/html' in data:
        # a table of pandas, without its own style, in one block that Markdown leaves alone
        html = re.sub(r'<style.*?</style>', '', ''.join(data['text/html']), flags=re.S)
        html = '\n'.join(line.strip() for line in html.splitlines() if line.strip())
        return [f'<div class="output">\n{html}\n</div>']
    text = ''.join(data.get('text/plain', output.get('text', '')))
    return [fenced(re.sub(r'\x1b\[[\d;]*m', '', text), 'text')] if text.strip() else []


# ---- lists of lessons
def lessons(pages):
    "{room: [(page, title, summary)]} in the order of reading."
    listed = {}
    for path, page in pages.items():
        if page.startswith('lessons/'): listed.setdefault(page.split('/')[1], []).append((page, *title_of(ROOT/path)))
    return listed


def lessons_page(pages):
    "The page that lists all lessons; what a room is for, README tells."
    blocks = ['# Lessons', 'The library is written in notebooks, one idea each: why, the code, an example, a proof. '
              'They can be read in this order; every page shows the code that is exported and what it printed.']
    table = re.findall(r'^\| (the ground|`\w+`) \| ([^|]+) \|', (ROOT/'README.md').read_text(), re.M)
    about = {name.strip('`').removeprefix('the '): what for name, what in table}
    about['stories'] = 'experiments behind a default, with their outputs'
    for room, listed in lessons(pages).items():
        blocks.append(f'## {room.capitalize()}')
        if room in about: blocks.append(f'{about[room][0].upper()}{about[room][1:]}.')
        rows = [f'| [{title}]({page.removeprefix("lessons/")}) | {_cell(summary)} |' for page, title, summary in listed]
        blocks.append('\n'.join(['| lesson | what it shows |', '|---|---|', *rows]))
    return '\n\n'.join(blocks) + '\n'


def _cell(text): return ' '.join(text.split()).replace('|', '\\|')
