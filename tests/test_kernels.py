"""What a step costs beside its matrix products: passes over memory and kernels, counted on the CPU.

The fast path equals the plain one, and costs what it promises."""
from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures import FAMILIES, family_config, make_backbone
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from test_model import trained
from test_packing import both_ways, logits_and_gradients, prompter
from transformers import AutoModel

from underdog.machine import quiet
from underdog.model import disentangled
from underdog.model.attention import planned_attention
from underdog.model.backbone import load_backbone
from underdog.model.disentangled import plan_deberta, span_groups
from underdog.model.lora import add_lora, merge_lora, without_lora
from underdog.model.model import load_model
from underdog.model.settings import ModelConfig
from underdog.text.pack import Keys, Plan, Span
from underdog.text.source import RowSource


class Kernels(TorchDispatchMode):
    "Counts operations that write (no views) and the bytes of their results."
    def __init__(self):
        super().__init__()
        self.names, self.written = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **kwargs or {})
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and func not in ALIASES:
            self.names[str(func)] += 1
            self.written += sum(t.nbytes for t in tree_leaves(results) if isinstance(t, torch.Tensor))
        return results


ALIASES = (torch.ops.aten._unsafe_view.default, torch.ops.aten._reshape_alias.default)


# ---- LoRA

@pytest.fixture(scope='module')
def wide(tmp_path_factory):
    "A backbone of width 256: beside it rank 4 is nothing."
    quiet()
    return make_backbone(tmp_path_factory.mktemp('wide'), hidden_size=256, intermediate_size=256)


def lora_layer(base, quantization='none', half=False, dropout=0., seed=0, device='cpu'):
    "A linear layer with LoRA as if trained."
    dtype = 'float16' if half else 'float32'
    cfg = ModelConfig(str(base), rank=4, alpha=6, dropout=dropout, quantization=quantization, dtype=dtype,
                      int8_threshold=0.)
    layer = without_lora(add_lora(load_backbone(cfg, device), cfg)).layers[1].self_attn.o_proj
    torch.manual_seed(seed)
    with torch.no_grad(): layer.lora_B['default'].weight.normal_(0, .1)
    return layer


def forward_and_gradients(forward, layer, half, shape=(1, 48, 256)):
    "{name: tensor}: output of `forward`, gradients of x, A and B."
    torch.manual_seed(1)
    weights = dict(A=layer.lora_A['default'].weight, B=layer.lora_B['default'].weight)
    device = weights['A'].device
    x, grad = torch.randn(2, *shape, device=device, dtype=torch.float16 if half else torch.float32)
    x.requires_grad_()
    with torch.autocast(device.type, torch.float16, enabled=half): output = forward(x)
    gradients = torch.autograd.grad(output, [x, *weights.values()], grad)
    return dict(zip(('output', 'x', *weights), (output.detach(), *gradients)))


def peft_forward(layer): return layer.forward.args[1]


no_card = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda:0', marks=no_card)])
@pytest.mark.parametrize('dropout', [0., .5])
@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('quantization', ['none', 'nf4', 'int8'])
def test_lora_equals_pefts(wide, quantization, half, dropout, device):
    if dropout and device != 'cpu': pytest.skip('a card draws the mask by shape and precision: it is another one')
    layer = lora_layer(wide, quantization, half, dropout, device=device)
    ours = forward_and_gradients(layer, layer, half)
    pefts = forward_and_gradients(peft_forward(layer), layer, half)
    tolerance = 1e-2 if half else 1e-6
    for name, reference in pefts.items():
        assert ours[name].dtype == reference.dtype
        torch.testing.assert_close(ours[name], reference, rtol=tolerance, atol=tolerance*float(reference.abs().max()))


def test_lora_of_an_input_without_gradient(wide):
    "The lowest layer's: adapters learn, the frozen matrix has no backward pass."
    layer = lora_layer(wide)
    x = torch.randn(2, 5, 256)
    with Kernels() as kernels: layer(x).sum().backward()
    products = sum(n for name, n in kernels.names.items() if 'mm' in name)
    assert products == 3 + 3   # W, A, B; then B's gradient, h's and A's
    assert layer.lora_A['default'].weight.grad.abs().max() > 0


def test_lora_that_is_off_merged_or_another_is_pefts(wide):
    x = torch.randn(2, 5, 256)
    with torch.no_grad():
        layer = lora_layer(wide)
        on, base = layer(x), layer.base_layer(x)
        layer.enable_adapters(False)
        assert torch.equal(layer(x), base)
        layer.enable_adapters(True)
        assert torch.equal(layer(x), on)
        layer.merge()
        torch.testing.assert_close(layer(x), on, rtol=1e-5, atol=1e-5)
        layer.unmerge()
        layer.set_adapter([])
        assert torch.equal(layer(x), layer.base_layer(x))


