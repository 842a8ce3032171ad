"Attention of all spans in one launch: it equals the loop, is used only where its test passed, and changes no result."
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_kernel import stand_in
from conftest import REPO
from fixtures import DECODERS, family_config, make_backbone
from test_model import trained
from test_packing import both_ways, equal_both_ways, logits_and_gradients

from underdog.model.attention import planned_attention
from underdog.model.selftest import choose_attention
from underdog.model.settings import ModelConfig
from underdog.model.varlen import How, Sizes, aten_operators, check_schema, in_one_launch
from underdog.text.heads import HEADS
from underdog.text.pack import Plan, Span, read_plan

CPU = torch.device('cpu')


def use_one_launch(model, operators=None):
    "Let `model` compute attention in one launch, with a stand-in for the GPU's kernel."
    sizes = Sizes.of(model.backbone.config, causal=model.packing == 'causal')
    choice = choose_attention(sizes, CPU, model.dtype, operators or stand_in())
    assert choice.attend is not None, choice.line
    model.planner.attention = choice
    return model


# ---- it equals the loop
@pytest.mark.parametrize('head', ['pair', 'joint', 'symmetric', 'combined'])
@pytest.mark.parametrize('family', [*DECODERS, 'bert'])
def test_one_launch_is_the_loop(bases, family, head):
    "Logits and gradients, every family and layout: plain, with a shared prompt, with keys moved on."
    if HEADS[head].asks and family not in DECODERS: pytest.skip('an encoder has no symmetric layouts')
    model = trained(ModelConfig(str(bases[family]), head=head, rank=4, quantization='none'))
    packed = both_ways(model, head)[0] if not HEADS[head].asks else symmetric_batch(model, head)
    looped, gradients = logits_and_gradients(model, packed)
    packed.plan.cache.clear()
    launched, launched_gradients = logits_and_gradients(use_one_launch(model), packed)
    torch.testing.assert_close(launched, looped, rtol=1e-5, atol=1e-5)
    for a, b in zip(launched_gradients, gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5*max(1, float(b.abs().max())))


def symmetric_batch(model, head):
    from test_packing import as_given, prompter, rows_of
    from underdog.text.source import RowSource
    return RowSource(rows_of(longest=30), prompter(head), model.packing).batch(as_given())


@pytest.mark.parametrize('family, changes', [
    ('llama', dict(num_key_value_heads=2)),
    ('gemma2', dict(num_key_value_heads=1, sliding_window=6)),
    ('mistral', dict(num_key_value_heads=2, sliding_window=6))])
def test_windows_and_grouped_queries(tmp_path, family, changes):
    "Packed in one launch equals padded."
    base = make_backbone(tmp_path/'base', family, **changes)
    for head in ('pair', 'joint'):
        model = use_one_launch(trained(ModelConfig(str(base), head=head, rank=4, quantization='none')))
        equal_both_ways(model, *both_ways(model, head, HEADS[head].orders, longest=30))


def test_one_launch_a_layer(bases):
    "However many rows there are; and recomputation runs it again with the same result."
    from underdog.model.memory import blocks, recompute
    calls = dict(forward=0, backward=0)

    def counting(direction, result):
        calls[direction] += 1
        return result
    model = trained(ModelConfig(str(bases['llama']), rank=4, quantization='none'))
    use_one_launch(model, stand_in(lambda x: counting('forward', x), lambda x: counting('backward', x)))
    packed, _ = both_ways(model, 'pair')
    calls.update(forward=0, backward=0)
    plain = logits_and_gradients(model, packed)
    assert calls == dict(forward=2, backward=2)
    for layer in blocks(model.backbone): recompute(layer)
    again = logits_and_gradients(model, packed)
    assert calls == dict(forward=2 + 4, backward=4)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def layer(plan, heads=4, key_heads=2, dim=8):
    "Query, key and value of a layer for `plan`."
    asked = sum(s.end - s.start for s in plan.spans)
    sizes = (heads, asked), (key_heads, len(plan.positions)), (key_heads, len(plan.positions))
    return [torch.randn(1, h, n, dim) for h, n in sizes]


def test_what_the_kernel_cannot_do_is_left_to_the_loop():
    how, ask = How(True, 4, .3), lambda plan, how: in_one_launch(*layer(plan), plan, how, stand_in())
    # a window over keys whose positions have a gap
    gap = Plan([Span(0, 6), Span(6, 9, ((0, 3, 0),), 6)], np.array([0, 1, 2, 3, 4, 5, 7, 8, 9]))
    assert ask(gap, how) is None and ask(gap, How(True, None, .3)) is not None
    # queries in another order than the spans
    turned = Plan([Span(3, 6, at=3), Span(0, 3, at=0)], np.array([0, 1, 2]*2))
    assert ask(turned, How(True, None, .3)) is None
    # a window that failed its test; one that cuts nothing off is none
    plain = Plan([Span(0, 6)], np.arange(6))
    for window, expected in ((4, True), (6, False), (None, False)):
        result = in_one_launch(*layer(plain), plain, How(True, window, .3), stand_in(), windows=False)
        assert (result is None) == expected
    # dropout, another precision, another size
    plan = Plan([Span(0, 6)], np.arange(6))
    choice = choose_attention(Sizes(4, 2, 8, True), CPU, torch.float32, stand_in(forward=recorded))
    plan.cache['at_once'] = choice.attend
    module = SimpleNamespace(is_causal=True)
    for settings, tensors, expected in (
            (dict(), layer(plan), 1), (dict(dropout=.1), layer(plan), 0),
            (dict(), [x.half() for x in layer(plan)], 0), (dict(), layer(plan, dim=16), 0)):
        seen.clear()
        planned_attention(module, *tensors, None, plan=plan, **settings)
        assert len(seen) == expected


