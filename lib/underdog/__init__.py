"Fine-tune an LLM on human preference pairs with nothing but a free Kaggle account."
__version__ = "0.2.0"

# The front door: what a student writes in a notebook. Each name is loaded when it is asked for (PEP 562), so that
# `import underdog` costs nothing; the rooms behind it are imported by their own names.
_DOORS = {
    'read_rows': 'data.rows',
    'Floors': 'data.floors',
    'check_submission': 'data.submission',
    'PromptConfig': 'text.prompt',
    'show_row': 'text.prompt',
    'ModelConfig': 'model.settings',
    'TrainConfig': 'training.settings',
    'SessionConfig': 'session',
    'train': 'training.run',
    'RunFolder': 'runfolder',
    'InferConfig': 'inference.settings',
    'predict': 'inference.scored',
    'Blend': 'inference.blend',
    'make_plan': 'search.estimate',
}
__all__ = list(_DOORS)

def __getattr__(name):
    if name not in _DOORS: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    return getattr(import_module(f'{__name__}.{_DOORS[name]}'), name)

def __dir__(): return sorted([*globals(), *_DOORS])
