"""Families that are packed because a small twin of theirs passes the trial: the laws, by what each is made of."""
import re

import pytest
import torch
import transformers as tf
from fixtures import NEW_DECODERS, NEW_FAMILIES, family_config, make_backbone
from test_model import config, logits_of, trained
from test_packing import as_given, both_ways, logits_and_gradients, mirrored, prompter, rows_of

from underdog.machine import quiet
from underdog.model import attention, read_layer, twin
from underdog.model.head import exchange
from underdog.model.lora import linear_layers
from underdog.model.memory import blocks
from underdog.model.merge import load_adapter, load_merged, merge, save_adapter
from underdog.model.planner import Planner, attention_of, plannable
from underdog.text.heads import HEADS
from underdog.text.source import RowSource

# Kaggle's transformers 5.0 has a ModernBERT whose attention cannot be exchanged: it is padded there
OLD = not getattr(tf.ModernBertModel, '_supports_attention_backend', False)
PACKED = [family for family in NEW_FAMILIES if not (OLD and family == 'modernbert')]
needs_modernbert = pytest.mark.skipif(OLD, reason='this transformers has a ModernBERT that cannot be packed')


@pytest.fixture(scope='module')
def new(tmp_path_factory):
    "A tiny backbone of each new family."
    quiet()
    root = tmp_path_factory.mktemp('new')
    return {family: make_backbone(root/family, family) for family in NEW_FAMILIES}


def near(ours, theirs, tolerance):
    "The largest difference is below so much of the largest number."
    assert (ours - theirs).abs().max() <= tolerance*theirs.abs().max()


@pytest.mark.parametrize('family', PACKED)
def test_packed_equals_padded(new, family):
    "Logits and LoRA's gradients, with rows longer than the windows."
    for head in ('pair', 'joint'):
        model = trained(config(new[family], head=head))
        assert model.packing == ('causal' if family in NEW_DECODERS else 'bidirectional')
        assert model.planner.reads == (family in NEW_DECODERS)
        read = 'last' if family in NEW_DECODERS else 'first'
        packed, padded = both_ways(model, head, HEADS[head].orders, read, longest=30)
        logits, gradients = logits_and_gradients(model, packed)
        reference, reference_gradients = logits_and_gradients(model, padded)
        near(logits, reference, 2e-6)
        # every linear layer learns
        for ours, theirs in zip(gradients, reference_gradients):
            near(ours, theirs, 2e-5)
            assert theirs.abs().max() > 0
        names = [name for name, _ in model.backbone.named_modules() if name.endswith('lora_A')]
        assert len(names) == len(linear_layers(tf.AutoModel.from_config(family_config(family))))


@pytest.mark.parametrize('family', NEW_DECODERS)
def test_the_last_layer_where_it_is_read(new, family):
    "It gives what the whole layer gives, and neither is computed for other tokens."
    model = trained(config(new[family], pooling='read'))
    packed, _ = both_ways(model, 'pair', longest=30)
    few = logits_of(model, packed)
    layer = model.planner, blocks(model.backbone)[-1]
    seen = []
    layer[1].mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    logits_of(model, packed)
    layer[0].reads = False
    near(few, logits_of(model, packed), 2e-6)
    assert seen == [len(packed.read), packed.tokens]


@pytest.mark.parametrize('family', NEW_DECODERS)
def test_symmetric_heads_have_no_order_bias(new, family):
    model = trained(config(new[family], head='symmetric'))
    given, turned = (logits_of(model, RowSource(rows, prompter('symmetric'), 'causal').batch(as_given()))
                     for rows in (rows_of(longest=30), mirrored(rows_of(longest=30))))
    near(exchange(turned), given, 5e-6)
    assert (turned - given)[2:].abs().max() > 1e-3