seen = []


def recorded(outputs):
    seen.append(outputs)
    return outputs


def test_the_last_layer_of_a_plan_with_gaps_between_the_read_tokens():
    whole = Plan([Span(0, 6), Span(6, 9, ((0, 3, 0),), 6)], np.array([0, 1, 2, 3, 4, 5, 3, 4, 5]))
    last = read_plan(whole, [2, 4, 8])
    tensors = layer(last)
    looped, _ = planned_attention(SimpleNamespace(is_causal=True), *tensors, None, plan=last, scaling=.3)
    launched = in_one_launch(*tensors, last, How(True, None, .3), stand_in())
    torch.testing.assert_close(launched, looped, rtol=1e-5, atol=1e-6)


# ---- it is used only where its test passed
SIZES = Sizes(heads=4, key_heads=2, head_dim=16, causal=True)


def nan_in(i): return lambda results: [x*np.nan if n == i else x for n, x in enumerate(results)]


def no_memory(results): raise torch.OutOfMemoryError('as a GPU would')


@pytest.mark.parametrize('operators, reason', [
    (stand_in(forward=lambda out: [1.05*out[0], *out[1:]]), 'output off by'),
    (stand_in(forward=nan_in(1)), 'gradient of queries off by nan'),
    (stand_in(backward=nan_in(2)), 'gradient of values off by nan'),
    (stand_in(backward=lambda grads: [*grads[:1], grads[1].flip(1), *grads[2:]]), 'gradient of keys off by'),
    (stand_in(forward=no_memory), 'OutOfMemoryError: as a GPU would')])
def test_a_wrong_kernel_is_found_out(operators, reason):
    choice = choose_attention(SIZES, CPU, torch.float32, operators)
    assert choice.attend is None
    assert choice.line.startswith('attention: span by span; the kernel for all at once') and reason in choice.line


def test_a_kernel_that_is_wrong_with_windows_alone():
    def narrow(arguments, operator): return operator(**arguments | dict(window_size=None))
    right = stand_in()
    wrong = type(right)(*[lambda o=o, **arguments: narrow(arguments, o) for o in right])
    choice = choose_attention(SIZES, CPU, torch.float32, wrong)
    assert choice.attend is not None and not choice.attend.windows and 'where a window cuts keys off' in choice.line


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_passes(dtype):
    assert choose_attention(SIZES, CPU, dtype, stand_in()).attend is not None


def test_an_operator_with_other_arguments_is_not_used(monkeypatch):
    from underdog.model import selftest
    forward, backward = (operator.default._schema for operator in aten_operators())
    with pytest.raises(ValueError, match='other arguments'): check_schema(forward, 'backward')
    with pytest.raises(ValueError, match='other arguments'): check_schema(backward, 'forward')

    def changed():
        return check_schema(torch.ops.aten.mm.default._schema, 'forward')
    monkeypatch.setattr(selftest, 'aten_operators', changed)
    choice = choose_attention(SIZES, 'cuda:0', torch.float16)
    assert choice.attend is None and 'has other arguments or results' in choice.line


def test_the_test_leaves_nothing_behind():
    "Random state, hooks that measure memory, a context without gradients: all as before."
    state, kept = torch.get_rng_state(), []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        assert choose_attention(SIZES, CPU, torch.float32, stand_in()).attend is not None
    assert not kept and torch.equal(torch.get_rng_state(), state)


def test_on_a_cpu_there_is_no_kernel(bases):
    model = trained(ModelConfig(str(bases['llama']), rank=4, quantization='none'))
    assert model.planner.attention.attend is None
    assert model.planner.attention.line == 'attention: span by span, on a cpu'
    assert Sizes.of(family_config('gemma2'), True) == Sizes(4, 4, 16, True)


def test_a_run_says_which(finished):
    line = 'attention: span by span, on a cpu'
    assert finished.config['versions']['attention'] == line and line in finished.log_file.read_text()


# ---- on a card
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device: the real kernel cannot be run')
def test_the_real_kernel_is_the_loop():
    "What `benchmarks.varlen` finds on this card."
    done = subprocess.run([sys.executable, '-m', 'benchmarks.varlen', '--rounds', '1'], cwd=REPO, text=True,
                          stdout=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=str(REPO/'lib')))
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0 and report['right'], report


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a card: the benchmark would run')
def test_the_benchmark_says_why_it_is_skipped(monkeypatch, capsys):
    monkeypatch.syspath_prepend(REPO)
    monkeypatch.setattr(sys, 'argv', ['varlen'])
    from benchmarks import varlen
    varlen.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == dict(skipped='no CUDA device')