def test_merged_lora_equals_lora(wide):
    cfg = ModelConfig(str(wide), rank=4, quantization='none')
    model, x = add_lora(load_backbone(cfg), cfg), torch.randint(10, 99, (1, 12))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'lora_B' in name: p.normal_(0, .1)
        apart = model(x).last_hidden_state
        torch.testing.assert_close(merge_lora(model)(x).last_hidden_state, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('quantization', ['none', 'nf4', 'int8'])
def test_lora_writes_a_third_of_what_pefts_writes(wide, monkeypatch, quantization):
    "In half precision, forward and backward, beside what the frozen layer writes. (peft: 6 to 12 outputs, we 2.)"
    # peft asks whether autocast is on for CUDA; on the card it would be
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda kind='cpu': enabled(kind))
    layer, shape, written = lora_layer(wide, quantization, half=True), (1, 1024, 256), {}
    for name, forward in dict(ours=layer, peft=peft_forward(layer), frozen=layer.base_layer).items():
        x = torch.randn(shape, dtype=torch.float16, requires_grad=True)
        with Kernels() as kernels, torch.autocast('cpu', torch.float16): forward(x).sum().backward()
        written[name] = kernels.written
    assert written['ours'] - written['frozen'] <= (written['peft'] - written['frozen'])/3


# ---- attention

