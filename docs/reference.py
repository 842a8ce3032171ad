"""The pages that are looked up: commands with their help, settings, and the names of the library with their docstrings.

Settings and docstrings are read from the sources, so that no page wants torch."""
import ast
import re

import typer
from pages import ROOT, fenced

LIBRARY = ROOT/'lib'/'underdog'


def commands_page():
    "Every command with its `--help`, in the sections of `underdog --help`."
    from underdog.console.main import app
    group, sections = typer.main.get_command(app), {}
    for name, command in group.commands.items():
        sections.setdefault(command.rich_help_panel or 'On this machine', []).append((name, command))
    blocks = ['# Commands', '`underdog COMMAND --help` prints the same.']
    for title, commands in sections.items():
        blocks.append(f'## {title}')
        for name, command in commands:
            context = typer.Context(command, info_name=f'underdog {name}', terminal_width=84)
            blocks += [f'### {name}', fenced(command.get_help(context), 'text')]
    return '\n\n'.join(blocks) + '\n'


# ---- settings
def settings_page():
    "A table for each config: name, default, meaning."
    blocks = ['# Settings', 'Each stage has one frozen config. The parameters of the kernels have the same names: '
              '`underdog run train -p lr=1e-4`, or `TrainConfig(lr=1e-4)` in Python. '
              'A value that cannot work is refused before anything is spent.']
    for file in sorted(LIBRARY.rglob('*.py')):
        source = file.read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and 'Settings' in [getattr(base, 'id', '') for base in node.bases]:
                blocks += [f'## {node.name}', f'{ast.get_docstring(node)} Module `{module_of(file)}`.',
                           _settings_table(node, source.splitlines())]
    return '\n\n'.join(blocks) + '\n'


def _settings_table(node, lines):
    rows = []
    for field in node.body:
        if not isinstance(field, ast.AnnAssign): continue
        # a default, unless it is made by `field(…)`: then it must be given
        plain = field.value is not None and not isinstance(field.value, ast.Call)
        default = f'`{ast.unparse(field.value)}`' if plain else 'must be given'
        rows.append(f'| `{field.target.id}` | {default} | {_meaning(field, lines)} |')
    return '\n'.join(['| setting | default | meaning |', '|---|---|---|', *rows])


def parameters_table(kernel):
    "What follows the page of the notebook `kernel`: its parameters, as `underdog run KERNEL --list` prints them."
    from underdog.kernels import kernel_parameters
    rows = [f'| `{name}` | `{default!r}` | {_cell(meaning)} |'
            for name, (default, meaning) in kernel_parameters(kernel).items()]
    return '\n'.join(['\n## All parameters\n', '| parameter | default | meaning |', '|---|---|---|', *rows, ''])


def _cell(text): return text.replace('|', '\\|').replace('<', '&lt;')


def _meaning(node, lines):
    "The comment behind a statement, as a cell of a table."
    comment = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode()
    return _cell(comment.strip().lstrip(',):').strip().lstrip('#').strip())


# ---- names
def module_of(file):
    "The dotted name of a module."
    return '.'.join(file.relative_to(LIBRARY.parent).with_suffix('').parts)


def api_pages():
    "{page: markdown}: a page for each room, with the public names of its modules."
    pages = {}
    for file in sorted(LIBRARY.rglob('*.py')):
        if file.name.startswith('_'): continue
        room = file.parent.name if file.parent != LIBRARY else 'ground'
        blocks = pages.setdefault(f'reference/api/{room}.md', [f'# {room}'])
        blocks += _module(file)
    return {page: '\n\n'.join(blocks) + '\n' for page, blocks in pages.items()}


def _module(file):
    "Blocks of the public names of a module; none where it has none."
    source = file.read_text()
    tree = ast.parse(source)
    public = [name for node in tree.body if isinstance(node, ast.Assign)
              and getattr(node.targets[0], 'id', '') == '__all__' for name in ast.literal_eval(node.value)]
    if not public: return []
    nodes = [node for node in tree.body if getattr(node, 'name', '') in public]
    values = [f'`{name}`' for name in public if name not in [node.name for node in nodes]]
    blocks = [f'## {module_of(file)}', _prose(ast.get_docstring(tree))]
    if values: blocks.append(f"Values: {', '.join(values)}.")
    for node in nodes:
        blocks += [f'### {node.name}', fenced(_signature(node), 'python'), _prose(ast.get_docstring(node))]
        if not isinstance(node, ast.ClassDef): continue
        for method in node.body:
            told = isinstance(method, ast.FunctionDef) and not method.name.startswith('_')
            if told and ast.get_docstring(method):
                blocks += [fenced(f'{node.name}.{_signature(method)}', 'python'), _prose(ast.get_docstring(method))]
    return blocks


def _signature(node):
    "How a function or a class is called; of a property, its name."
    if isinstance(node, ast.ClassDef):
        own = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__']
        if own: return f'{node.name}({_arguments(own[0])})'
        fields = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign)]
        return f"{node.name}({', '.join(fields)})" if len(fields) < 4 else \
            f'{node.name}(\n    ' + ',\n    '.join(fields) + ')'
    if any(getattr(d, 'id', '') == 'property' for d in node.decorator_list): return node.name
    return f'{node.name}({_arguments(node)})'


def _arguments(function):
    "The arguments without `self` and `cls`."
    return re.sub(r'^(self|cls)(, |$)', '', ast.unparse(function.args))


def _prose(docstring):
    "A docstring as Markdown, in which no `<name>` is a tag; nothing for none."
    parts = re.split(r'(`[^`]*`)', docstring or '')
    parts[::2] = [part.replace('<', '&lt;').replace('_', r'\_').replace('*', r'\*') for part in parts[::2]]
    return ''.join(parts)