@pytest.mark.parametrize('family', NEW_FAMILIES)
def test_saved_reloaded_and_merged(new, family, tmp_path):
    model = trained(config(new[family]))
    packed, _ = both_ways(model, 'pair', read='last' if family in NEW_DECODERS else 'first')
    logits = logits_of(model, packed)
    save_adapter(model, tmp_path/'adapter')
    assert torch.equal(logits_of(load_adapter(tmp_path/'adapter'), packed), logits)
    merged = load_merged(merge(tmp_path/'adapter', tmp_path/'merged'))
    near(logits_of(merged, packed), logits, 1e-5)


@pytest.mark.parametrize('family', ['qwen3', 'phi3', 'xlmr'])
def test_in_four_bits(new, family):
    "Heads with norms, and projections that are one."
    model = trained(config(new[family], quantization='nf4'))
    packed, padded = both_ways(model, 'pair', read='last' if family in NEW_DECODERS else 'first')
    near(logits_of(model, packed), logits_of(model, padded), 1e-3)


# ---- what a trial finds

@needs_modernbert
def test_a_window_to_both_sides_matters(new):
    "ModernBERT's local layers: the law above does not hold because both sides ignore the window."
    model = trained(config(new['modernbert']))
    packed, _ = both_ways(model, 'pair', read='first', longest=30)
    narrow = logits_of(model, packed)
    for module in model.backbone.modules():
        if getattr(module, 'sliding_window', None): module.sliding_window = None
    packed.plan.cache.clear()
    assert (logits_of(model, packed) - narrow).abs().max() > 1e-4


def linear_attention():
    "A model whose lower layers are recurrent."
    size = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    return tf.AutoConfig.for_model('qwen3_next', num_hidden_layers=4, **size)


@pytest.mark.parametrize('config_of, reason', [
    (linear_attention, 'qwen3_next: layers of the kind linear_attention carry'),
    (lambda: tf.AutoConfig.for_model('gemma3n_text'), 'gemma3n_text: some layers take the keys of others'),
    (lambda: tf.AutoConfig.for_model('gpt_oss', num_hidden_layers=2), 'gpt_oss: .*see each other|gpt_oss: '),
    (lambda: tf.AutoConfig.for_model('bloom'), 'bloom: its attention cannot be exchanged')])
def test_what_cannot_be_packed_says_so_and_names_others(config_of, reason):
    known = plannable(config_of())
    assert known.packing == '' and not known.reads and not known.moves and attention_of(config_of()) is None
    assert re.match(reason, known.why) and 'Qwen3' in known.why


def test_rotary_positions_of_another_kind_are_packed_and_not_moved():
    "Cohere turns neighbours instead of halves: its own layers run in a packed row, ours would be wrong."
    known = plannable(tf.AutoConfig.for_model('cohere', num_hidden_layers=2))
    assert known == twin.Plannable('causal')


@pytest.mark.parametrize('broken, lost', [
    ('planned_attention', 'packing'), ('_heads', 'reads'), ('_move', 'moves')])
def test_a_trial_finds_what_is_wrong(monkeypatch, broken, lost):
    "Norms of heads left out, keys not turned, a plan that is ignored."
    right, small = plannable(family_config('qwen3')), family_config('qwen3', num_hidden_layers=2)
    assert right.packing and right.reads and right.moves
    if broken == '_heads':
        whole = read_layer._heads
        monkeypatch.setattr(read_layer, '_heads', lambda x, dim, norm=None: whole(x, dim))
    if broken == '_move': monkeypatch.setattr(attention, '_move', lambda keys, *args: keys)
    if broken == 'planned_attention':
        monkeypatch.setattr(attention, '_pieces', lambda plan: attention._Pieces(
            [len(plan.positions)], [(0, 0)], [len(plan.positions)], [len(plan.positions)]))
        monkeypatch.setattr(attention, 'span_mask', lambda *args, **kwargs: (None, True))
    known = twin.try_twin(small, attention.register(), Planner)
    assert not getattr(known, lost)


def test_a_trial_leaves_no_trace():
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    small = family_config('llama', vocab_size=77)
    before = small.to_dict()
    plannable(small)
    assert torch.equal(torch.rand(1), first) and small.to_dict() == before
