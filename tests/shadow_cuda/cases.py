"""The library's own training step and prediction on two T4s that are not there.

`python -m shadow_cuda.cases FAMILY …` prints a line of JSON for each case; `tests/test_shadow.py` reads them."""
import json
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from unittest import mock

from shadow_cuda import t4
from shadow_cuda.tensors import DeviceMix, put, shadow_cuda
import numpy as np
import torch
from fixtures import DECODERS, FAMILIES, make_backbone
from safetensors.torch import load_file, save_file
from test_packing import prompter

import datasets
from underdog.machine import quiet
from underdog.model import backbone, model, planner
from underdog.model.folder import weight_files
from underdog.model.lora import without_lora
from underdog.model.memory import blocks, recompute_only
from underdog.model.model import adapter_parameters, head_parameters, load_model
from underdog.model.predict import predict_logits
from underdog.model.selftest import Choice
from underdog.model.settings import ModelConfig
from underdog.text.heads import HEADS, orders_of
from underdog.text.source import RowSource
from underdog.training import probe
from underdog.training.budget import plan_memory
from underdog.training.loop import rehearse
from underdog.training.probe import start_from_probe
from underdog.training.settings import TrainConfig
from underdog.training.step import FitData, Training
from underdog.training.worker import accelerator_for

TRAIN, PREDICT = 'cuda:0', 'cuda:1'
LAYERS, ROWS = 2, 4
SIZES = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS)
# windows that cut keys off
CHANGES = dict(mistral=dict(sliding_window=40), gemma2=dict(sliding_window=40))


# ---- which cases
@dataclass(frozen=True)
class Case:
    "What is trained, and whether its embedding stays on the host."
    family: str
    head: str
    quantization: str
    host: bool

    def __str__(self):
        place = 'host' if self.host else 'device'
        return f'{self.family}, {self.head}, {self.quantization}, embedding on the {place}'