def attention_and_gradients(spans, tokens, groups=1, seed=0):
    "(output, gradients of q, k and v, `Kernels` of the backward pass) of planned attention."
    plan = Plan(spans, np.arange(tokens), cache=dict(inv_freq=torch.tensor([1., .1, .01, .001])))
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, heads, tokens, 8, requires_grad=True) for heads in (4, 4//groups, 4//groups))
    output, _ = planned_attention(SimpleNamespace(), q, k, v, None, plan)
    with Kernels() as kernels: gradients = torch.autograd.grad(output.square().sum(), [q, k, v])
    return output.detach(), gradients, kernels


@pytest.mark.parametrize('groups', [1, 2])
def test_attention_of_spans_that_see_others_equals_a_mask(groups):
    "A prompt, two answers that see it, a row that stands alone; against one call with a T x T mask."
    spans = [Span(0, 4), Span(4, 9, (Keys(0, 4),), at=4), Span(9, 12, (Keys(0, 4),), at=9), Span(12, 20, at=12)]
    output, gradients, _ = attention_and_gradients(spans, 20, groups)
    mask = torch.zeros(20, 20, dtype=torch.bool)
    for span in spans:
        for start, end, _ in (*span.sees, Keys(span.start, span.end)): mask[span.start:span.end, start:end] = True
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 20, 8, requires_grad=True) for heads in (4, 4//groups, 4//groups))
    wide = (x.repeat_interleave(groups, 1) for x in (k, v))
    whole = F.scaled_dot_product_attention(q, *wide, mask.tril()).transpose(1, 2)
    torch.testing.assert_close(output, whole, rtol=1e-5, atol=1e-6)
    reference = torch.autograd.grad(whole.square().sum(), [q, k, v])
    for ours, theirs in zip(gradients, reference): torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('prompt', [0, 8])
def test_the_backward_pass_writes_no_more_for_more_spans(prompt):
    """4 spans or 32 of the same row, alone or behind a prompt: but for the keys that are seen again.

    (The backward pass of a slice writes a gradient of the whole row.)"""
    tokens, written = 1024, {}
    for n in (4, 32):
        edges = np.linspace(prompt, tokens, n + 1).astype(int).tolist()
        sees = (Keys(0, prompt),) if prompt else ()
        spans = [Span(start, end, sees, at=start) for start, end in zip(edges, edges[1:])]
        if prompt: spans.insert(0, Span(0, prompt))
        written[n] = attention_and_gradients(spans, tokens)[2].written
    # gradients of the keys and values that are seen again, then a sum: three times each
    assert written[32] - written[4] <= 28*6*(4*prompt*8*4)


# ---- DeBERTa

def short_rows(n, seed=0):
    "`n` rows of some 20 to 60 tokens."
    rng = np.random.default_rng(seed)
    def row(): return {name: rng.integers(10, 128, rng.integers(6, 20)).tolist() for name in ('prompt', 'a', 'b')}
    return datasets.Dataset.from_list([row() for _ in range(n)])


def states_and_gradients(model, ids):
    "States of `ids` (1, T), gradients of every weight."
    states = model(ids).last_hidden_state[0]
    weights = [p for p in model.parameters() if p.requires_grad]
    loss = (states*torch.linspace(-1, 1, states.shape[-1])).sum()
    return states.detach(), torch.autograd.grad(loss, weights, allow_unused=True)


@pytest.mark.parametrize('padded', [0, 2**16])
@pytest.mark.parametrize('terms', [['c2p'], ['p2c'], ['p2c', 'c2p'], []])
def test_deberta_by_plan_equals_each_sequence_alone(monkeypatch, terms, padded):
    "Whatever terms it has, and whether spans of unlike length share a call or not; longer than near positions reach."
    monkeypatch.setattr(disentangled, '_PADDED_SCORES', padded)
    changes = dict(position_buckets=4, max_position_embeddings=16, pos_att_type=terms, relative_attention=bool(terms))
    torch.manual_seed(0)
    model = AutoModel.from_config(family_config('deberta', **changes), attn_implementation='eager').eval()
    lengths = [7, 40, 12, 7, 1]
    sequences = [torch.randint(10, 99, (1, n)) for n in lengths]
    edges = np.cumsum([0, *lengths]).tolist()
    plan = Plan([Span(*ends) for ends in zip(edges, edges[1:])], np.arange(edges[-1]))
    alone = [states_and_gradients(model, ids) for ids in sequences]
    plan_deberta(model).plan = plan
    states, gradients = states_and_gradients(model, torch.cat(sequences, 1))
    assert len(plan.cache['groups'].groups) == (1 if padded else 4)
    torch.testing.assert_close(states, torch.cat([x for x, _ in alone]), rtol=1e-5, atol=2e-6)
    for weight, *of_each in zip(gradients, *(x for _, x in alone)):
        if weight is None: continue
        reference = sum(of_each)
        torch.testing.assert_close(weight, reference, rtol=1e-4, atol=1e-5*max(1, float(reference.abs().max())))


@given(lengths=st.lists(st.integers(1, 600), min_size=1, max_size=40))
def test_every_token_has_a_slot_and_padding_is_bounded(lengths):
    edges = np.cumsum([0, *lengths]).tolist()
    plan = Plan([Span(*ends) for ends in zip(edges, edges[1:])], np.arange(edges[-1]))
    tokens, slots, groups = span_groups(plan, 'cpu')
    assert tokens[slots].tolist() == list(range(edges[-1]))
    assert len(tokens) == sum(group.spans*group.length for group in groups)
    real = torch.cat([~group.padding.flatten() for group in groups])
    assert sorted(tokens[real].tolist()) == list(range(edges[-1]))
    for group in groups:
        scores = (~group.padding).sum(-1).square().sum()
        rounding = group.length**2 - (group.length - 7)**2
        assert group.spans*group.length**2 - scores <= 2**16 + group.spans*rounding


def test_relative_positions_are_made_once(monkeypatch):
    "For all layers, and for every later step without a longer span."
    from transformers.models.deberta_v2 import modeling_deberta_v2 as theirs
    made, build = [], theirs.build_relative_position
    def counted(queries, *args, **kwargs):
        made.append(len(queries))
        return build(queries, *args, **kwargs)
    monkeypatch.setattr(theirs, 'build_relative_position', counted)
    model = AutoModel.from_config(family_config('deberta'), attn_implementation='eager').eval()
    holder = plan_deberta(model)
    for length in (20, 12, 24, 30):
        holder.plan = Plan([Span(0, length)], np.arange(length))
        with torch.no_grad(): model(torch.randint(10, 99, (1, length)))
    assert made == [24, 32]


def test_a_step_of_deberta_with_short_rows_has_at_most_twice_the_kernels_of_a_padded_one(bases):
    model = load_model(ModelConfig(str(bases['deberta']), rank=4, quantization='none')).train()
    counted = {}
    for packing in (model.packing, ''):
        batch = RowSource(short_rows(30), prompter('pair'), packing).batch([(row, False) for row in range(30)])
        with Kernels() as kernels: model(batch).square().sum().backward()
        counted[packing] = sum(kernels.names.values())
    assert counted['bidirectional'] <= 2*counted['']


@no_card
@pytest.mark.parametrize('family', FAMILIES)
def test_packed_equals_padded_on_a_card(bases, family):
    "In half precision, LoRA, spans and groups on the card's own kernels."
    model = trained(ModelConfig(str(bases[family]), rank=4, dtype='float16', quantization='none'), device='cuda:0')
    batches = (batch.to('cuda:0') for batch in both_ways(model, 'pair', longest=60))
    (logits, gradients), (reference, reference_gradients) = (logits_and_gradients(model, batch) for batch in batches)
    torch.testing.assert_close(logits, reference, rtol=2e-2, atol=2e-2)
    for ours, theirs in zip(gradients, reference_gradients):
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > .999 or theirs.abs().max() < 1e-3
