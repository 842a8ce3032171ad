"""A training step of a full-size model, traced without memory: what is alive at its peak, beside what a plan says.

Fake tensors have shapes and no numbers. Weights in 4 bits are modelled: storages of their size, unpacked when they are
used, and once more in the backward pass."""
import json
import weakref
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModel

from underdog.text.layout import row_layout
from underdog.text.pack import pack, read_plan
from underdog.model.attention import register
from underdog.model.lora import add_lora
from underdog.model.memory import blocks, recompute
from underdog.model.read_layer import read_last_layer
from underdog.model.settings import ModelConfig
from underdog.search.cost import GIB, Setup, memory, work_of
from underdog.search.estimate import best_fit
from underdog.search.lengths import lmsys_lengths
from underdog.search.recipe import Recipe
from underdog.search.shapes import accelerator, model_shape

TYPES = {'gemma-2-9b': 'gemma2', 'gemma-2-2b': 'gemma2', 'mistral-7b': 'mistral', 'llama-3-8b': 'llama',
         'qwen3-8b': 'qwen3'}
LONGEST = 1024   # tokens of a sequence


class Tally(TorchDispatchMode):
    "Bytes of all storages that were made while it lasts: those alive now, and the most that ever were."
    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.known = 0, 0, WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor): continue
            storage = tensor.untyped_storage()
            if storage in self.known: continue
            self.known[storage] = True
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.drop, storage.nbytes())
        return result

    def drop(self, nbytes): self.alive -= nbytes


class Unpacked(torch.autograd.Function):
    "x·Wᵀ with a W that is unpacked for it, forward and backward, and not kept."
    @staticmethod
    def forward(ctx, x, packed, shape):
        ctx.shape = shape
        return x @ x.new_empty(shape).T

    @staticmethod
    def backward(ctx, grad): return grad @ grad.new_empty(ctx.shape), None, None


class Packed4Bit(nn.Linear):
    "A linear layer whose weights are a storage of .516 bytes a number."
    def __init__(self, inputs, outputs):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = inputs, outputs, None
        packed = torch.empty(round(.516*inputs*outputs), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x): return Unpacked.apply(x, self.weight, (self.out_features, self.in_features))


def make_model(shape, recipe, on_card):
    """A backbone of the sizes of `shape` in fp16 with packed layers and LoRA, gradients and moments of Adam beside it.

    The embedding is `on_card`, or on the host."""
    names = dict(hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
                 num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
                 vocab_size=shape.vocab if on_card else 64)
    config = AutoConfig.for_model(TYPES[shape.name], **names, pad_token_id=0, use_cache=False)
    config._attn_implementation = register()
    backbone = AutoModel.from_config(config, dtype=torch.float16)
    for layer in blocks(backbone):
        for name, module in list(layer.named_modules()):
            if not isinstance(module, nn.Linear): continue
            parent, _, last = name.rpartition('.')
            setattr(layer.get_submodule(parent), last, Packed4Bit(module.in_features, module.out_features))
    backbone.requires_grad_(False)
    read_last_layer(backbone)
    # fake tensors cannot be moved in place, and are where they should be
    with patch.object(nn.Module, 'to', lambda module, *args: module):
        model = add_lora(backbone, ModelConfig('none', rank=recipe.rank, dropout=0.))
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained: p.grad = torch.zeros_like(p)
    return model, [torch.zeros_like(p) for p in trained for _ in range(2)]


def make_batch(tokens):
    "(`Packed`, its plan for the last layer) of rows with about so many tokens: a pair of answers of the longest kind."
    sizes = dict(prompt=124, a=LONGEST - 130, b=LONGEST - 130)
    one = sum(sizes.values()) + 6
    rows = [sizes]*(tokens//one)
    if tokens % one > 200: rows.append(dict(prompt=24, a=(tokens % one - 30)//2, b=(tokens % one - 30)//2))
    # each piece of a token of its own: what the answers share would be computed once
    frame, ids = dict(start=[1], middle=[2], end=[3]), dict(prompt=4, a=5, b=6)
    layouts = [row_layout(frame, {k: [ids[k]]*n for k, n in row.items()}, 'pair') for row in rows]
    batch = pack(layouts, range(len(rows)), [False]*len(rows))
    return batch, read_plan(batch.plan, batch.pool.numpy())


def traced_peak(shape, recipe, tokens, recomputed, on_card=True):
    "Bytes at the peak of a step of `tokens` with so many layers computed twice."
    batch, last = make_batch(tokens)
    batch.plan.last = last
    with FakeTensorMode(allow_non_fake_inputs=True), Tally() as tally:
        model, moments = make_model(shape, recipe, on_card)
        for layer in blocks(model)[:recomputed]: recompute(layer)
        model.train()
        tally.peak = tally.alive
        with torch.autocast('cpu', torch.float16):
            output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, plan=batch.plan)
        states = output.last_hidden_state
        states.float().square().sum().backward()
        peak = tally.peak
        del output, states, model, moments
    return peak


def planned(shape, recipe, tokens, recomputed):
    "{part: bytes} of the plan on a T4 without what no tensor holds."
    parts = memory(Setup(shape, recipe, accelerator('2xT4')), tokens, recomputed, LONGEST)
    return {name: size for name, size in parts.items() if name != 'context'}


@pytest.mark.parametrize('name,rank', [('mistral-7b', 16), ('gemma-2-9b', 64)])
def test_a_full_size_step_takes_what_the_plan_says(name, rank):
    "All layers, as the plan would train them on two T4s: batch, layers computed twice, embedding on card or host."
    shape, recipe = model_shape(name), Recipe(rank=rank)
    setup = Setup(shape, recipe, accelerator('2xT4'))
    fit = best_fit(setup, work_of(shape, lmsys_lengths(), recipe))
    tokens = make_batch(fit.batch_tokens)[0].tokens
    assert tokens > .9*fit.batch_tokens
    parts = planned(shape, recipe, tokens, fit.recomputed)
    peak = traced_peak(shape, recipe, tokens, fit.recomputed, on_card=parts['embedding'] > 0)
    assert sum(parts.values())/peak == pytest.approx(1, abs=.05)
    assert peak < setup.accelerator.memory_gib*GIB, 'it fits'


@pytest.mark.parametrize('recomputed', [0, 5, 8])
@pytest.mark.parametrize('name,rank', [('gemma-2-9b', 16), ('mistral-7b', 64), ('llama-3-8b', 16)])
def test_eight_layers_take_what_the_plan_says(name, rank, recomputed):
    "None, some and all computed twice."
    shape, recipe = replace(model_shape(name), layers=8), Recipe(rank=rank)
    parts = planned(shape, recipe, make_batch(2048)[0].tokens, recomputed)
    peak = traced_peak(shape, recipe, 2048, recomputed, on_card=parts['embedding'] > 0)
    assert sum(parts.values())/peak == pytest.approx(1, abs=.1)


def test_norms_of_heads_are_planned():
    test_eight_layers_take_what_the_plan_says('qwen3-8b', 16, 5)


@pytest.mark.parametrize('name', sorted(TYPES))
def test_a_model_by_name_is_the_model_by_its_config(name, tmp_path):
    shape = model_shape(name)
    config = dict(model_type=TYPES[name], num_hidden_layers=shape.layers, hidden_size=shape.hidden,
                  intermediate_size=shape.intermediate, num_attention_heads=shape.heads,
                  num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, vocab_size=shape.vocab)
    (tmp_path/'config.json').write_text(json.dumps(config))
    assert replace(model_shape(tmp_path), name=name) == shape