def cases_of(family):
    """A case for each head of `family`.

    Those of all families hold every pair of family, head, quantization and host, those of decoders every triple of the
    last three."""
    i, heads = FAMILIES.index(family), ('pair', 'joint', 'symmetric') if family in DECODERS else ('pair', 'joint')
    return [Case(family, head, ('none', 'nf4')[(i + j) % 2], bool((i//2 + j) % 2)) for j, head in enumerate(heads)]


# ---- their parts
def make_folder(family, folder):
    "A tiny model of `family`."
    grouped = dict(head_dim=32, num_key_value_heads=2) if family in DECODERS else {}
    make_backbone(folder, family, **SIZES | grouped | CHANGES.get(family, {}))
    # weights that fp16 holds: rounded, some would fall into another of 16 levels
    for file in weight_files(folder): save_file({name: x.half() for name, x in load_file(file).items()}, file)
    return str(folder)


def make_rows(n=16):
    "Rows of 12 to 140 tokens and a frame."
    rng = np.random.default_rng(0)
    ids = lambda least, most: rng.integers(10, 128, rng.integers(least, most)).tolist()
    return datasets.Dataset.from_list([dict(prompt=ids(4, 20), a=ids(4, 60), b=ids(4, 60)) for _ in range(n)])


@contextmanager
def placed(case):
    "Loads put weights in 4 bits on the CPU first, and embeddings where `case` wants them."
    load = backbone.load_backbone
    # quantizing on a device is not what these devices can do
    def load_in_4_bits(cfg, device):
        if device == 'cpu': return load(cfg, device)
        loaded, device = load(replace(cfg, dtype='float16'), 'cpu'), backbone._known_device(device)
        put(loaded, device)
        backbone._place_embedding(loaded, device)
        return loaded
    with ExitStack() as stack:
        patch = lambda place, name, value: stack.enter_context(mock.patch.object(place, name, value))
        patch(backbone, '_HOST_SHARE', 0. if case.host else 1.)
        if case.quantization == 'nf4': patch(model, 'load_backbone', load_in_4_bits)
        yield


def load(cfg, device, size):
    "The model of `cfg` as if it were trained: every trained value is normal with this `size`."
    loaded, generator = load_model(cfg, device), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter_parameters(loaded) + head_parameters(loaded):
            p.copy_(size*torch.randn(p.shape, generator=generator))
    return loaded


def start(case, cfg):
    "The `Training` of `case`, its memory planned, as a run's worker starts it."
    accelerator = accelerator_for(dict(model=dict(dtype='auto')))
    assert accelerator.scaler is not None, 'fp16 is trained with a loss scale'
    loaded = load(cfg, TRAIN, size=.02)
    source = RowSource(make_rows(), prompter(case.head), loaded.packing)
    y = np.eye(3)[np.random.default_rng(1).integers(0, 3, len(source))]
    offset = np.log(np.full((len(y), 3), 1/3))
    data = FitData(source, y, offset, train=np.arange(12), held=np.arange(12, 16))
    settings = TrainConfig(batch_rows=ROWS, batch_tokens=1024, checkpointing='none')
    return Training(loaded, data, settings, accelerator, plan_memory(loaded, source, data.train, settings))


# ---- what is measured
def pass_of(training, rows, counts):
    "(kernels, spans) of forward and backward of so many `rows` in one batch."
    shown = [(row, False) for row in range(rows)]
    counts.clear()
    training.backward(shown, 1.)
    for p in training.params: p.grad = None
    return sum(counts.kernels.values()), len(training.data.source.batch(shown).plan.spans)


@contextmanager
def one_layer_less(training):
    "Without the lowest layer."
    layers = blocks(training.model.backbone)
    lowest, config = layers[0], layers_config(training)
    del layers[0]
    config.num_hidden_layers -= 1
    yield
    layers.insert(0, lowest)
    config.num_hidden_layers += 1


def layers_config(training): return without_lora(training.model.backbone).config


def rates(training, counts):
    "(kernels of a layer, kernels of a span in a layer), forward and backward."
    (few, spans), (many, more_spans) = (pass_of(training, rows, counts) for rows in (2, 4))
    with one_layer_less(training): less, _ = pass_of(training, 2, counts)
    return few - less, round((many - few)/(more_spans - spans)/LAYERS, 1)


def entering_layers(training):
    "A set that fills with the dtypes of what enters the layers."
    dtypes = set()
    def note(layer, args, kwargs): dtypes.add(str((args[0] if args else kwargs['hidden_states']).dtype))
    for layer in blocks(training.model.backbone): layer.register_forward_pre_hook(note, with_kwargs=True)
    return dtypes


def train(case, cfg, counts):
    "What came of a training step after a rehearsal."
    training = start(case, cfg)
    rehearse(training)
    if HEADS[case.head].probe:
        start_from_probe(training.model, training.data, np.arange(ROWS*4), rows=12, accelerator=training.accelerator)
    # random weights of this size want a smaller loss scale
    training.accelerator.scaler.update(2.**10)
    # the first step makes Adam's moments, the second is like all others
    training.step()
    entering = entering_layers(training)
    batch = training.data.source.batch([(row, False) for row in training.plan[training.at.step]])
    counts.limit = batch.tokens*SIZES['hidden_size']
    counts.clear()
    step = training.step()
    laws = dict(step={name: step[name] for name in ('loss', 'grad_norm', 'adapter_norm', 'skipped', 'not_finite')},
                entering=sorted(entering), wider=dict(counts.wider), attention=dict(counts.attention))
    figures = dict(kernels=sum(counts.kernels.values()), float32=sum(counts.wide.values()),
                   to_device=counts.copies['to device'], to_host=counts.copies['to host'],
                   waits=sum(counts.syncs.values()))
    counts.limit = 2**62
    # kernels of a layer and a span: as it is done, and span by span
    line = training.model.planner.attention.line
    figures['layer'], figures['span'] = rates(training, counts)
    if training.model.planner.attention.attend is not None:
        training.model.planner.attention = Choice(None, '')
        figures['layer_in_loop'], figures['span_in_loop'] = rates(training, counts)
        laws['attention'] |= counts.attention
    # what a second run of each layer costs
    once, _ = pass_of(training, 2, counts)
    recompute_only(training.model, range(LAYERS))
    figures['recomputed'] = pass_of(training, 2, counts)[0] - once
    laws['attention'] |= counts.attention
    return laws | dict(line=line, figures=figures)


def logits_on(device, case, cfg):
    "Logits of some rows by the model of `cfg` on `device`."
    loaded = load(cfg, device, size=.1)
    source = RowSource(make_rows(), prompter(case.head), loaded.packing)
    return predict_logits(loaded, source, np.arange(6), orders_of(case.head), budget=1024)


def run(case, folder):
    "What came of a case."
    cfg = ModelConfig(folder, head=case.head, quantization=case.quantization, rank=4)
    with placed(case):
        expected = logits_on('cpu', case, replace(cfg, dtype='float32'))
        with shadow_cuda() as counts:
            result = train(case, cfg, counts)
            logits = logits_on(PREDICT, case, cfg)
    error, largest = np.abs(logits - expected).max(), np.abs(expected).max()
    return result | dict(error=float(error), largest=float(largest), current=t4.current[0])


def mixed():
    "Operations on tensors of two devices that do not raise, as they should."
    with shadow_cuda():
        host, first, second = (torch.ones(2, 2, device=device) for device in ('cpu', TRAIN, PREDICT))
        operations = {
            'sum of two devices': lambda: first + second,
            'product with the host': lambda: first @ host,
            'in place': lambda: first.add_(host),
            'concatenation': lambda: torch.cat([first, host]),
            'indices of another device': lambda: first[torch.tensor([0], device=PREDICT)],
            'indices of a device into the host': lambda: host[torch.tensor([0], device=TRAIN)],
            'rows by indices of another device': lambda: first.index_select(0, torch.tensor([0], device=PREDICT)),
            'embedding on the host': lambda: torch.nn.functional.embedding(torch.tensor([0], device=TRAIN), host),
        }
        return [name for name, operation in operations.items() if not _raises(operation)]


def _raises(operation):
    try: operation()
    except DeviceMix: return True
    return False


def main(*families):
    quiet()
    # a test for each device and shape is enough
    planner.choose_attention = cache(planner.choose_attention)
    # a probe is fitted on the CPU, as everywhere
    probe._STRENGTHS = (1.,)
    print(json.dumps(dict(mixed=mixed())), flush=True)
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            base = make_folder(family, folder)
            for case in cases_of(family):
                print(json.dumps(dict(case=str(case), family=family) | run(case, base)), flush=True)


if __name__ == '__main__': main(*sys.argv[1:])
